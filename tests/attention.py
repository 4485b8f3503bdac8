"""Flash attention by a given libggml: what tests/patches/test_kernels.py compares.

    python tests/attention.py LIBRARIES CASE.npz RESULT.npy [TIMES]

CASE.npz holds q [queries, heads, width], k and v [keys, KV heads, width] as float32, mask [queries, keys], the scalars
`type` (of K and V, a number of ggml's) and `scale`, and `runs` [runs, 2]: threads, and queries of a call. The result is
[runs, queries, heads, width]. With TIMES the median time of a call is printed for each run, in microseconds.
GGML_SMALL_BATCH_ROWS=0 in the environment leaves our kernels out.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from mul_mat import CONTEXT, F32, Ggml, I, InitParams, P, copy

F16 = 1
Array = np.ndarray[Any, Any]


def attend(ggml: Ggml, case: dict[str, Array], times: int, threads: int, together: int) -> tuple[Array, float]:
    """The attention of a case, `together` queries at a time; and the median time of a call in microseconds."""
    backend = P(ggml("ggml_backend_cpu_init", P))
    ggml("ggml_backend_cpu_set_n_threads", None, backend, ctypes.c_int(threads))
    queries = len(case["q"])
    results, taken = [], []
    for start in range(0, queries, together):
        part = slice(start, start + together)
        context = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))

        def tensor(array: Array, kind: int, context: P = context) -> P:
            shape = (I * 3)(*reversed(array.shape))
            return P(ggml("ggml_new_tensor", P, context, ctypes.c_int(kind), ctypes.c_int(3), shape))

        kind = int(case["type"])
        q, mask = case["q"][part], case["mask"][None, part].astype(np.float16)
        inputs = [(q, F32), (case["k"], kind), (case["v"], kind), (mask, F16)]
        tensors = [tensor(*pair) for pair in inputs]
        # [width, heads, tokens] as llama.cpp lays them out, seen as [width, tokens, heads]
        seen = [P(ggml("ggml_permute", P, context, t, *map(ctypes.c_int, (0, 2, 1, 3)))) for t in tensors[:3]]
        scalars = [ctypes.c_float(x) for x in (float(case["scale"]), 0.0, 0.0)]
        result = P(ggml("ggml_flash_attn_ext", P, context, *seen, tensors[3], *scalars))
        graph = P(ggml("ggml_new_graph", P, context))
        ggml("ggml_build_forward_expand", None, graph, result)
        buffer = P(ggml("ggml_backend_alloc_ctx_tensors", P, context, backend))
        for (array, kind), t in zip(inputs, tensors, strict=True):
            copy(ggml, "ggml_backend_tensor_set", t, quantized(ggml, array, kind))
        for _ in range(max(times, 1)):
            began = time.perf_counter()
            ggml("ggml_backend_graph_compute", ctypes.c_int, backend, graph)
            taken.append(time.perf_counter() - began)
        out = np.empty(q.shape, np.float32)
        copy(ggml, "ggml_backend_tensor_get", result, out)
        results.append(out)
        ggml("ggml_backend_buffer_free", None, buffer)
        ggml("ggml_free", None, context)
    ggml("ggml_backend_free", None, backend)
    return np.concatenate(results), median(taken) * 1e6


def quantized(ggml: Ggml, array: Array, kind: int) -> Array:
    """float32 rows as blocks of a ggml type."""
    if kind == F32 or array.dtype == np.float16:
        return np.ascontiguousarray(array)
    width = array.shape[-1]
    size = ggml("ggml_row_size", ctypes.c_size_t, ctypes.c_int(kind), I(width)) * (array.size // width)
    blocks, values = np.empty(size, np.uint8), np.ascontiguousarray(array)
    places = P(values.ctypes.data), P(blocks.ctypes.data), I(0), I(array.size // width), I(width), None
    ggml("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(kind), *places)
    return blocks


if __name__ == "__main__":
    libraries, path, result, *times = sys.argv[1:]
    library, case = Ggml(Path(libraries)), dict(np.load(path))
    runs = [attend(library, case, int(times[0]) if times else 0, *map(int, run)) for run in case["runs"]]
    np.save(result, [found for found, _ in runs])
    if times:
        print(*[round(microseconds) for _, microseconds in runs])
