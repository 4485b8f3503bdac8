"""The drafts of a request: from the drafter, from the text itself, or forced by the grammar."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.draft.drafter import DraftSettings
from gemma_mtp.runtime.draft.length import Policy, fitting
from gemma_mtp.runtime.draft.lookup import Lookup
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.request import MOST, DraftLength
from gemma_mtp.runtime.sampling import NoTokenLeft, Sampler
from llama_cpp import llama_cpp as lib

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama

MTP, LOOKUP, GRAMMAR = "mtp", "lookup", "grammar"


@dataclass
class Draft:
    """Proposed tokens.

    Attributes:
        tokens: token ids.
        sources: where each came from: "mtp", "lookup" or "grammar".
        kind: what the policy chose it as; empty for no draft of its choosing.
        seconds: what making it took.
        steps: passes of the drafter.
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    kind: str = ""
    seconds: float = 0.0
    steps: int = 0

    def add(self, token: int, source: str) -> None:
        """Append a token."""
        self.tokens.append(token)
        self.sources.append(source)


class EndOfDraft(Exception):
    """Raised by a choice in mid-draft: there is no use in drafting on."""


class Drafts:
    """Makes the drafts of one request, and learns from what became of them.

    Args:
        llm: the target, with or without a drafter.
        sampler: chooses the target's tokens; forked for drafts.
        length: tokens per draft, `MOST` at most, or "auto" to go by cost and acceptance.
        policy: what is known of both.
        costs: where passes and draft steps are noted.
        settings: how `sampler` chooses, if that is a matter of logits and position alone: a round is one call then.
    """

    def __init__(
        self,
        llm: Llama,
        sampler: Sampler,
        length: DraftLength,
        policy: Policy,
        costs: Costs,
        settings: DraftSettings | None = None,
    ) -> None:
        self._llm, self._sampler, self._policy, self._costs = llm, sampler, policy, costs
        self._settings = settings if sampler.plain and native.drafts_rounds() else None
        self._length = length
        self._most = min(MOST, policy.most if length == "auto" else length)
        self._lookup = Lookup() if length == "auto" and llm.drafter else None
        self._read = 0

    def make(self, token: int, row: int) -> Draft:
        """A draft of what follows `token`, which is not decoded yet.

        Args:
            token: the last token of the sequence.
            row: batch row of the token before it.
        """
        llm = self._llm
        room = fitting(self._most, llm.n_tokens, llm.n_ctx(), llm.n_batch)
        if llm.drafter is None or room < 1:
            return Draft()
        clock = perf_counter()
        draft, sampler = Draft(), self._sampler.fork()
        while sampler.mask and len(draft.tokens) < room and (forced := sampler.mask.forced()) is not None:
            draft.add(forced, GRAMMAR)
            sampler.accept(forced)
        found = self._found(token, room) if not draft.tokens else ([], 0)
        draft.kind, length = self._plan(found, room - len(draft.tokens))
        if draft.kind == MTP and length:
            self._draft_on(draft, token, llm.hidden(row), length, sampler)
        elif length:
            self._copy(draft, found[0][:length], sampler)
        draft.seconds = perf_counter() - clock
        return draft

    def learn(self, draft: Draft, accepted: int, made: int, pass_seconds: float) -> None:
        """Note how a round went.

        Args:
            draft: what was proposed.
            accepted: how many of its first tokens the target chose as well.
            made: tokens that the round gave.
            pass_seconds: time of the target's pass.
        """
        self._costs.observe(len(draft.tokens) + 1, pass_seconds)
        own = [source for source in draft.sources if source != GRAMMAR]
        forced = len(draft.sources) - len(own)
        if draft.steps:
            self._costs.observe(STEP, draft.seconds / draft.steps)
        if accepted >= forced:
            self._policy.observe(draft.kind, len(own), accepted - forced, made)

    def _found(self, token: int, room: int) -> tuple[list[int], int]:
        """What stood after the latest tokens before."""
        if self._lookup is None:
            return [], 0
        self._lookup.extend(self._llm.input_ids[self._read : self._llm.n_tokens].tolist())
        self._lookup.extend([token])
        self._read = self._llm.n_tokens + 1
        return self._lookup.find(room)

    def _plan(self, found: tuple[list[int], int], room: int) -> tuple[str, int]:
        """Source and length of the next draft."""
        if self._length != "auto":
            return MTP, room
        offers = {MTP: (room, False)}
        if found[0]:
            offers[f"{LOOKUP} {matched_class(found[1])}"] = (len(found[0]), True)
        return self._policy.choose(offers)

    def _copy(self, draft: Draft, tokens: list[int], sampler: Sampler) -> None:
        """Take tokens over, as far as the grammar allows."""
        for token in tokens:
            if sampler.mask is not None:
                if not sampler.mask.allows(np.array([token], dtype=np.int32))[0]:
                    return
                sampler.mask.accept(token)
            draft.add(token, LOOKUP)

    def _draft_on(self, draft: Draft, token: int, hidden: Floats, length: int, sampler: Sampler) -> None:
        """Run the drafter; it reads forced tokens before it goes on from them, so that its hidden row is theirs."""
        forced = list(draft.tokens)
        vocab = self._llm._model.vocab

        def choose(logits: Floats, position: int) -> int:
            draft.steps += 1
            if draft.steps <= len(forced):
                return forced[draft.steps - 1]
            try:
                made = sampler(logits, position)
            except NoTokenLeft:
                raise EndOfDraft from None
            draft.add(made, MTP)
            if lib.llama_vocab_is_eog(vocab, made):
                raise EndOfDraft
            return made

        drafter = self._llm.drafter
        assert drafter is not None
        if self._settings is not None and not forced:
            for made in drafter.draft(token, hidden, self._llm.n_tokens, length, self._settings):
                draft.steps += 1
                draft.add(made, MTP)
            return
        with suppress(EndOfDraft):
            drafter.draft(token, hidden, self._llm.n_tokens, len(forced) + length, choose)


def matched_class(matched: int) -> int:
    """Length of an agreement, rounded down to a power of two: how far a copy can be trusted grows with it."""
    return 1 << int(math.log2(matched))
