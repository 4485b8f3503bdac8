"""Products of experts with the rows routed to them, by a given libggml: what tests/patches/test_kernels.py compares.

    python tests/mul_mat_id.py LIBRARIES TYPE LENGTH ROWS SEED MOST alone|batch

As tests/mul_mat.py, for rows that are sent to two of eight experts each, or twice to one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from mul_mat import Ggml, computed, counts, matrices, two_threads

EXPERTS, USED = 8, 2


def products(folder: Path, kind: str, alone: bool, length: int, rows: int, seed: int, most: int) -> str:
    """Digest of the products of random experts [EXPERTS, rows, length] with up to `most` random rows."""
    ggml, rng = Ggml(folder), np.random.default_rng(seed)
    backend = two_threads(ggml)
    values = rng.standard_normal((EXPERTS, rows, length), np.float32)
    experts = matrices(ggml, backend, kind, values)
    total = hashlib.sha256()
    for n in counts(most):
        x = rng.standard_normal((n, 1, length), np.float32)
        # most rows meet at a few experts, and some name one twice
        places = [rng.choice(EXPERTS, USED, p=[0.5, 0.38, *[0.02] * 6]) for _ in range(n)]
        ids = np.stack(places).astype(np.int32)
        for piece in [slice(i, i + 1) for i in range(n)] if alone else [slice(n)]:
            given = [x[piece].copy(), ids[piece].copy()]
            out = computed(ggml, backend, "ggml_mul_mat_id", experts, given, (len(ids[piece]), USED, rows))
            exact = np.einsum("nol,nurl->nur", x[piece], values[ids[piece]], optimize=True)
            assert np.std(out - exact, axis=-1).max() < 0.2 * length**0.5
            total.update(out.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    libraries, name, *numbers, mode = sys.argv[1:]
    print(products(Path(libraries), name, mode == "alone", *map(int, numbers)))
