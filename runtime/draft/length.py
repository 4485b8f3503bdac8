"""How many tokens to draft next: the length that makes most tokens a second, from measured costs and acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

LEVELS: Doubles = np.array([0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
CHANGE = 1 / 40  # chance per token that the text turns to another acceptance
MEMORY = 1 / 200  # share of a token in the long-run picture of acceptance
PROBE_SHARE = 0.003  # of the time that may go into drafts whose only use is to learn
HYSTERESIS = 1.01
# Where plain passes win by that much, the choice holds for so many rounds: going over it takes 0.2 ms between two
# passes, as a pass leaves nothing of Python's in the caches.
CLEARLY, REST = 0.97, 3
REFRESH = 150  # rounds of drafting after which a plain pass is timed again


def fitting(wanted: int, n_past: int, n_ctx: int, n_batch: int) -> int:
    """The wanted draft length, cut to what the target can verify.

    A round decodes the last token and the draft in one batch, at positions n_past to n_past + length.

    Args:
        wanted: draft length asked for.
        n_past: tokens in the KV cache.
        n_ctx: cells of the KV cache.
        n_batch: tokens one decode may hold.

    Returns:
        A length between 0 and `wanted`.
    """
    return max(0, min(wanted, n_ctx - n_past - 1, n_batch - 1))


class Prices(Protocol):
    """Measured costs, in seconds."""

    def pass_seconds(self, n: int) -> float:
        """A target pass over n tokens."""

    def step_seconds(self) -> float:
        """Drafting one token with the drafter."""

    def seen(self, place: int) -> int:
        """How often a pass over `place` tokens was measured."""


class Acceptance:
    """What is believed about the chance that a drafted token is accepted, given that all before it were.

    A hidden level changes now and then to one drawn from a long-run picture; rounds of drafting tell about it
    (a hidden Markov model, filtered forward). Deeper places of a draft have odds of their own beside the level's.

    Args:
        most: longest draft.
        guess: the chance expected before anything is known.
    """

    def __init__(self, most: int, guess: float = 0.7) -> None:
        spread = np.exp(-(((LEVELS - guess) / 0.3) ** 2))
        self.home: Doubles = spread / spread.sum()
        self.belief: Doubles = self.home.copy()
        self.odds: Doubles = np.zeros(most)
        self._waited = 0
        self._told = 20

    def chances(self, length: int) -> Doubles:
        """Chance of each place under each level, shape [levels, length]."""
        odds = np.log(LEVELS / (1 - LEVELS))[:, None] + self.odds[None, :length]
        chances: Doubles = 1 / (1 + np.exp(-odds))
        return chances

    def reach(self, length: int) -> Doubles:
        """Chance that the first 1, 2, ... draft tokens are all accepted, shape [length]."""
        reach: Doubles = self.belief @ np.cumprod(self.chances(length), axis=1)
        return reach

    def passed(self, tokens: int) -> None:
        """Tokens have been generated: the level may have changed meanwhile."""
        stayed = (1 - CHANGE) ** tokens
        self.belief = stayed * self.belief + (1 - stayed) * self.home
        self._waited += tokens

    def observed(self, drafted: int, accepted: int) -> None:
        """A draft was verified: so many of its first tokens were accepted, and the next one was not."""
        chances = self.chances(drafted)
        seen = np.prod(chances[:, :accepted], axis=1)
        if accepted < drafted:
            seen = seen * (1 - chances[:, accepted])
        places = np.arange(min(accepted + 1, drafted))
        hits = (places < accepted).astype(np.float64)
        belief = self.belief * seen
        self.belief = belief / belief.sum()
        wrong = hits - self.belief @ chances[:, places]
        self.odds[places[1:]] = np.clip(self.odds[places[1:]] + 0.03 * wrong[1:], -1.5, 1.5)
        self._told += max(self._waited, 1)
        share = 1 - (1 - max(MEMORY, 1 / self._told)) ** max(self._waited, 1)
        self.home = (1 - share) * self.home + share * self.belief
        # No level is ever ruled out.
        self.home = 0.998 * self.home + 0.002 / len(LEVELS)
        self._waited = 0


def rates(reach: Doubles, pass_seconds: Callable[[int], float], step_seconds: float) -> Doubles:
    """Expected tokens per second of a round with 0, 1, ... drafted tokens.

    Args:
        reach: chance that the first 1, 2, ... draft tokens are all accepted, shape [length].
        pass_seconds: time of a target pass over n tokens.
        step_seconds: time of drafting one token.

    Returns:
        Shape [length + 1].
    """
    lengths = np.arange(len(reach) + 1)
    tokens = 1 + np.concatenate([[0.0], np.cumsum(reach)])
    seconds = np.array([pass_seconds(int(n) + 1) for n in lengths]) + lengths * step_seconds
    made: Doubles = tokens / seconds
    return made


class Policy:
    """Chooses a source of drafts and a length for every round.

    Drafts are not ended early by the drafter's probabilities. A rule that compared neighbouring batch sizes was tried
    on the bundled pair: drawn tokens are accepted as often at 0.1 as at 0.7, and greedy ones gained 0.4 % at most.

    Args:
        costs: what passes and draft steps take.
        most: longest draft.
    """

    def __init__(self, costs: Prices, most: int) -> None:
        self.costs = costs
        self.most = most
        self.sources: dict[str, Acceptance] = {}
        self._previous = 0
        self._idle = 0
        self._rest = 0
        self._offered: set[str] = set()
        self._drafting = 0
        self._tried = max([1, *(n for n in range(1, most + 2) if costs.seen(n))])

    def choose(self, offers: Mapping[str, tuple[int, bool]]) -> tuple[str, int]:
        """The source and length that make most tokens a second.

        Args:
            offers: for each source the longest draft it can give now, and whether its tokens are free.

        Returns:
            Source and length; length 0 for a round without a draft.
        """
        if self._rest > 0 and offers.keys() <= self._offered:
            self._rest -= 1
            self._idle += 1
            return "", 0
        chosen, length, top, probes, beaten = "", 0, 1 / self.costs.pass_seconds(1), [], True
        if self.costs.seen(1) < 2 or self._drafting >= REFRESH:
            self._drafting = 0
            return chosen, length
        for source, (most, free) in offers.items():
            if most < 1:
                continue
            step = 0.0 if free else self.costs.step_seconds()
            reach = self._acceptance(source).reach(min(most, self.most, 2 * self._tried - 1))
            rate = rates(reach, self.costs.pass_seconds, step)
            best = int(rate.argmax())
            if self._previous < len(rate) and rate[best] < HYSTERESIS * rate[self._previous]:
                best = self._previous
            if best and rate[best] > top:
                chosen, length, top = source, best, float(rate[best])
            probes.append((self._probe_interval(rate, step), source))
            beaten = beaten and rate[1:].max() < CLEARLY * rate[0]
        if not length and probes and self._idle >= min(probes)[0]:
            chosen, length = min(probes)[1], 1
        self._previous = length
        self._idle = 0 if length else self._idle + 1
        self._rest = min(REST, min(probes)[0] - self._idle) if beaten and probes and not length else 0
        self._offered = set(offers)
        self._drafting = self._drafting + 1 if length else 0
        self._tried = max(self._tried, length + 1)
        return chosen, length

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """A round made `tokens` tokens, `accepted` of the `drafted` ones among them."""
        if drafted:
            self._acceptance(source).observed(drafted, accepted)
        for acceptance in self.sources.values():
            acceptance.passed(tokens)

    def _acceptance(self, source: str) -> Acceptance:
        return self.sources.setdefault(source, Acceptance(self.most))

    def _probe_interval(self, rate: Doubles, step_seconds: float) -> int:
        """After how many rounds without a draft one is spent on learning: the dearer, the longer."""
        lost = (1 - rate[1] / rate[0]) * (self.costs.pass_seconds(2) + step_seconds)
        return max(8, int(lost / (PROBE_SHARE * self.costs.pass_seconds(1))))
