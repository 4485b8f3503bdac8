"""Products with weights of F32, F16 or BF16 by a given libggml: what tests/patches/test_kernels.py compares.

    python tests/floats.py LIBRARIES CASE.npz RESULT.npy

CASE.npz holds w [..., columns, length] and x [..., rows, length] as float32, the weights' `type` by name, and `runs`
[runs, 2]: threads, and rows of a call. With `ids` [rows, used], w are experts, x is [rows, 1 or used, length]. The
result is [runs, ..., rows, columns], or [runs, rows, used, columns]. GGML_SMALL_BATCH_ROWS=0 in the environment leaves
our kernels out.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mul_mat import Ggml, P, computed, matrices

Array = np.ndarray[Any, Any]


def products(ggml: Ggml, case: dict[str, Array], threads: int, together: int) -> Array:
    """All products of a case, `together` rows at a time."""
    backend = int(ggml("ggml_backend_cpu_init", P))
    ggml("ggml_backend_cpu_set_n_threads", None, P(backend), ctypes.c_int(threads))
    x, ids = case["x"], case.get("ids")
    weights = matrices(ggml, backend, str(case["type"]), case["w"])
    axis, columns, found = -2 if ids is None else 0, case["w"].shape[-2], []
    for start in range(0, x.shape[axis], together):
        part = slice(start, start + together)
        if ids is None:
            given = [np.ascontiguousarray(x[..., part, :])]
            shape, operation = (*given[0].shape[:-1], columns), "ggml_mul_mat"
        else:
            given = [x[part].copy(), ids[part].copy()]
            shape, operation = (*given[1].shape, columns), "ggml_mul_mat_id"
        found.append(computed(ggml, backend, operation, weights, given, shape))
    ggml("ggml_backend_free", None, P(backend))
    return np.concatenate(found, axis)


if __name__ == "__main__":
    libraries, path, result = sys.argv[1:]
    library, case = Ggml(Path(libraries)), dict(np.load(path))
    np.save(result, [products(library, case, *map(int, run)) for run in case["runs"]])
