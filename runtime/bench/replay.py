"""Drafts with a known chance of acceptance: the real drafter runs, and a recorded continuation takes its place."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from inspect import isfunction
from typing import Any

from gemma_mtp.runtime.bench.settings import Chance
from gemma_mtp.runtime.draft.drafter import Drafting, DraftSettings, FromDrafter
from gemma_mtp.runtime.draft.lookup import FromText
from gemma_mtp.runtime.draft.source import Draft, DraftSource, Start
from gemma_mtp.runtime.grammar import Mask
from gemma_mtp.runtime.llama import Llama
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.request import DraftLength
from gemma_mtp.runtime.sampling import Choose, Sampler
from gemma_mtp.runtime.target import Target

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
SURE = 1e4  # a logit that no other comes near


class Enough(Exception):
    """As many tokens as asked for have been generated; raised between two rounds."""


class Replay:
    """Stands in for a drafter: runs it, pays for it, throws its tokens away and proposes recorded ones.

    In each round the first `n` tokens are those of the record and the rest are wrong, where n is at least k with chance
    p^k, as if each token were right with chance p. The random numbers are multiples of the golden ratio, spread evenly:
    the share accepted is near p after a few dozen rounds.

    Args:
        drafter: the drafter of an open pair.
        record: the whole sequence, prompt first.
        chance: p, or None to propose what the drafter does.
        seed: where the random numbers begin.
        begin: position that turns of `chance` are counted from.
    """

    def __init__(self, drafter: Drafting, record: Sequence[int], chance: Chance | None, seed: int, begin: int) -> None:
        self._drafter, self._record, self._chance, self._begin = drafter, record, chance, begin
        self._place = seed * GOLDEN_RATIO

    def allow(self, mask: Mask | None) -> None:
        """As `Drafter.allow`."""
        self._drafter.allow(mask)

    def draft(self, token: int, hidden: Floats, position: int, length: int, choose: Any) -> list[int]:
        """As `Drafter.draft`, with the tokens exchanged.

        Where a function chooses, it gets to see logits in which the proposed token wins, so that it costs and leaves
        behind what it would anyhow. Otherwise the tokens returned are exchanged.
        """
        proposed = [] if self._chance is None else self._proposal(self._chance, position, length)
        asked = self._steered(choose, proposed, position) if proposed and isfunction(choose) else choose
        made = self._drafter.draft(token, hidden, position, length, asked)
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
        self._place = (self._place + GOLDEN_RATIO) % 1.0
        if chance == 0.0 or self._place == 0.0:
            return 0
        return length if chance == 1.0 else min(length, int(math.log(self._place) / math.log(chance)))

    @staticmethod
    def _wrong(token: int) -> int:
        return token - 1 if token else 1


class Fruitless(DraftSource):
    """Asks a source and proposes nothing: a record may repeat itself, and what it holds is right whatever the chance.

    Args:
        source: what is asked.
    """

    def __init__(self, source: DraftSource) -> None:
        self._source = source

    def propose(self, start: Start, draft: Draft, room: int) -> None:
        """As the source, without what it found."""
        self._source.propose(start, draft, room)


class Until(DraftSource):
    """Ends a run between two rounds: `Enough` is raised instead of drafting on.

    Args:
        target: whose sequence it is.
        end: tokens of the sequence after which no further round begins.
    """

    def __init__(self, target: Target, end: int) -> None:
        self._target, self._end = target, end

    def propose(self, start: Start, draft: Draft, room: int) -> None:
        """Proposes nothing."""
        if self._target.n_tokens + 1 >= self._end:
            raise Enough


@dataclass(frozen=True)
class Rehearsal:
    """What `Replaying` does instead of what a `Llama` does.

    Attributes:
        end: for `Until`.
        record, chance, seed, begin: for `Replay`.
    """

    end: int
    record: Sequence[int] = ()
    chance: Chance | None = None
    seed: int = 0
    begin: int = 0


class Replaying(Llama):
    """A `Llama` that ends after whole rounds, and drafts from a record, while it is told so.

    Attributes:
        rehearsal: what it is told.
    """

    rehearsal: Rehearsal | None = None

    def sources(self, sampler: Sampler, length: DraftLength, settings: DraftSettings | None) -> list[DraftSource]:
        """As there, with `Replay` in the drafter's place."""
        asked = super().sources(sampler, length, settings)
        if self.rehearsal is None or not asked:
            return asked
        run = self.rehearsal
        for place, source in enumerate(asked):
            if isinstance(source, FromDrafter):
                source.drafter = Replay(source.drafter, run.record, run.chance, run.seed, run.begin)
            elif isinstance(source, FromText) and run.chance is not None:
                asked[place] = Fruitless(source)
        return [Until(self, run.end), *asked]

    def running(self, run: Rehearsal, tokens: Sequence[int], **settings: Any) -> Generator[int, None, None]:
        """Generate after a prompt up to the end that `run` names; without drafts a token is a whole round."""
        self.rehearsal = run
        try:
            with closing(self.generate(tokens, **settings)) as made, suppress(Enough):
                for token in made:
                    yield token
                    if self.n_tokens + 1 >= run.end and not self.stats.drafts:
                        return
        finally:
            self.rehearsal = None
