"""The drafts of a request: which sources are asked, which of them is taken, and what is learned from the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import Costs
from gemma_mtp.runtime.draft.drafter import Drafter, DraftSettings, FromDrafter
from gemma_mtp.runtime.draft.forced import FromGrammar
from gemma_mtp.runtime.draft.length import fitting
from gemma_mtp.runtime.draft.lookup import FromText
from gemma_mtp.runtime.draft.policy import Chooses
from gemma_mtp.runtime.draft.source import Draft, DraftSource, Proposal, Start
from gemma_mtp.runtime.request import MOST, DraftLength
from gemma_mtp.runtime.sampling import Sampler
from gemma_mtp.runtime.target import Target


def sources(
    target: Target, drafter: Drafter, costs: Costs, settings: DraftSettings | None, length: DraftLength
) -> list[DraftSource]:
    """The sources of a request, in the order in which they are asked.

    Args:
        target: whose tokens are guessed.
        drafter: its drafter.
        costs: where draft steps are noted.
        settings: how the request chooses, if that is a matter of logits and position alone.
        length: with a fixed length the drafter drafts, and the text is not looked at; nor where libllama cannot.
    """
    found: list[DraftSource] = [FromGrammar(), FromDrafter(target, drafter, costs, settings)]
    return [*found, FromText(target)] if length == "auto" and native.choices() is not None else found


@dataclass(frozen=True)
class Offered:
    """What could be drafted: what is certain stands in the draft already.

    Attributes:
        draft: to be added to.
        offers: of the sources, by what their acceptance is remembered under.
    """

    draft: Draft
    offers: dict[str, Proposal]

    def lengths(self) -> dict[str, tuple[int, bool]]:
        """For each the longest draft it can give now, and whether its tokens are free."""
        return {kind: (offer.most, offer.free) for kind, offer in self.offers.items()}

    def take(self, kind: str, length: int) -> Draft:
        """The draft with so many tokens of one of them, none with length 0."""
        clock = perf_counter()
        self.draft.kind = kind
        if length:
            self.offers[kind].take(length)
        self.draft.seconds += perf_counter() - clock
        return self.draft


class Proposals:
    """Makes the drafts of one request, and learns from what became of them.

    Args:
        target: whose tokens are guessed.
        sampler: chooses the target's tokens; forked for drafts.
        sources: what is asked, in this order; none for a request without drafts.
        length: tokens per draft, `MOST` at most, or "auto" to go by cost and acceptance.
        policy: what is known of both.
        costs: where target passes are noted.
    """

    def __init__(
        self,
        target: Target,
        sampler: Sampler,
        sources: Sequence[DraftSource],
        length: DraftLength,
        policy: Chooses,
        costs: Costs,
    ) -> None:
        self._target, self._sampler, self._sources, self._policy, self._costs = target, sampler, sources, policy, costs
        self._length = length
        self._most = min(MOST, policy.most if length == "auto" else length)

    def make(self, token: int, row: int) -> Draft:
        """A draft of what follows `token`, which is not decoded yet.

        Args:
            token: the last token of the sequence.
            row: batch row of the token before it.
        """
        offered = self.offered(token, row, self._most)
        return offered.take(*self._choose(offered))

    def offered(self, token: int, row: int, most: int) -> Offered:
        """What the sources offer to follow `token`; as `make`.

        Args:
            token: the last token of the sequence.
            row: batch row of the token before it.
            most: tokens that are wanted at most.
        """
        draft = Draft()
        if not self._sources:
            return Offered(draft, {})
        clock = perf_counter()
        room = fitting(min(most, self._most), self._target.n_tokens, self._target.n_ctx(), self._target.n_batch)
        start = Start(token, row, self._sampler.fork())
        offers: dict[str, Proposal] = {}
        for source in self._sources:
            proposal = source.propose(start, draft, room - len(draft.tokens))
            if proposal is not None:
                offers[proposal.kind] = proposal
        draft.seconds = perf_counter() - clock
        return Offered(draft, offers)

    def learn(self, draft: Draft, accepted: int, made: int, pass_seconds: float) -> None:
        """Note how a round went.

        Args:
            draft: what was proposed.
            accepted: how many of its first tokens the target chose as well.
            made: tokens that the round gave.
            pass_seconds: time of the target's pass.
        """
        self._costs.observe(len(draft.tokens) + 1, pass_seconds)
        self.outcome(draft, accepted, made)

    def outcome(self, draft: Draft, accepted: int, made: int) -> None:
        """As `learn`, without what the pass took."""
        for source in self._sources:
            source.learn(draft, accepted)
        forced = draft.sources.count(FromGrammar.NAME)
        if accepted >= forced:
            self._policy.observe(draft.kind, len(draft.tokens) - forced, accepted - forced, made)

    def _choose(self, offered: Offered) -> tuple[str, int]:
        """Kind and length of what is taken."""
        if self._length != "auto" or not self._sources:
            return next(((kind, offer.most) for kind, offer in offered.offers.items()), ("", 0))
        return self._policy.choose(offered.lengths())
