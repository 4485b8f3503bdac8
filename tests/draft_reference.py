"""What the library decides about drafts, once more in Python: the reference of `test_native_choices.py`.

Costs, acceptance and the choice are those of src/llama-mtp-length.cpp for one sequence, the index is that of
src/llama-mtp-lookup.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile

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
STEP = 0  # the place of a draft step in the table; places from 1 on are target passes over so many tokens
GROWTH = 0.05  # how much a pass is hoped to grow with each further token, before it has been measured


class Costs:
    """Seconds of a target pass over n tokens and of a draft step.

    A cost is a factor of its own times the speed of the machine at the moment, both followed in logarithms, so that a
    slow phase does not look like a dear batch size.

    Args:
        most: largest number of tokens in a pass.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._factor = [0.0] * (most + 1)
        self._seen = [0] * (most + 1)
        self._speed = 0.0

    def observe(self, place: int, seconds: float) -> None:
        """Note what a pass over `place` tokens took, or with STEP what a draft step took."""
        if place > self.most or seconds <= 0:
            return
        value = math.log(seconds)
        wrong = value - self._factor[place] - self._speed
        if self._seen[place] < 2:
            # The first two: the smaller, as a hiccup must not make a batch size look dear for good.
            self._factor[place] += min(wrong, 0.0) if self._seen[place] else wrong
        else:
            wrong = min(max(wrong, -0.5), 0.3)
            self._factor[place] += wrong / min(self._seen[place] + 1, 20)
            if place != STEP and self._seen[place] >= 3:
                self._speed += 0.1 * wrong
        self._seen[place] += 1

    def seen(self, place: int) -> int:
        """How often a cost was observed."""
        return self._seen[place] if place <= self.most else 0

    def step_seconds(self) -> float:
        """Seconds of one draft step; 0.0 before the first."""
        return math.exp(self._factor[STEP] + self._speed) if self._seen[STEP] else 0.0

    def pass_seconds(self, n: int) -> float:
        """Seconds of a target pass over n tokens: measured, a little less while measured rarely, or else hoped for."""
        if self._seen[n]:
            return math.exp(self._factor[n] + self._speed) * (1 - 0.15 / self._seen[n] ** 2)
        known = [place for place in range(1, self.most + 1) if self._seen[place]]
        if not known:
            return 1.0 + GROWTH * (n - 1)
        nearest = min(known, key=lambda place: (abs(place - n), place))
        # Beyond what is measured a pass costs at least its share of the largest one measured.
        grown = (1 + GROWTH * (n - 1)) / (1 + GROWTH * (nearest - 1))
        return math.exp(self._factor[nearest] + self._speed) * (grown if n > nearest else min(grown, 1.0))


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

    def __init__(self, costs: Costs, most: int) -> None:
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
            probes.append((self._probe_interval(rate, step, free), source))
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

    def _probe_interval(self, rate: Doubles, step_seconds: float, free: bool) -> int:
        """After how many rounds without a draft one is spent on learning: the dearer, the longer.

        At once where a cost was measured once only, when whatever is used for the first time is made ready.
        """
        if self.costs.seen(2) < 2 or (not free and self.costs.seen(STEP) < 2):
            return 0
        lost = (1 - rate[1] / rate[0]) * (self.costs.pass_seconds(2) + step_seconds)
        return max(8, int(lost / (PROBE_SHARE * self.costs.pass_seconds(1))))


GRAM = 3  # tokens that must agree
TRIED = 8  # earlier places compared for the longest agreement
AGREEMENT = 32  # agreement beyond this says nothing more


class Lookup:
    """The tokens of a text, and where each run of three stood before.

    Ids below zero stand where an image or a sound is: they equal nothing, each other included, and are never proposed.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._earlier: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self.tokens.append(token)
            key = tuple(self.tokens[-GRAM:])
            self._earlier.append(self._latest.get(key, -1))
            if min(key) >= 0:
                self._latest[key] = len(self.tokens) - 1

    def find(self, length: int) -> tuple[list[int], int]:
        """What may follow.

        Args:
            length: tokens wanted.

        Returns:
            `length` tokens, or as many as stand before an image or a sound, and how many tokens before them agree with
            the end of the text; ([], 0) when fewer than three do. Where the earlier place overlaps the end, the text is
            taken to repeat itself.
        """
        if len(self.tokens) < GRAM:
            return [], 0
        place, best, matched = self._earlier[-1], -1, 0
        for _ in range(TRIED):
            if place < GRAM - 1:
                break
            if self.tokens[place + 1] >= 0 and (agreed := self._agreed(place)) > matched:
                best, matched = place, agreed
            place = self._earlier[place]
        if best < 0:
            return [], 0
        period = len(self.tokens) - 1 - best
        following = (self.tokens[best + 1 + i % period] for i in range(length))
        return list(takewhile(lambda token: token >= 0, following)), matched

    def _agreed(self, place: int) -> int:
        """How many tokens up to and including `place` equal the latest ones."""
        last, tokens = len(self.tokens) - 1, self.tokens
        for back in range(min(place + 1, AGREEMENT)):
            if tokens[place - back] != tokens[last - back] or tokens[last - back] < 0:
                return back
        return min(place + 1, AGREEMENT)
