"""Many prompts through a few slots, in rounds like those of runtime/loop.py, each of all sequences at once:

fill        a free slot gets the next prompt, which is decoded by itself and gives its first token
draft       for every sequence, as far as it pays for all of them
decode      one pass over as many rows of each
walk        every sequence's own choices along its draft; what is complete is handed out
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import Costs, costs_path
from gemma_mtp.runtime.draft.drafter import DraftSettings
from gemma_mtp.runtime.draft.proposals import Proposals, sources
from gemma_mtp.runtime.draft.shared import OfOne, shared_policy
from gemma_mtp.runtime.many.job import Job, Working
from gemma_mtp.runtime.many.slots import Slot, Slots
from gemma_mtp.runtime.request import MOST
from gemma_mtp.runtime.sampling import Sampler
from gemma_mtp.runtime.stats import Stats

REST = 3  # as in the library, which sees no more of a round than its passes and draft steps


@dataclass(frozen=True)
class Answer:
    """What became of a prompt.

    Attributes:
        number: its place among the prompts, the first being 0.
        value: the answer, or the exception that there is in its place.
    """

    number: int
    value: Any


class Rounds:
    """Answers prompts.

    Args:
        slots: where.
        choosing: makes a sampler from arguments of `generate`, a seed, and what gives the tokens so far.
        costs: where it is kept what passes take on one sequence.
        stats: counters of all prompts together.
    """

    def __init__(self, slots: Slots, choosing: Any, costs: Path, stats: Stats) -> None:
        self._slots, self._choosing, self.stats = slots, choosing, stats
        count = len(slots.all)
        self._costs_path = costs_path(beside=costs.stem, sequences=count)
        self._costs = Costs.load(self._costs_path, count * (MOST + 1))
        self._policy = shared_policy(self._costs, count, MOST)
        self._working: dict[int, Working] = {}  # by the number of the slot
        self._next: deque[tuple[int, Job]] = deque()
        self._rest = 0  # rounds for which nobody is asked for drafts

    def run(self, jobs: Iterator[tuple[int, Job | Exception]]) -> Iterator[Answer]:
        """Answer jobs, in the order in which they get ready; the next is asked for when there is a slot for it.

        Args:
            jobs: numbered; an exception stands for a prompt that cannot be asked.
        """
        try:
            while True:
                yield from self._fill(jobs)
                if not self._working:
                    return
                self._close_ranks()
                yield from self._round()
        finally:
            self._costs.save(self._costs_path)

    def _fill(self, jobs: Iterator[tuple[int, Job | Exception]]) -> Iterator[Answer]:
        """Give the free slots prompts, while there are any."""
        while free := [slot for slot in self._slots.all if slot.number not in self._working]:
            number, job = self._next.popleft() if self._next else next(jobs, (-1, None))
            if job is None:
                return
            if isinstance(job, Exception):
                yield Answer(number, job)
            else:
                yield from self._admit(number, job, free)

    def _admit(self, number: int, job: Job, free: list[Slot]) -> Iterator[Answer]:
        """Begin with a prompt."""
        slot = self._slots.begin(job.tokens, free)
        try:
            working = Working(number, job, slot, self._sampler, self._proposals)
            working.begin()
        except Exception as problem:
            yield self._failed(number, slot, problem)
            return
        self._working[slot.number] = working
        self._rest = 0
        if not working.going:
            yield from self._complete(working)

    def _round(self) -> Iterator[Answer]:
        """Draft, decode, walk."""
        working = [self._working[number] for number in sorted(self._working)]
        self._slots.llm.check_open()
        clock = perf_counter()
        self._draft(working)
        drafting = perf_counter() - clock
        rows = 1 + max(len(each.draft.tokens) for each in working)
        clock = perf_counter()
        try:
            self._slots.decode({each.slot.number: (each.slot.n_tokens, self._row(each, rows)) for each in working})
            self._slots.logits(0)  # waits for a device that computes on its own
        except RuntimeError as problem:
            yield from [self._failed(each.number, each.slot, problem) for each in working]
            return
        seconds = perf_counter() - clock
        # a small model's pass takes little more than asking everybody for drafts; steps have a place of their own
        drafting -= sum(each.draft.seconds for each in working if each.draft.steps)
        self._costs.observe(len(working) * rows, seconds + max(drafting, 0.0))
        self.stats.target_passes += 1
        found: list[Answer] = []
        for place, each in enumerate(working):
            try:
                each.verify(place * rows, seconds / len(working))
            except Exception as problem:
                found.append(self._failed(each.number, each.slot, problem))
            else:
                if not each.going:
                    found += self._complete(each)
        yield from found  # not before all have walked: between two answers the caller may do anything

    @staticmethod
    def _row(each: Working, rows: int) -> list[int]:
        """What a sequence decodes: its last token and the draft, and to be as long as the others, that token again."""
        made = [each.token, *each.draft.tokens]
        return made + [each.token] * (rows - len(made))

    def _draft(self, working: list[Working]) -> None:
        """Guess what follows, in every sequence; for some rounds nothing, once that paid for none of them."""
        if self._rest:
            self._rest -= 1
            return
        room = min(each.slot.n_ctx() - each.slot.n_tokens for each in working) - 1
        found = [(each, each.offered(min(room, MOST))) for each in working]
        wanted = {
            each.slot.number: offered.lengths()
            for each, offered in found
            if offered.offers and each.job.request.length == "auto"
        }
        chosen = self._policy.choose(wanted, len(working)) if wanted else {}
        for each, offered in found:
            fixed = next(((kind, most) for kind, (most, _) in offered.lengths().items()), ("", 0))
            each.drafting(offered.take(*chosen.get(each.slot.number, fixed)))
        if all(each.patient and not each.draft.tokens for each in working):
            self._rest = REST

    def _close_ranks(self) -> None:
        """Move sequences into free slots between others: a pass is over those that stand side by side."""
        while len(self._working) <= (last := max(self._working)) - min(self._working):
            hole = next(slot for slot in self._slots.all[min(self._working) :] if slot.number not in self._working)
            moved = self._working.pop(last)
            self._slots.copy(moved.slot, hole)
            moved.move(hole)
            self._working[hole.number] = moved

    def _complete(self, working: Working) -> Iterator[Answer]:
        """Hand out an answer, and free its slot."""
        del self._working[working.slot.number]
        self._add(working.stats)
        try:
            answer = working.answer()
        except Exception as problem:
            yield Answer(working.number, problem)
            return
        if isinstance(answer, Job):
            self._next.append((working.number, answer))
        else:
            yield Answer(working.number, answer)

    def _failed(self, number: int, slot: Slot, problem: Exception) -> Answer:
        """Free the slot of a prompt that has no answer; raises what is wrong with all of them."""
        self._slots.llm.check_open()
        self._working.pop(slot.number, None)
        slot.roll_back()
        return Answer(number, problem)

    def _add(self, stats: Stats) -> None:
        """Count a request with the others; what is a matter of the clock is that of all together."""
        passes, first = self.stats.target_passes, self.stats.time_to_first_token
        self.stats.add(stats)
        self.stats.target_passes, self.stats.time_to_first_token = passes, first or stats.time_to_first_token
        self.stats.lap()

    def _sampler(self, job: Job, ids: Any) -> Sampler:
        made: Sampler = self._choosing(job.given, job.seed, ids)
        return made

    def _proposals(self, job: Job, sampler: Sampler, slot: Slot) -> Proposals:
        """What drafts for a request in a slot."""
        length, asked = job.request.length, []
        if self._slots.drafters and length != 0:
            settings = DraftSettings.of(job.given, job.seed) if sampler.plain and native.drafts_rounds() else None
            asked = sources(slot, self._slots.drafters[slot.number], self._costs, settings, length)
        return Proposals(slot, sampler, asked, length, OfOne(self._policy, slot.number), self._costs)
