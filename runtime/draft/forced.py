"""Drafts from the grammar: tokens that it leaves no choice about."""

from __future__ import annotations

from gemma_mtp.runtime.draft.source import Draft, Place, Source


class FromGrammar(Source):
    """While the grammar allows a single token, that token is certain."""

    NAME = "grammar"

    def propose(self, place: Place, draft: Draft, room: int) -> None:
        """Adds the forced tokens at once."""
        mask = place.sampler.mask
        if mask is None:
            return
        for _ in range(room):
            if (forced := mask.forced()) is None:
                return
            draft.add(forced, self.NAME)
            place.sampler.accept(forced)
