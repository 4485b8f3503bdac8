"""How far to draft where several sequences share a pass: the lengths that together make most tokens a second.

A pass gives every sequence equally many rows (runtime/many/slots.py), so the sequences have one number of rows in
common, and what a row costs is that of one row in each. The believed acceptance is each sequence's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime.draft.length import (
    CLEARLY,
    HYSTERESIS,
    PROBE_SHARE,
    REFRESH,
    REST,
    Acceptance,
    Doubles,
    Prices,
)

# For each source the longest draft it can give now, and whether its tokens are free.
Offers = Mapping[str, tuple[int, bool]]


@dataclass(frozen=True)
class Best:
    """What a sequence would best draft, for every number of rows in common.

    Attributes:
        kind: of the source, "" for none.
        lengths: how many tokens with room for 0, 1, ... of them, shape [most + 1].
        tokens: how many of these are accepted, on average.
        steps: passes of the drafter that they take.
    """

    kind: str
    lengths: npt.NDArray[np.intp]
    tokens: Doubles
    steps: npt.NDArray[np.intp]


class SharedPolicy:
    """Chooses sources of drafts and lengths for every round of several sequences.

    Args:
        costs: what passes, by the rows of all sequences, and draft steps take.
        count: sequences at most.
        most: longest draft of one of them.
    """

    def __init__(self, costs: Prices, count: int, most: int) -> None:
        self.costs, self.most = costs, most
        self._acceptance: list[dict[str, Acceptance]] = [{} for _ in range(count)]
        self._tried = max([1, *(rows // count for rows in range(count, count * (most + 1) + 1) if costs.seen(rows))])
        self._previous = self._idle = self._drafting = self._rest = 0

    def choose(self, offers: Mapping[int, Offers], n_pass: int) -> dict[int, tuple[str, int]]:
        """Sources and lengths for a round.

        Args:
            offers: of the sequences for which lengths are to be chosen.
            n_pass: sequences that the pass decodes, each with one row beside its draft.

        Returns:
            For each sequence of `offers` a source and how many tokens, 0 for none.
        """
        nothing = dict.fromkeys(offers, ("", 0))
        if not any(most for each in offers.values() for most, _ in each.values()):
            return nothing
        if self.costs.seen(n_pass) < 2 or self._drafting >= REFRESH:
            self._drafting = 0
            return nothing
        if self._rest > 0:
            self._rest -= 1
            self._idle += 1
            return nothing
        plain = self.costs.pass_seconds(n_pass)
        longest = min(self.most, 2 * self._tried - 1)
        best = {number: self._best(number, each, longest, n_pass / plain) for number, each in offers.items()}
        rate = self._rates(best, longest, n_pass)
        common = self._common(rate, plain, n_pass)
        self._tried = max(self._tried, common + 1)
        self._idle = 0 if common else self._idle + 1
        self._drafting = self._drafting + 1 if common else 0
        return {number: (each.kind, int(each.lengths[common])) for number, each in best.items()}

    def observe(self, number: int, kind: str, drafted: int, accepted: int, tokens: int) -> None:
        """A round gave a sequence `tokens` tokens, `accepted` of its `drafted` ones among them."""
        if drafted:
            self._of(number, kind).observed(drafted, accepted)
        for acceptance in self._acceptance[number].values():
            acceptance.passed(tokens)

    def _of(self, number: int, kind: str) -> Acceptance:
        known = self._acceptance[number]
        if kind not in known:
            known[kind] = Acceptance(self.most)
        return known[kind]

    def _best(self, number: int, offers: Offers, longest: int, speed: float) -> Best:
        """The best of a sequence's sources, draft steps weighed at the speed of plain passes, in tokens a second."""
        found = Best("", *(np.zeros(longest + 1, kind) for kind in (np.intp, np.float64, np.intp)))  # type: ignore[arg-type]
        top = 0.0
        for kind, (most, free) in offers.items():
            if (most := min(most, longest)) < 1:
                continue
            tokens = np.concatenate([[0.0], np.cumsum(self._of(number, kind).reach(most))])
            steps = np.arange(most + 1) * (not free)
            worth = tokens - steps * self.costs.step_seconds() * speed
            # The best of no more than n. One token is always tried where its row is there anyway, for what it tells.
            higher = np.concatenate([[True], worth[1:] > np.maximum.accumulate(worth)[:-1]])
            lengths = np.maximum.accumulate(np.where(higher, np.arange(most + 1), 0))
            lengths = np.maximum(lengths[np.minimum(np.arange(longest + 1), most)], np.arange(longest + 1) > 0)
            if not found.kind or worth.max() > top:
                top, found = float(worth.max()), Best(kind, lengths, tokens[lengths], steps[lengths])
        return found

    def _rates(self, best: Mapping[int, Best], longest: int, n_pass: int) -> Doubles:
        """Tokens a second of a round with room for 0, 1, ... drafted tokens in each sequence."""
        tokens: Doubles = n_pass + np.sum([each.tokens for each in best.values()], axis=0)
        steps = np.sum([each.steps for each in best.values()], axis=0)
        passes = np.array([self.costs.pass_seconds(n_pass * (n + 1)) for n in range(longest + 1)])
        made: Doubles = tokens / (passes + steps * self.costs.step_seconds())
        return made

    def _common(self, rate: Doubles, plain: float, n_pass: int) -> int:
        """How many tokens each sequence has room for."""
        common = int(rate.argmax())
        if self._previous < len(rate) and rate[common] < HYSTERESIS * rate[self._previous]:
            common = self._previous
        if not common and len(rate) > 1:
            # Where drafts do not pay, one now and then, for what it tells: the dearer, the rarer.
            lost = (1 - rate[1] / rate[0]) * self.costs.pass_seconds(2 * n_pass)
            wait = max(8, int(lost / (PROBE_SHARE * plain))) - self._idle
            if wait <= 0:
                return 1
            if rate[1:].max() < CLEARLY * rate[0]:
                self._rest = min(REST, wait - 1)
        self._previous = common
        return common


class OfOne:
    """What `Proposals` asks of a policy, for one of the sequences.

    Args:
        shared: the policy of all.
        number: of this one.
    """

    def __init__(self, shared: SharedPolicy, number: int) -> None:
        self._shared, self._number, self.most = shared, number, shared.most

    def choose(self, offers: Offers) -> tuple[str, int]:
        """For a pass over this sequence alone."""
        return self._shared.choose({self._number: offers}, 1)[self._number]

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """As `SharedPolicy.observe`."""
        self._shared.observe(self._number, source, drafted, accepted, tokens)
