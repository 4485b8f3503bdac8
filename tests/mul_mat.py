"""Products of a quantized matrix with rows of activations, by a given libggml: what tests/test_kernels.py compares.

    python tests/mul_mat.py LIBRARIES TYPE LENGTH ROWS SEED MOST alone|batch

For every number of activation rows from 1 to MOST the products are made, one row at a time (alone) or all at once
(batch); prints the SHA-256 of all results. GGML_SMALL_BATCH_ROWS=0 in the environment leaves our kernels out.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

P, I = ctypes.c_void_p, ctypes.c_int64  # noqa: E741 (the letters of a signature)
REPACKED = ("Q4_0", "Q4_K")
# enum ggml_type of F32, and bytes that a context of ten tensors and a graph needs at most
F32, CONTEXT = 0, 1 << 20


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of libggml used here, each as `self.name(...)`."""

    def __init__(self, folder: Path) -> None:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        self.libraries = [ctypes.CDLL(str(folder / f"libggml-{part}.{suffix}")) for part in ("base", "cpu")]

    def __call__(self, name: str, result: Any, *arguments: Any) -> Any:
        function = next(getattr(lib, name) for lib in self.libraries if hasattr(lib, name))
        function.restype = result
        return function(*arguments)


def repack_buffer_type(ggml: Ggml, backend: int) -> int:
    """The buffer type that interleaves the rows of a matrix, as llama.cpp's loader finds it."""
    device = P(ggml("ggml_backend_get_device", P, P(backend)))
    registry = P(ggml("ggml_backend_dev_backend_reg", P, device))
    found = ggml("ggml_backend_reg_get_proc_address", P, registry, b"ggml_backend_dev_get_extra_bufts")
    types = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(found)(device)
    names = {}
    for place in range(8):
        if types[place] is None:
            break
        names[ggml("ggml_backend_buft_name", ctypes.c_char_p, P(types[place]))] = types[place]
    return int(names[b"CPU_REPACK"])


def copy(ggml: Ggml, name: str, tensor: P, array: np.ndarray[Any, Any]) -> None:
    """Between a tensor and an array of its size, by one of ggml_backend_tensor_set and _get."""
    ggml(name, None, tensor, P(array.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(array.nbytes))


def products(folder: Path, kind: str, length: int, rows: int, seed: int, most: int, alone: bool) -> str:
    """Digest of the products of a random matrix [rows, length] with 1 to `most` random rows."""
    ggml, rng = Ggml(folder), np.random.default_rng(seed)
    backend = ggml("ggml_backend_cpu_init", P)
    ggml("ggml_backend_cpu_set_n_threads", None, P(backend), ctypes.c_int(2))
    number = GGMLQuantizationType[kind]
    values = rng.standard_normal((rows, length), np.float32)
    block, size = GGML_QUANT_SIZES[number]
    blocks = np.empty(rows * length // block * size, np.uint8)
    sizes = P(blocks.ctypes.data), I(0), I(rows), I(length), None
    ggml("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(number), P(values.ctypes.data), *sizes)
    context = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
    matrix = P(ggml("ggml_new_tensor_2d", P, context, ctypes.c_int(number), I(length), I(rows)))
    where = repack_buffer_type(ggml, backend) if kind in REPACKED else ggml("ggml_backend_cpu_buffer_type", P)
    ggml("ggml_backend_alloc_ctx_tensors_from_buft", P, context, P(where))
    ggml(
        "ggml_backend_tensor_set",
        None,
        matrix,
        P(blocks.ctypes.data),
        ctypes.c_size_t(0),
        ctypes.c_size_t(blocks.nbytes),
    )

    def multiply(x: np.ndarray[Any, Any]) -> bytes:
        work = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
        left = P(ggml("ggml_new_tensor_2d", P, work, ctypes.c_int(F32), I(length), I(len(x))))
        result = P(ggml("ggml_mul_mat", P, work, matrix, left))
        graph = P(ggml("ggml_new_graph", P, work))
        ggml("ggml_build_forward_expand", None, graph, result)
        buffer = P(ggml("ggml_backend_alloc_ctx_tensors", P, work, P(backend)))
        copy(ggml, "ggml_backend_tensor_set", left, x)
        ggml("ggml_backend_graph_compute", ctypes.c_int, P(backend), graph)
        out = np.empty((len(x), rows), np.float32)
        ggml(
            "ggml_backend_tensor_get", None, result, P(out.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes)
        )
        ggml("ggml_backend_buffer_free", None, buffer)
        ggml("ggml_free", None, work)
        assert np.isfinite(out).all()
        return out.tobytes()

    x = rng.standard_normal((most, length), np.float32)
    total = hashlib.sha256()
    for n in range(1, len(x) + 1):
        for piece in [x[i : i + 1] for i in range(n)] if alone else [x[:n]]:
            total.update(multiply(np.ascontiguousarray(piece)))
    return total.hexdigest()


if __name__ == "__main__":
    libraries, name, *numbers, mode = sys.argv[1:]
    print(products(Path(libraries), name, *map(int, numbers), alone=mode == "alone"))
