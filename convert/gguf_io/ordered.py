"""The ordered head of small drafters as metadata: its keys, and the rules that its tables keep.

Tokens lie in clusters of equal size. A draft step looks at the centroid of each and reads the rows of the best few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KEY_CENTROIDS = "mtp.ordered.centroids"
KEY_ORDERING = "mtp.ordered.token_ordering"
KEY_N_CENTROIDS = "mtp.ordered.n_centroids"
KEY_TOP_K = "mtp.ordered.top_k"


class Broken(NamedTuple):
    """A rule that is not kept: the key, what it holds, what was wanted."""

    key: str
    got: Any
    wanted: str


def broken_sizes(n_tokens: int, n_centroids: Any, top_k: Any) -> Iterator[Broken]:
    """Rules for the numbers of clusters: they are of equal size, and some of them are read."""
    if not isinstance(n_centroids, int) or n_centroids < 1 or n_tokens % n_centroids:
        yield Broken(KEY_N_CENTROIDS, n_centroids, f"a divisor of {n_tokens}, the number of tokens")
    elif not isinstance(top_k, int) or not 1 <= top_k <= n_centroids:
        yield Broken(KEY_TOP_K, top_k, f"1 to {n_centroids}")


def broken_tables(
    centroids: Any, ordering: Any, n_tokens: int, n_centroids: int, width: int, wide: bool = False
) -> Iterator[Broken]:
    """Rules for the tables themselves.

    Args:
        centroids: should be float32, [n_centroids * width].
        ordering: should be token ids, [n_tokens], as int32.
        n_tokens: how many tokens lie in clusters: all, or those before the ones that were added after the training.
        n_centroids: number of clusters.
        width: hidden size of the drafter.
        wide: whether token ids may be int64, as checkpoints have them.
    """
    fits = isinstance(centroids, np.ndarray) and centroids.dtype == np.float32 and len(centroids) == n_centroids * width
    if not fits or not bool(np.isfinite(centroids).all()):
        yield Broken(KEY_CENTROIDS, centroids, f"{n_centroids} x {width} finite float32 values")
    kinds = (np.int32, np.int64) if wide else (np.int32,)
    fits = isinstance(ordering, np.ndarray) and ordering.dtype in kinds
    if not fits or not np.array_equal(np.sort(ordering), np.arange(n_tokens)):
        yield Broken(KEY_ORDERING, ordering, f"every token from 0 to {n_tokens - 1} once, as int32")


def quoted(value: Any) -> str:
    """What a key holds, in one line of an error."""
    text = repr(value)
    return text if len(text) < 60 else text[:60].replace("\n", " ") + "..."
