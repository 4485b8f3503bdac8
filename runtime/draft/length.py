"""How many tokens may be drafted, and how many are where libllama cannot choose."""

from __future__ import annotations

from collections.abc import Mapping

FIXED = 3


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


class Fixed:
    """Chooses the first source that offers anything, and always the same length: for a libllama without ours.

    Args:
        most: longest draft.
    """

    def __init__(self, most: int) -> None:
        self.most = min(most, FIXED)

    def choose(self, offers: Mapping[str, tuple[int, bool]]) -> tuple[str, int]:
        """As `Chooses.choose`."""
        return next(((source, min(most, self.most)) for source, (most, _) in offers.items() if most > 0), ("", 0))

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """As `Chooses.observe`; nothing is learned."""
