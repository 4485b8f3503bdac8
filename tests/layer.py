"""What a layer is made of beside matrix products and attention, by a given libggml, for tests/patches/test_kernels.py.

    python tests/layer.py LIBRARIES SEED

Each operation is done for one row (a token's) at a time by one thread, and for many rows by 1, 2, 3 and 16 threads.
Prints the names of all, and of those of which some row differs in a bit.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attention import quantized
from mul_mat import CONTEXT, F32, I32, Ggml, I, InitParams, P, copy

F16, I64, NEOX = 1, 27, 2
WIDTH, HEADS, EXPERTS, KEYS = 1536, 8, 128, 416
LEAST = 40  # rows that are done alone
Array = np.ndarray[Any, Any]


class Graph:
    """An operation on rows: `self.rows(...)` are the inputs of the rows at hand, `self(...)` a function of ggml."""

    def __init__(self, ggml: Ggml, chosen: Array) -> None:
        self.ggml, self.chosen = ggml, chosen
        self.context = P(ggml("ggml_init", P, InitParams(CONTEXT, None, True)))
        self.inputs: list[tuple[P, Array]] = []

    def tensor(self, values: Array, kind: int = F32) -> P:
        shape = (I * values.ndim)(*reversed(values.shape))
        size = ctypes.c_int(values.ndim)
        tensor = P(self.ggml("ggml_new_tensor", P, self.context, ctypes.c_int(kind), size, shape))
        whole = values if values.dtype.kind == "i" else quantized(self.ggml, values, kind)
        self.inputs.append((tensor, np.ascontiguousarray(whole)))
        return tensor

    def rows(self, values: Array, kind: int = F32) -> P:
        return self.tensor(values[self.chosen % len(values)], kind)

    def __call__(self, name: str, *arguments: Any) -> P:
        kinds = {int: ctypes.c_int, float: ctypes.c_float}
        typed = [kinds[type(value)](value) if type(value) in kinds else value for value in arguments]
        return P(self.ggml(f"ggml_{name}", P, self.context, *typed))

    def compute(self, result: P, threads: int) -> bytes:
        ggml = self.ggml
        backend = P(ggml("ggml_backend_cpu_init", P))
        ggml("ggml_backend_cpu_set_n_threads", None, backend, ctypes.c_int(threads))
        graph = P(ggml("ggml_new_graph", P, self.context))
        ggml("ggml_build_forward_expand", None, graph, result)
        buffer = P(ggml("ggml_backend_alloc_ctx_tensors", P, self.context, backend))
        for tensor, values in self.inputs:
            copy(ggml, "ggml_backend_tensor_set", tensor, values)
        ggml("ggml_backend_graph_compute", ctypes.c_int, backend, graph)
        out = np.empty(ggml("ggml_nbytes", ctypes.c_size_t, result), np.uint8)
        copy(ggml, "ggml_backend_tensor_get", result, out)
        ggml("ggml_backend_buffer_free", None, buffer)
        ggml("ggml_free", None, self.context)
        ggml("ggml_backend_free", None, backend)
        return out.tobytes()


def operations(rng: np.random.Generator) -> dict[str, Callable[[Graph], P]]:
    """By name; each makes [rows, ...] of the rows of a graph."""

    def values(*shape: int, size: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    x, y, weight, heads = values(LEAST, WIDTH, size=3), values(LEAST, WIDTH), values(WIDTH), values(LEAST, HEADS, 256)
    routed, scores = values(LEAST, EXPERTS), values(LEAST, HEADS, KEYS, size=4)
    mask = np.where(rng.random((LEAST, 1, KEYS)) < 0.7, 0, -np.inf)
    places, ids = np.arange(1000, 1000 + LEAST, dtype=np.int32), rng.integers(0, 300, LEAST).astype(np.int32)
    factors, table = np.exp(values(128)), values(300, WIDTH)

    def rope(g: Graph, factors: P | None) -> P:
        yarn = (0.0, 1.0, 32.0, 1.0)
        return g("rope_ext", g.rows(heads), g.rows(places, I32), factors, 256, NEOX, 131072, 1e6, 1.0, *yarn)

    def soft_max(g: Graph, kind: int) -> P:
        seen = g.rows(mask.astype(np.float16 if kind == F16 else np.float32), kind)
        # [keys, heads, rows] as [keys, rows, heads], and back
        turned = g("cont", g("permute", g.rows(scores), 0, 2, 1, 3))
        found = g("soft_max_ext", turned, g("permute", seen, 0, 2, 1, 3), 1.0, 0.0)
        return g("cont", g("permute", found, 0, 2, 1, 3))

    def stored(g: Graph, kind: int) -> P:
        # each row alone into its own cell, read again as floats
        cells = g.tensor(np.zeros((len(g.chosen), WIDTH), np.float32), kind)
        written = g("set_rows", cells, g.rows(y), g.tensor(np.arange(len(g.chosen), dtype=np.int64), I64))
        return g("get_rows", written, g.tensor(np.arange(len(g.chosen), dtype=np.int32), I32))

    def router(g: Graph) -> P:
        chances = g("soft_max", g.rows(routed))
        best = g("argsort_top_k", chances, 8)
        column = g("reshape_3d", chances, I(1), I(EXPERTS), I(len(g.chosen)))
        weights = g("reshape_2d", g("get_rows", column, best), I(8), I(len(g.chosen)))
        return g("div", weights, g("clamp", g("sum_rows", weights), 6e-5, float("inf")))

    found = {
        "rms_norm": lambda g: g("rms_norm", g.rows(x), 1e-6),
        "rms_norm, mul": lambda g: g("mul", g("rms_norm", g.rows(x), 1e-6), g.tensor(weight)),
        "rms_norm of heads": lambda g: g("rms_norm", g.rows(heads), 1e-6),
        "rope": lambda g: rope(g, None),
        "rope with factors": lambda g: rope(g, g.tensor(factors)),
        "gelu": lambda g: g("gelu", g.rows(x)),
        "geglu": lambda g: g("geglu_split", g.rows(x), g.rows(y)),
        "softcap": lambda g: g("scale", g("tanh", g("scale", g.rows(x), 1 / 30)), 30.0),
        "add": lambda g: g("add", g.rows(x), g.rows(y)),
        "mul of a number": lambda g: g("mul", g.rows(x), g.tensor(weight[:1])),
        "soft_max": lambda g: g("soft_max", g.rows(routed)),
        "soft_max, mask F16": lambda g: soft_max(g, F16),
        "soft_max, mask F32": lambda g: soft_max(g, F32),
        "router": router,
        "top_k": lambda g: g("cont", g("argsort_top_k", g.rows(routed), 8)),
        "concat": lambda g: g("concat", g.rows(x), g.rows(y), 0),
    }  # fmt: skip

    def looked_up(g: Graph, kind: int) -> P:
        return g("get_rows", g.tensor(table, kind), g.rows(ids, I32))

    for name, kind in {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_0": 2, "Q4_K": 12, "Q6_K": 14}.items():
        found[f"get_rows {name}"] = partial(looked_up, kind=kind)
        if kind in (0, 1, 30, 8, 2):
            found[f"set_rows {name}"] = partial(stored, kind=kind)
    return found


def main(folder: Path, seed: int) -> dict[str, list[str]]:
    ggml, different = Ggml(folder), []
    every = operations(np.random.default_rng(seed))
    for name, operation in every.items():

        def done(chosen: Array, threads: int, operation: Callable[[Graph], P] = operation) -> bytes:
            graph = Graph(ggml, chosen)
            return graph.compute(operation(graph), threads)

        alone = [done(np.array([row]), 1) for row in range(LEAST)]
        for rows, threads in [(LEAST, 1), (LEAST, 2), (2, 2), (17, 3), (600, 3), (33, 16)]:
            chosen = np.arange(rows)
            if done(chosen, threads) != b"".join(alone[row % LEAST] for row in chosen):
                different.append(f"{name}: {rows} rows, {threads} threads")
    return {"all": list(every), "different": different}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
