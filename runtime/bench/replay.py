"""Drafts with a known chance of acceptance: the real drafter runs, and a recorded continuation takes its place.

And the clocks of such a run, with its end: `watched`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import isfunction
from statistics import harmonic_mean
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gemma_mtp.runtime.bench.settings import Chance
from gemma_mtp.runtime.draft import proposals
from gemma_mtp.runtime.draft.lookup import Lookup
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import Choose
from llama_cpp import llama_cpp as lib

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama

GOLDEN = (math.sqrt(5) - 1) / 2
SURE = 1e4  # a logit that no other comes near


class Enough(Exception):
    """As many tokens as asked for have been generated; raised between two rounds."""


def expected_tokens(chance: Chance | None, length: int) -> float:
    """Tokens a round of `length` drafted tokens brings on average when each is accepted with this chance; 1 for None.

    Leviathan et al., arXiv 2211.17192, equation 1: 1 + p + ... + p^length. Of chances that take turns, the harmonic
    mean: each lasts for equally many tokens.
    """
    if chance is None:
        return 1.0
    return harmonic_mean(sum(level**place for place in range(length + 1)) for level in chance.levels)


class Replay:
    """Stands in for a drafter: runs it, pays for it, throws its tokens away and proposes recorded ones.

    In each round the first `n` tokens are those of the record and the rest are wrong, where n is at least k with chance
    p^k, as if each token were right with chance p. The random numbers are multiples of the golden ratio, spread evenly:
    the share accepted is near p after a few dozen rounds.

    Args:
        drafter: the drafter of an open pair; other attributes are passed through to it.
        record: the whole sequence, prompt first.
        chance: p, or None to propose what the drafter does.
        seed: where the random numbers begin.
        begin: position that turns of `chance` are counted from.

    Attributes:
        seconds: time spent in the drafter.
    """

    def __init__(self, drafter: Any, record: Sequence[int], chance: Chance | None, seed: int, begin: int) -> None:
        self._drafter, self._record, self._chance, self._begin = drafter, record, chance, begin
        self._place = seed * GOLDEN
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def draft(self, token: int, hidden: Floats, position: int, length: int, choose: Any) -> list[int]:
        """As `Drafter.draft`, with the tokens exchanged.

        Where a function chooses, it gets to see logits in which the proposed token wins, so that it costs and leaves
        behind what it would anyhow. Otherwise the tokens returned are exchanged.
        """
        proposed = [] if self._chance is None else self._proposal(self._chance, position, length)
        clock = perf_counter()
        try:
            asked = self._steered(choose, proposed, position) if proposed and isfunction(choose) else choose
            made: list[int] = self._drafter.draft(token, hidden, position, length, asked)
        finally:
            self.seconds += perf_counter() - clock
        return proposed[: len(made)] if proposed else made

    def _proposal(self, chance: Chance, position: int, length: int) -> list[int]:
        truth = self._record[position + 1 : position + 1 + length]
        right = self._right(chance.at(max(position - self._begin, 0)), len(truth))
        return [token if place < right else self._wrong(token) for place, token in enumerate(truth)]

    @staticmethod
    def _steered(choose: Choose, proposed: Sequence[int], begin: int) -> Choose:
        def steered(logits: Floats, position: int) -> int:
            for token in proposed[position - begin - 1 : position - begin]:
                logits[token] = SURE
            return choose(logits, position)

        return steered

    def _right(self, chance: float, length: int) -> int:
        """How many tokens of the next draft are right."""
        self._place = (self._place + GOLDEN) % 1.0
        if chance == 0.0 or self._place == 0.0:
            return 0
        return length if chance == 1.0 else min(length, int(math.log(self._place) / math.log(chance)))

    @staticmethod
    def _wrong(token: int) -> int:
        return token - 1 if token else 1


class Fruitless(Lookup):
    """Looks, and finds nothing: a record may repeat itself, and what it holds is right whatever the chance."""

    def find(self, length: int) -> tuple[list[int], int]:
        """As `Lookup.find`, without what was found."""
        super().find(length)
        return [], 0


class Spent:
    """Seconds in llama_decode outside of drafts, and in drafts, since `start`."""

    def __init__(self, replay: Replay) -> None:
        self.decode, self._replay, self._at_start = 0.0, replay, (0.0, 0.0)

    def start(self) -> None:
        """Count from here."""
        self._at_start = (self.decode, self._replay.seconds)

    def add_to(self, shares: list[float]) -> None:
        """Add both, target first, to these."""
        shares[0] += self.decode - self._at_start[0]
        shares[1] += self._replay.seconds - self._at_start[1]


@contextmanager
def watched(
    llm: Llama, record: Sequence[int], chance: Chance | None, seed: int, begin: int, end: int
) -> Iterator[Spent]:
    """Put `Replay` in the drafter's place, a clock around llama_decode and an end to the run; take them away again.

    Args:
        llm: an open pair.
        record, chance, seed, begin: for `Replay`.
        end: tokens of the sequence after which no further round begins: `Enough` is raised between two.
    """
    real, decode, make = llm.drafter, lib.llama_decode, proposals.Drafts.make
    replay = Replay(real, record, chance, seed, begin)
    spent = Spent(replay)
    target = llm.ctx

    def timed(ctx: Any, batch: Any) -> int:
        if ctx is not target:
            return int(decode(ctx, batch))
        clock = perf_counter()
        status = int(decode(ctx, batch))
        lib.llama_synchronize(ctx)
        spent.decode += perf_counter() - clock
        return status

    def ending(self: proposals.Drafts, token: int, row: int) -> proposals.Draft:
        if llm.n_tokens + 1 >= end:
            raise Enough
        return make(self, token, row)

    lib.llama_decode, llm.drafter = timed, replay  # type: ignore[assignment]
    proposals.Drafts.make = ending  # type: ignore[method-assign]
    proposals.Lookup = Lookup if chance is None else Fruitless  # type: ignore[attr-defined]
    try:
        yield spent
    finally:
        lib.llama_decode, llm.drafter = decode, real
        proposals.Drafts.make, proposals.Lookup = make, Lookup  # type: ignore[attr-defined, method-assign]


def until_enough(tokens: Iterator[int]) -> Iterator[int]:
    """Tokens up to the end that `watched` was given."""
    try:
        yield from tokens
    except Enough:
        return
