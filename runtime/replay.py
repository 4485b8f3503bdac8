"""Drafts with a known chance of acceptance: the real drafter runs, and a recorded continuation takes its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from gemma_mtp.runtime.native import Floats

GOLDEN = (math.sqrt(5) - 1) / 2


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

    def draft(self, token: int, hidden: Floats, position: int, *rest: Any, **named: Any) -> list[int]:
        """As `Drafter.draft`, with the tokens exchanged."""
        if position >= self._end:
            raise Enough
        clock = perf_counter()
        made: list[int] = self._drafter.draft(token, hidden, position, *rest, **named)
        self.seconds += perf_counter() - clock
        if self._chance is None:
            return made
        right = self._right(len(made))
        truth = self._record[position + 1 : position + 1 + len(made)]
        return [token if place < right else self._wrong(token) for place, token in enumerate(truth)]

    def _right(self, length: int) -> int:
        """How many tokens of the next draft are right."""
        self._place = (self._place + GOLDEN) % 1.0
        if self._chance == 0.0 or self._place == 0.0:
            return 0
        return length if self._chance == 1.0 else min(length, int(math.log(self._place) / math.log(self._chance or 1)))

    @staticmethod
    def _wrong(token: int) -> int:
        return token - 1 if token else 1
