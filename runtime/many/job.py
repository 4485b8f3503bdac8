"""A prompt among many: what is asked, and its answer in the making in one of the slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from gemma_mtp.runtime.accept import walk
from gemma_mtp.runtime.completion import Made
from gemma_mtp.runtime.draft.proposals import Offered, Proposals
from gemma_mtp.runtime.draft.source import Draft
from gemma_mtp.runtime.faults import naming_nan
from gemma_mtp.runtime.logprobs import LogProbs
from gemma_mtp.runtime.many.slots import Slot
from gemma_mtp.runtime.request import Request
from gemma_mtp.runtime.sampling import Choose, Sampler
from gemma_mtp.runtime.stats import Stats


@dataclass
class Job:
    """A prompt that is to be answered.

    Attributes:
        tokens: of the prompt.
        made: what becomes of it.
        most: tokens of the answer at most.
        seed: of its noise.
        request: its wishes, and what the answer tells.
        given: how its tokens are chosen, as arguments of `generate`.
        notes: keeps log-probabilities, if they are wanted.
        finish: makes of the completion what was asked for, or what has to be asked next.
    """

    tokens: list[int]
    made: Made
    most: int
    seed: int
    request: Request
    given: Mapping[str, Any]
    notes: LogProbs | None
    finish: Callable[[dict[str, Any]], Any]


class Working:
    """A job in a slot.

    Args:
        number: its place among the prompts.
        job: the job.
        slot: where it is; it holds the beginning of the prompt.
        choosing: gives what chooses its tokens, told how to ask for those so far.
        proposals: gives what drafts for that, in a slot.

    Attributes:
        token: the latest one, which is not decoded yet.
        draft: what is guessed to follow it.
        going: whether the answer is not complete.
        stats: counts what happens.
    """

    def __init__(
        self,
        number: int,
        job: Job,
        slot: Slot,
        choosing: Callable[[Job, Callable[[], Any]], Sampler],
        proposals: Callable[[Job, Sampler, Slot], Proposals],
    ) -> None:
        self.number, self.job, self.slot, self.token = number, job, slot, -1
        self.draft, self.going = Draft(), True
        self.stats = Stats(seed=job.seed, draft_length=job.request.length, cached_tokens=slot.n_tokens)
        sampler = choosing(job, lambda: self.slot.ids)
        self._proposals_in = partial(proposals, job, sampler)
        self._proposals = self._proposals_in(slot)
        choose = naming_nan(sampler)
        self._choose: Choose = choose if job.notes is None else job.notes.recording(choose)

    def begin(self) -> None:
        """Decode the prompt and choose the first token.

        Raises:
            Exception: what the request is to blame for, or llama.cpp.
        """
        job, slot, clock = self.job, self.slot, perf_counter()
        if job.notes is not None:
            self.stats.prompt_tokens = job.notes.begin(slot, job.tokens)
            if self.stats.prompt_tokens:  # the prompt's own tokens were decoded for theirs
                self.stats.cached_tokens = 0
        left = job.tokens[slot.n_tokens :]
        row = slot.decode(left, [])
        slot.logits(row)  # waits for a device that computes on its own
        self.stats.prompt_tokens += len(left)
        self.stats.prompt_seconds = perf_counter() - clock
        if job.most:
            self._walk(row)
        else:
            self.going = False
            self.stats.lap()

    def move(self, slot: Slot) -> None:
        """Go on in another slot, which holds the same."""
        self.slot = slot
        self._proposals = self._proposals_in(slot)

    @property
    def patient(self) -> bool:
        """Whether a round may pass without asking for drafts: no length was wanted, and no grammar forces tokens."""
        return self.job.request.length in ("auto", 0) and self.job.given["grammar"] is None

    def offered(self, most: int) -> Offered:
        """What could be drafted, `most` tokens at most, and none that the answer has no room for."""
        left = self.job.most - len(self.job.made.tokens) - 1
        return self._proposals.offered(self.token, 0, max(min(most, left), 0))

    def drafting(self, draft: Draft) -> None:
        """What is guessed to follow."""
        self.draft = draft
        self.stats.drafted_round(draft.sources, draft.seconds)

    def verify(self, row: int, pass_seconds: float) -> None:
        """Walk along the rows of the latest batch, the first of which is that of `token`.

        Args:
            row: that one.
            pass_seconds: this sequence's share of the pass.

        Raises:
            Exception: what the request is to blame for.
        """
        self.stats.passed(pass_seconds)
        self.slot.note([self.token, *self.draft.tokens])
        self.slot.n_tokens += 1
        draft, self.draft = self.draft, Draft()
        hits, made = self._walk(row, draft)
        self.slot.roll_back()
        self._proposals.outcome(draft, hits, made)

    def _walk(self, row: int, draft: Draft | None = None) -> tuple[int, int]:
        """Choose along a draft; returns how much of it was accepted, and how many tokens that gave."""
        slot, past, criteria = self.slot, self.slot.n_tokens, self.job.given["stopping_criteria"]
        draft, hits, made, clock = draft or Draft(), 0, 0, perf_counter()

        def choice(place: int) -> int:
            slot.n_tokens = past + place
            return self._choose(slot.logits(row + place), past + place)

        for place, (token, accepted) in enumerate(walk(draft.tokens, choice)):
            made += 1
            if accepted:
                hits += 1
                self.stats.accepted_at(place, draft.sources[place])
            if criteria is not None and criteria(slot.ids, slot.logits(row + place)):
                self.job.made.finish, self.going = "stop", False
                break
            self.token = token
            self.stats.token()
            if not self.job.made.take(token, self.job.most):
                self.going = False
                break
        slot.keep(row + place)
        self.stats.loop_seconds += perf_counter() - clock
        return hits, made

    def answer(self) -> Any:
        """The answer, or the job that has to be done for it next."""
        self.stats.lap()
        told, job = self.job.request.told, self.job
        told["seed"], told["timings"] = job.seed, self.stats.timings()
        return job.finish(job.made.whole() | told)
