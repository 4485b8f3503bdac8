"""Tokens drawn with MTP follow the target's distribution.

The loop, the sampler and the drafts are the real ones; the logits of both models are computed once for each context
that comes up, and handed out again, so that most draws cost no pass. For every draw the token's place in the target's
own distribution is uniform (the probability integral transform, the step at the token filled in at random), whatever
came before; chi-square over 50 bins, 49 degrees of freedom. 85.35 is exceeded by chance once in a thousand. The full
test has 90 such figures, so all of them hold by chance alone in 91 of 100 choices of seeds; the seeds are fixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from coupling import probabilities
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, Stats, loop
from gemma_mtp.runtime.accept import walk
from gemma_mtp.runtime.borrowed import bind
from gemma_mtp.runtime.draft.costs import Costs
from gemma_mtp.runtime.draft.drafter import Drafter
from gemma_mtp.runtime.draft.policy import Policy
from gemma_mtp.runtime.draft.proposals import Proposals, sources
from gemma_mtp.runtime.request import MOST
from gemma_mtp.runtime.sampling import Sampler, with_noise, without_draw
from tiny import PAIR

CONTEXTS, TOKENS, LIMIT, BINS = 5, 3, 85.35, 50
TRUNCATED = {"top_k": 64, "top_p": 0.95}
WHOLE = {"top_k": 0, "top_p": 1.0}
Key = tuple[int, ...]


class Replay:
    """Stands in for a Llama and its drafter: logits come from the real ones, each context computed once."""

    n_batch = 512

    def __init__(self, llm: Llama, prompt: list[int]) -> None:
        self.llm, self.prompt, self.drafter = llm, prompt, self
        self.input_ids = np.zeros(llm.n_ctx(), dtype=np.intc)
        self.target: dict[Key, npt.NDArray[np.float32]] = {}
        self.drafted: dict[tuple[Key, Key], npt.NDArray[np.float32]] = {}
        self.rewind()

    def rewind(self) -> None:
        self.n_tokens = len(self.prompt) - 1
        self._rows: list[Key] = []
        self.input_ids[: len(self.prompt)] = self.prompt

    def n_ctx(self) -> int:
        return int(self.llm.n_ctx())

    def roll_back(self) -> None:
        pass

    def reset(self) -> None:
        self.n_tokens = 0

    def ends(self, token: int) -> bool:
        return self.llm.ends(token)

    def decode(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        past, batch = self.n_tokens, [*tokens, *draft]
        self.input_ids[past : past + len(batch)] = batch
        ids = self.input_ids[: past + len(batch)].tolist()
        self._rows = [tuple(ids[: past + i + 1]) for i in range(len(batch))]
        self.n_tokens = past + len(tokens)
        return len(tokens) - 1

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        key = self._rows[row]
        if key not in self.target:
            self.target[key] = self.llm.logits(self._real(key)).copy()
        return self.target[key]

    def hidden(self, row: int) -> Any:
        return self._rows[row]

    def _real(self, key: Key) -> int:
        return self.llm.decode(self.llm.reuse_prefix(list(key)), [])

    def draft(self, token: int, hidden: Key, position: int, length: int, choose: Callable[[Any, int], int]) -> None:
        made: list[int] = []
        for step in range(length):
            key = ((*hidden, token), tuple(made))
            if key not in self.drafted:
                self.drafted[key] = self._real_draft(token, hidden, made)
            made.append(choose(self.drafted[key], position + step + 1))

    def _real_draft(self, token: int, hidden: Key, made: list[int]) -> npt.NDArray[np.float32]:
        row = self._real(hidden)
        seen: list[npt.NDArray[np.float32]] = []

        def choose(logits: Any, position: int) -> int:
            seen.append(logits.copy())
            return made[len(seen) - 1] if len(seen) <= len(made) else 0

        assert self.llm.drafter is not None
        self.llm.drafter.draft(token, self.llm.hidden(row), self.llm.n_tokens, len(made) + 1, choose)
        return seen[-1]


def sampler_of(llm: Llama, temp: float, settings: dict[str, Any], seed: int) -> Sampler:
    return llm._choice(bind(llama_cpp.Llama.generate, [], temp=temp, min_p=0.0, **settings), seed)


def reseed(sampler: Sampler, seed: int) -> None:
    """Have a sampler draw with another seed: the stage that draws, the last of its chain, has its own."""
    sampler.seed = seed
    with_noise(without_draw(sampler._chain), seed)


def places(replay: Replay, temp: float, settings: dict[str, Any], draws: int) -> npt.NDArray[np.float64]:
    """Places of the drawn tokens in the target's distribution, shape [draws, TOKENS]; uniform if all is well."""
    chooser = np.random.default_rng(1)
    cumulated: dict[Key, tuple[Any, Any]] = {}
    found = np.zeros((draws, TOKENS))
    sampler, policy = sampler_of(replay.llm, temp, settings, 0), Policy(costs := Costs(MOST + 1), MOST)
    drafted, stand_in = 0, cast(Drafter, replay)
    for seed in range(draws):
        replay.rewind()
        reseed(sampler, seed)
        key, stats = tuple(replay.prompt), Stats()
        proposals = Proposals(replay, sampler, sources(replay, stand_in, costs, None, 2), 2, policy, costs)
        made = loop.generate(replay, [replay.prompt[-1]], sampler, proposals, lambda row: False, stats)
        for place, token in zip(range(TOKENS), made, strict=False):
            if key not in cumulated:
                share = probabilities(replay.target[key], temp, **settings)
                cumulated[key] = share, np.cumsum(share[np.argsort(-share, kind="stable")])
            share, sums = cumulated[key]
            before = (share > share[token]).sum() + (share[:token] == share[token]).sum()
            found[seed, place] = sums[before] - share[token] * chooser.random()
            key = (*key, token)
        made.close()
        drafted += stats.accepted
    assert drafted > draws / 10
    return found


def chi_squares(found: npt.NDArray[np.float64]) -> list[float]:
    expected = len(found) / BINS
    counts = [np.histogram(column, bins=BINS, range=(0, 1))[0] for column in found.T]
    return [float(((count - expected) ** 2 / expected).sum()) for count in counts]


@pytest.fixture(scope="module")
def llm(demo: Pair) -> Iterator[Llama]:
    options: dict[str, Any] = {"n_ctx": 512, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1}
    with closing(Llama(demo.target, verbose=False, **options)) as llm:
        yield llm


def prompt_of(llm: Llama, which: int) -> list[int]:
    text = json.loads((PAIR / "prompts.json").read_text())["prompts"][which]["text"]
    return list(llm.tokenize(text.encode()))


def wrong_second_draw(draft: Sequence[int], choose: Callable[[int], int]) -> Iterator[tuple[int, bool]]:
    """Accept what agrees, but where it does not, draw again: agreement is then counted twice."""
    sampler = wrong_second_draw.sampler  # type: ignore[attr-defined]
    for i in range(len(draft) + 1):
        token = choose(i)
        accepted = i < len(draft) and token == draft[i]
        if i < len(draft) and not accepted:
            seed = sampler.seed
            reseed(sampler, seed + (1 << 40))
            token = choose(i)
            reseed(sampler, seed)
        yield token, accepted
        if not accepted:
            return


@pytest.mark.parametrize("settings", [TRUNCATED, WHOLE], ids=["truncated", "whole"])
def test_tokens_follow_the_targets_distribution(settings: dict[str, Any], llm: Llama) -> None:
    figures = chi_squares(places(Replay(llm, prompt_of(llm, 0)), 1.0, settings, 1000))
    assert max(figures) < LIMIT, figures


def test_wrong_rules_are_noticed(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft taken over unasked, and a second draw where the first differs from the draft."""

    def trusting(draft: Sequence[int], choose: Callable[[int], int]) -> Iterator[tuple[int, bool]]:
        for i, (token, accepted) in enumerate(walk(draft, choose)):
            yield (draft[i], True) if i == 0 and draft else (token, accepted)

    replay = Replay(llm, prompt_of(llm, 0))
    monkeypatch.setattr(loop, "walk", trusting)
    first, *later = chi_squares(places(replay, 1.0, TRUNCATED, 1000))
    assert first < LIMIT < max(later)

    def keeping(*arguments: Any) -> Sampler:
        wrong_second_draw.sampler = made(*arguments)  # type: ignore[attr-defined]
        return wrong_second_draw.sampler  # type: ignore[attr-defined, no-any-return]

    made = sampler_of
    monkeypatch.setattr(loop, "walk", wrong_second_draw)
    monkeypatch.setitem(globals(), "sampler_of", keeping)
    first, *later = chi_squares(places(replay, 1.0, TRUNCATED, 1000))
    assert first < LIMIT < max(later)


@pytest.mark.distribution
@pytest.mark.parametrize("settings", [TRUNCATED, WHOLE], ids=["truncated", "whole"])
@pytest.mark.parametrize("temp", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("which", range(CONTEXTS))
def test_the_distribution_in_full(which: int, temp: float, settings: dict[str, Any], llm: Llama) -> None:
    figures = chi_squares(places(Replay(llm, prompt_of(llm, which)), temp, settings, 20_000))
    print(json.dumps({"context": which, "temperature": temp, **settings, "chi2": [round(f, 1) for f in figures]}))
    assert max(figures) < LIMIT, figures
