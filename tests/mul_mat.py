"""Products of a quantized matrix with rows of activations, by a given libggml, for tests/patches/test_kernels.py.

    python tests/mul_mat.py LIBRARIES TYPE LENGTH ROWS SEED MOST alone|batch [RESULTS.npy]

The products with the first rows of activations are made for several numbers of rows up to MOST, one row at a time
(alone) or all at once (batch); prints the SHA-256 of all results, and keeps those of all rows. GGML_SMALL_BATCH_ROWS=0
in the environment leaves our kernels out.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# The letters of a signature.
P: TypeAlias = ctypes.c_void_p
I: TypeAlias = ctypes.c_int64  # noqa: E741
REPACKED = ("Q4_0", "Q4_K")
# enum ggml_type, and bytes that a context of ten tensors and a graph needs at most
F32, I32, CONTEXT = 0, 26, 1 << 20


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


def matrices(ggml: Ggml, backend: int, kind: str, values: np.ndarray[Any, Any]) -> P:
    """Weights quantized to a type, where llama.cpp would put them; `values` is [..., rows, length]."""
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    blocks = np.empty(values.size // block * size, np.uint8)
    length = values.shape[-1]
    sizes = P(blocks.ctypes.data), I(0), I(values.size // length), I(length), None
    ggml("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(number), P(values.ctypes.data), *sizes)
    context = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
    tensor = new_tensor(ggml, context, number, values.shape)
    where = repack_buffer_type(ggml, backend) if kind in REPACKED else ggml("ggml_backend_cpu_buffer_type", P)
    ggml("ggml_backend_alloc_ctx_tensors_from_buft", P, context, P(where))
    copy(ggml, "ggml_backend_tensor_set", tensor, blocks)
    return tensor


def new_tensor(ggml: Ggml, context: P, number: int, shape: tuple[int, ...]) -> P:
    """A tensor of a type; the shape as numpy has it."""
    lengths = (I * len(shape))(*reversed(shape))
    return P(ggml("ggml_new_tensor", P, context, ctypes.c_int(number), ctypes.c_int(len(shape)), lengths))


def computed(
    ggml: Ggml, backend: int, operation: str, weights: P, given: list[np.ndarray[Any, Any]], shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The result, F32 of a shape, of an operation on weights and what is given (F32 or I32)."""
    work = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
    inputs = [new_tensor(ggml, work, I32 if x.dtype == np.int32 else F32, x.shape) for x in given]
    result = P(ggml(operation, P, work, weights, *inputs))
    graph = P(ggml("ggml_new_graph", P, work))
    ggml("ggml_build_forward_expand", None, graph, result)
    buffer = P(ggml("ggml_backend_alloc_ctx_tensors", P, work, P(backend)))
    for tensor, x in zip(inputs, given, strict=True):
        copy(ggml, "ggml_backend_tensor_set", tensor, x)
    ggml("ggml_backend_graph_compute", ctypes.c_int, P(backend), graph)
    out = np.empty(shape, np.float32)
    copy(ggml, "ggml_backend_tensor_get", result, out)
    ggml("ggml_backend_buffer_free", None, buffer)
    ggml("ggml_free", None, work)
    return out


def two_threads(ggml: Ggml) -> int:
    """A CPU backend."""
    backend = int(ggml("ggml_backend_cpu_init", P))
    ggml("ggml_backend_cpu_set_n_threads", None, P(backend), ctypes.c_int(2))
    return backend


def counts(most: int) -> list[int]:
    """Numbers of rows: every small one, and some of those between which kernels change."""
    return [*range(1, min(most, 20) + 1), *(n for n in (33, 48, 64, 80, 127, 257, 600) if n <= most)]


def products(
    folder: Path, kind: str, alone: bool, length: int, rows: int, seed: int, most: int
) -> tuple[str, np.ndarray[Any, Any]]:
    """Digest of the products of a random matrix [rows, length] with up to `most` random rows, and those of all rows."""
    ggml, rng = Ggml(folder), np.random.default_rng(seed)
    backend = two_threads(ggml)
    matrix = matrices(ggml, backend, kind, rng.standard_normal((rows, length), np.float32))
    x = rng.standard_normal((most, length), np.float32)

    def product(piece: slice) -> np.ndarray[Any, Any]:
        return computed(ggml, backend, "ggml_mul_mat", matrix, [x[piece].copy()], (len(x[piece]), rows))

    single = np.concatenate([product(slice(i, i + 1)) for i in range(most)]) if alone else None
    total = hashlib.sha256()
    for n in counts(most):
        out = product(slice(n)) if single is None else single[:n]
        assert np.isfinite(out).all()
        total.update(out.tobytes())
    return total.hexdigest(), out


if __name__ == "__main__":
    libraries, name, *numbers, mode = sys.argv[1:8]
    digest, results = products(Path(libraries), name, mode == "alone", *map(int, numbers))
    if sys.argv[8:]:
        np.save(sys.argv[8], results)
    print(digest)
