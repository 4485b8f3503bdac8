"""Activations of rows of float32 by a given libggml: what tests/patches/test_kernels.py compares.

    python tests/activations.py LIBRARIES tanh|gelu|geglu X.npy RESULT.npy

X.npy is [rows, width]; for geglu the gate is all ones plus the row's number. GGML's graph runs with two threads.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mul_mat import CONTEXT, F32, Ggml, I, InitParams, P, copy


def activate(folder: Path, name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The activation of rows, as float32."""
    ggml = Ggml(folder)
    backend = P(ggml("ggml_backend_cpu_init", P))
    ggml("ggml_backend_cpu_set_n_threads", None, backend, ctypes.c_int(2))
    context = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
    arrays = [x, np.repeat(np.arange(1, len(x) + 1, dtype=np.float32)[:, None], x.shape[1], axis=1)]
    arrays = arrays[: 2 if name == "geglu" else 1]
    inputs = [P(ggml("ggml_new_tensor_2d", P, context, ctypes.c_int(F32), *map(I, reversed(x.shape)))) for _ in arrays]
    result = P(ggml(f"ggml_{name}{'_split' if name == 'geglu' else ''}", P, context, *inputs))
    graph = P(ggml("ggml_new_graph", P, context))
    ggml("ggml_build_forward_expand", None, graph, result)
    ggml("ggml_backend_alloc_ctx_tensors", P, context, backend)
    for tensor, array in zip(inputs, arrays, strict=True):
        copy(ggml, "ggml_backend_tensor_set", tensor, array)
    ggml("ggml_backend_graph_compute", ctypes.c_int, backend, graph)
    out = np.empty_like(x)
    copy(ggml, "ggml_backend_tensor_get", result, out)
    return out


if __name__ == "__main__":
    libraries, name, values, result = sys.argv[1:]
    np.save(result, activate(Path(libraries), name, np.load(values)))
