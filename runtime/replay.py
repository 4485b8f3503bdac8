"""Drafts with a known chance of acceptance: the real drafter runs, and a recorded continuation takes its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import isfunction
from time import perf_counter
from typing import Any

from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import Choose

GOLDEN = (math.sqrt(5) - 1) / 2
SURE = 1e4  # a logit that no other comes near


class Enough(Exception):
    """As many tokens as asked for have been generated; raised between two rounds."""


def expected_tokens(chance: float, length: int) -> float:
    """Tokens a round of `length` drafted tokens brings on average when each is accepted with this chance.

    Leviathan et al., arXiv 2211.17192, equation 1: 1 + p + ... + p^length.
    """
    return sum(chance**place for place in range(length + 1))


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
        end: position from which on `Enough` is raised instead of drafting.

    Attributes:
        seconds: time spent in the drafter.
    """

    def __init__(self, drafter: Any, record: Sequence[int], chance: float | None, seed: int, end: int) -> None:
        self._drafter, self._record, self._chance, self._end = drafter, record, chance, end
        self._place = seed * GOLDEN
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def draft(self, token: int, hidden: Floats, position: int, length: int, choose: Any) -> list[int]:
        """As `Drafter.draft`, with the tokens exchanged.

        Where a function chooses, it gets to see logits in which the proposed token wins, so that it costs and leaves
        behind what it would anyhow. Otherwise the tokens returned are exchanged.
        """
        if position >= self._end:
            raise Enough
        proposed = [] if self._chance is None else self._proposal(position, length)
        clock = perf_counter()
        try:
            asked = self._steered(choose, proposed, position) if proposed and isfunction(choose) else choose
            made: list[int] = self._drafter.draft(token, hidden, position, length, asked)
        finally:
            self.seconds += perf_counter() - clock
        return proposed[: len(made)] if proposed else made

    def _proposal(self, position: int, length: int) -> list[int]:
        truth = self._record[position + 1 : position + 1 + length]
        right = self._right(len(truth))
        return [token if place < right else self._wrong(token) for place, token in enumerate(truth)]

    @staticmethod
    def _steered(choose: Choose, proposed: Sequence[int], begin: int) -> Choose:
        def steered(logits: Floats, position: int) -> int:
            for token in proposed[position - begin - 1 : position - begin]:
                logits[token] = SURE
            return choose(logits, position)

        return steered

    def _right(self, length: int) -> int:
        """How many tokens of the next draft are right."""
        self._place = (self._place + GOLDEN) % 1.0
        if self._chance == 0.0 or self._place == 0.0:
            return 0
        return length if self._chance == 1.0 else min(length, int(math.log(self._place) / math.log(self._chance or 1)))

    @staticmethod
    def _wrong(token: int) -> int:
        return token - 1 if token else 1
