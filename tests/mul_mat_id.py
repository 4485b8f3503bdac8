"""Products of experts with the rows routed to them, by a given libggml: what tests/test_kernels.py compares.

    python tests/mul_mat_id.py LIBRARIES TYPE LENGTH ROWS SEED MOST alone|batch

For 1 to MOST rows, each sent to two of eight experts, the products are made one row at a time (alone) or all at once
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
from mul_mat import CONTEXT, F32, REPACKED, Ggml, I, InitParams, P, copy, repack_buffer_type

I32 = 26  # of enum ggml_type
EXPERTS, USED = 8, 2


def products(folder: Path, kind: str, length: int, rows: int, seed: int, most: int, alone: bool) -> str:
    """Digest of the products of random experts [EXPERTS, rows, length] with 1 to `most` random rows."""
    ggml, rng = Ggml(folder), np.random.default_rng(seed)
    backend = ggml("ggml_backend_cpu_init", P)
    ggml("ggml_backend_cpu_set_n_threads", None, P(backend), ctypes.c_int(2))
    number = GGMLQuantizationType[kind]
    values = rng.standard_normal((EXPERTS * rows, length), np.float32)
    block, size = GGML_QUANT_SIZES[number]
    blocks = np.empty(values.size // block * size, np.uint8)
    sizes = P(blocks.ctypes.data), I(0), I(EXPERTS * rows), I(length), None
    ggml("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(number), P(values.ctypes.data), *sizes)
    context = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
    experts = P(ggml("ggml_new_tensor_3d", P, context, ctypes.c_int(number), I(length), I(rows), I(EXPERTS)))
    where = repack_buffer_type(ggml, backend) if kind in REPACKED else ggml("ggml_backend_cpu_buffer_type", P)
    ggml("ggml_backend_alloc_ctx_tensors_from_buft", P, context, P(where))
    copy(ggml, "ggml_backend_tensor_set", experts, blocks)

    def multiply(x: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> bytes:
        n = len(x)
        work = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
        left = P(ggml("ggml_new_tensor_3d", P, work, ctypes.c_int(F32), I(length), I(1), I(n)))
        chosen = P(ggml("ggml_new_tensor_2d", P, work, ctypes.c_int(I32), I(USED), I(n)))
        result = P(ggml("ggml_mul_mat_id", P, work, experts, left, chosen))
        graph = P(ggml("ggml_new_graph", P, work))
        ggml("ggml_build_forward_expand", None, graph, result)
        buffer = P(ggml("ggml_backend_alloc_ctx_tensors", P, work, P(backend)))
        copy(ggml, "ggml_backend_tensor_set", left, x)
        copy(ggml, "ggml_backend_tensor_set", chosen, ids)
        ggml("ggml_backend_graph_compute", ctypes.c_int, P(backend), graph)
        out = np.empty((n, USED, rows), np.float32)
        copy(ggml, "ggml_backend_tensor_get", result, out)
        exact = np.einsum("nl,nurl->nur", x, values.reshape(EXPERTS, rows, length)[ids], optimize=True)
        assert np.std(out - exact) < 0.2 * length**0.5
        ggml("ggml_backend_buffer_free", None, buffer)
        ggml("ggml_free", None, work)
        return out.tobytes()

    total = hashlib.sha256()
    for n in range(1, most + 1):
        x = rng.standard_normal((n, length), np.float32)
        # most rows meet at a few experts
        places = [rng.choice(EXPERTS, USED, replace=False, p=[0.5, 0.38, *[0.02] * 6]) for _ in range(n)]
        ids = np.stack(places).astype(np.int32)
        for piece in [slice(i, i + 1) for i in range(n)] if alone else [slice(None)]:
            total.update(multiply(x[piece].copy(), ids[piece].copy()))
    return total.hexdigest()


if __name__ == "__main__":
    libraries, name, *numbers, mode = sys.argv[1:]
    print(products(Path(libraries), name, *map(int, numbers), alone=mode == "alone"))
