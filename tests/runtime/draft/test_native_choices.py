"""What the library chooses, looks up and believes, against the same in Python (`draft_reference.py`)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise, product

import draft_reference as reference
import numpy as np
import pytest
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.draft.lookup import Lookup
from gemma_mtp.runtime.draft.policy import Policy
from gemma_mtp.runtime.request import MOST
from mtp_library import Company

SOURCES = ("a", "b", "c")  # kinds in the order in which they are first told


class History:
    """A random history, told to the library and to the reference."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.costs, self.known = Costs(MOST + 1), reference.Costs(MOST + 1)
        self.growth, self.step = self.random.uniform(0.0, 0.4), self.random.uniform(0.0005, 0.01)
        for _ in range(self.random.choice((0, 0, 60))):  # some know costs beforehand
            self.measured(self.random.randint(0, MOST + 1))
        self.policy, self.wanted = Policy(self.costs, MOST), reference.Policy(self.known, MOST)
        self.chance = dict.fromkeys(SOURCES, 0.5)

    def measured(self, place: int) -> None:
        """A pass, or a step, with the noise of a machine."""
        seconds = 0.03 * (1 + self.growth * (place - 1)) if place else self.step
        seconds *= math.exp(self.random.gauss(0, 0.05)) * (1.8 if self.random.random() < 0.02 else 1.0)
        self.costs.observe(place, seconds)
        self.known.observe(place, seconds)

    def offers(self) -> dict[str, tuple[int, bool]]:
        """Sometimes one source, sometimes all, in any order after the first time."""
        found = {name: (self.random.randint(0, MOST), name != "b") for name in SOURCES if self.random.random() < 0.7}
        found["b"] = (self.random.choice((MOST, MOST, MOST, 3, 0)), False)
        return found

    def round(self) -> tuple[str, int]:
        """Choose, draft, learn; what both chose."""
        offers = self.offers()
        chosen = self.policy.choose(offers)
        assert chosen == self.wanted.choose(offers)
        if self.random.random() < 0.02:
            self.chance[self.random.choice(SOURCES)] = self.random.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        source, length = chosen
        accepted = 0
        while accepted < length and self.random.random() < self.chance[source]:
            accepted += 1
        self.measured(length + 1)
        if length:
            self.measured(STEP)
        self.policy.observe(source, length, accepted, accepted + 1)
        self.wanted.observe(source, length, accepted, accepted + 1)
        return chosen


@pytest.mark.parametrize("seed", range(8))
def test_both_choose_alike_whatever_happened(seed: int) -> None:
    history = History(seed)
    for name in SOURCES:  # the first of each, in order: a tie between probes goes to the one told first
        history.policy.observe(name, 1, 1, 2)
        history.wanted.observe(name, 1, 1, 2)
    chosen = [history.round() for _ in range(600)]
    assert len({length for _, length in chosen}) > 1
    for place in range(1, MOST + 2):
        assert math.isclose(history.costs.pass_seconds(place), history.known.pass_seconds(place), rel_tol=1e-9)
        assert history.costs.seen(place) == history.known.seen(place)


@pytest.mark.parametrize("seed", range(4))
def test_both_find_the_same_in_a_text(seed: int) -> None:
    """Of few words, so that much repeats itself, with images in between."""
    chooser = random.Random(seed)
    lookup, wanted, found = Lookup(), reference.Lookup(), 0
    for _ in range(400):
        run = [chooser.choice((1, 2, 3, 4, 5, 5, 5, -7 if chooser.random() < 0.2 else 6))]
        if chooser.random() < 0.2 and len(wanted.tokens) > 12:
            begin = chooser.randrange(len(wanted.tokens) - 12)
            run = wanted.tokens[begin : begin + chooser.randint(3, 12)]
        lookup.extend(run)
        wanted.extend(run)
        length = chooser.randint(0, 9)
        assert lookup.find(length) == wanted.find(length)
        found += bool(lookup.find(4)[0])
    assert found > 100


SLOTS, LENGTH = 3, 4
DRAFTER, TEXT = 0, 4  # kinds


def seconds(n: int) -> float:
    """A pass over n rows, with a step after eight of them, as kernels have."""
    return 0.030 + 0.002 * n + (0.012 if n > 8 else 0.0)


@contextmanager
def company(hits: Sequence[int], step: float = 0.001) -> Iterator[tuple[Company, list[reference.Acceptance]]]:
    """Sequences whose drafts of four had so many tokens accepted, and what is believed of each.

    Args:
        hits: of each sequence, accepted tokens of each draft.
        step: seconds of a draft step.
    """
    costs = Costs(SLOTS * (LENGTH + 1))
    for _ in range(400):
        for n in range(1, SLOTS * (LENGTH + 1) + 1):
            costs.observe(n, seconds(n))
        costs.observe(STEP, step)
    beliefs = [reference.Acceptance(LENGTH) for _ in hits]
    with closing(Company(costs, SLOTS, LENGTH)) as made:
        for sequence, accepted in enumerate(hits):
            for _ in range(20):
                made.observe(sequence, DRAFTER, LENGTH, accepted)
                beliefs[sequence].observed(LENGTH, accepted)
                beliefs[sequence].passed(accepted + 1)
        yield made, beliefs


def drafters(most: Sequence[int] = (LENGTH,) * SLOTS) -> list[tuple[int, int, int, bool]]:
    return [(sequence, DRAFTER, each, False) for sequence, each in enumerate(most)]


def rate(lengths: Sequence[int], beliefs: Sequence[reference.Acceptance], step: float, equal: bool) -> float:
    """Expected tokens a second of a round of all sequences."""
    tokens = sum(1 + float(belief.reach(n).sum()) for n, belief in zip(lengths, beliefs, strict=True))
    rows = [n + 1 for n in lengths]
    if not equal:
        return tokens / (seconds(sum(rows)) + max(lengths) * step)
    ends = [0, *sorted(set(rows))]
    cut = [sum(each >= end for each in rows) * (end - begin) for begin, end in pairwise(ends)]
    return tokens / (sum(map(seconds, cut)) + max(lengths) * step)


@pytest.mark.parametrize("hits", [(4, 4, 4), (4, 1, 0), (2, 0, 4), (0, 0, 1)])
@pytest.mark.parametrize("equal", [False, True])
def test_sequences_that_share_a_pass_get_the_rows_that_bring_most(hits: tuple[int, ...], equal: bool) -> None:
    """Compared with every choice of lengths; where all get equally many rows, with every such choice."""
    with company(hits) as (policy, beliefs):
        found = policy.choose(drafters(), SLOTS, equal)
        choices = product(range(LENGTH + 1), repeat=SLOTS)
        wanted = max(rate(each, beliefs, 0.001, equal) for each in choices if not equal or len(set(each)) == 1)
        assert rate(found, beliefs, 0.001, equal) >= 0.998 * wanted
        assert not equal or len(set(found)) == 1
        assert max(found) > 0


def test_one_that_has_little_room_costs_the_others_a_pass_or_their_drafts() -> None:
    with company((4, 4, 4)) as (policy, beliefs):
        found = policy.choose(drafters((LENGTH, 1, LENGTH)), SLOTS, True)
        assert found[1] <= 1
        possible = [(n, min(n, 1), n) for n in range(LENGTH + 1)]
        assert rate(found, beliefs, 0.001, True) >= 0.998 * max(rate(each, beliefs, 0.001, True) for each in possible)


def test_of_two_sources_of_a_sequence_the_better_is_taken() -> None:
    with company((0, 4, 4)) as (policy, _):
        for sequence, accepted in ((0, 4), (1, 0)):
            for _ in range(20):
                policy.observe(sequence, TEXT, LENGTH, accepted)
        texts = [(sequence, TEXT, LENGTH, True) for sequence in (0, 1)]
        lengths = policy.choose([*drafters(), *texts], SLOTS)
        assert lengths[0] == 0 and lengths[1] > 0 and lengths[2] > 0
        assert lengths[3] > 0 and lengths[4] == 0


@pytest.mark.parametrize("equal", [False, True])
def test_in_company_too_drafts_that_fail_are_tried_now_and_then(equal: bool) -> None:
    with company((0, 0, 0), step=0.02) as (policy, _):
        made = np.zeros(SLOTS, int)
        for _ in range(600):
            lengths = policy.choose(drafters(), SLOTS, equal)
            made += lengths
            for sequence, length in enumerate(lengths):
                policy.observe(sequence, DRAFTER, length, 0)
        assert (made > 0).all() and made.sum() < 0.1 * 600 * SLOTS


def test_a_plain_pass_over_as_many_sequences_is_timed_first() -> None:
    costs = Costs(SLOTS * (LENGTH + 1))
    with closing(Company(costs, SLOTS, LENGTH)) as policy:
        for _ in range(2):
            assert policy.choose(drafters(), SLOTS) == [0] * SLOTS
            costs.observe(SLOTS, seconds(SLOTS))
        assert sum(policy.choose(drafters(), SLOTS)) > 0


def test_a_row_pays_down_to_a_chance_that_grows_with_its_cost() -> None:
    with company((4, 4, 4)) as (cheap, _):
        cheap.choose(drafters()[:1], 1)
        low = cheap.floor()
    with company((4, 4, 4), step=0.004) as (dear, _):
        dear.choose(drafters()[:1], 1)
        assert 0 < low < dear.floor() < 1
    with company((0, 0, 0), step=0.02) as (plain, _):
        plain.choose(drafters()[:1], 1)
        assert plain.floor() == 0
