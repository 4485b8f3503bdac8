"""How many tokens to draft next."""

from __future__ import annotations


def fitting(wanted: int, n_past: int, n_ctx: int, n_batch: int) -> int:
    """The wanted draft length, cut to what the target can verify.

    A round decodes the last token and the draft in one batch, at positions n_past to n_past + length.

    Args:
        wanted: draft length asked for.
        n_past: tokens in the KV cache.
        n_ctx: cells of the KV cache.
        n_batch: tokens one decode may hold.

    Returns:
        A length between 0 and `wanted`.
    """
    return max(0, min(wanted, n_ctx - n_past - 1, n_batch - 1))
