"""Drafts from the grammar: tokens that it leaves no choice about."""

from __future__ import annotations

from gemma_mtp.runtime.draft.source import Draft, DraftSource, Start


class FromGrammar(DraftSource):
    """While the grammar allows a single token, that token is certain."""

    NAME = "grammar"

    def propose(self, start: Start, draft: Draft, room: int) -> None:
        """Adds the forced tokens at once."""
        mask = start.sampler.mask
        if mask is None:
            return
        for _ in range(room):
            if (forced := mask.forced()) is None:
                return
            draft.add(forced, self.NAME)
            start.sampler.accept(forced)
