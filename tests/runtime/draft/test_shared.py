"""How far is drafted where several sequences share a pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.draft.shared import OfOne, SharedPolicy

MOST = 15


def costs(of_rows: Callable[[int], float], count: int, step: float = 0.01) -> Costs:
    """Passes over so many rows take what a function says."""
    made = Costs(count * (MOST + 1))
    for _ in range(10):
        for rows in range(1, made.most + 1):
            made.observe(rows, of_rows(rows))
        made.observe(STEP, step)
    return made


def played(policy: SharedPolicy, count: int, chance: float, rounds: int, free: bool = False) -> list[list[int]]:
    """Lengths of rounds in which each token is right with a chance."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(rounds):
        chosen = policy.choose({number: {"mtp": (MOST, free)} for number in range(count)}, count)
        for number, (kind, length) in chosen.items():
            hits = int((np.cumprod(rng.random(length) < chance)).sum())
            policy.observe(number, kind, length, hits, hits + 1)
        found.append([length for _, length in chosen.values()])
    return found


def test_the_more_share_a_pass_the_less_is_drafted() -> None:
    """Where rows are nearly free up to a number of them, and dear beyond."""
    mean = []
    for count in (1, 2, 4, 8):
        policy = SharedPolicy(costs(lambda rows: 1.0 + 0.01 * rows + 0.2 * max(rows - 8, 0), count), count, MOST)
        mean.append(float(np.mean(played(policy, count, 0.8, 300)[100:])))
    assert mean == sorted(mean, reverse=True)
    assert mean[0] > 4
    assert 2 < mean[1] < 5
    assert mean[3] < 0.5


def test_nothing_where_rows_cost_as_much_as_passes() -> None:
    """But for one now and then, to see whether that has changed."""
    policy = SharedPolicy(costs(lambda rows: 1.0 * rows, 4), 4, MOST)
    lengths = np.array(played(policy, 4, 0.9, 2000))
    assert 0 < (lengths > 0).mean() < 0.05
    assert lengths.max() == 1


def test_one_that_is_never_right_takes_no_draft_steps() -> None:
    """The rows beside it are there anyway; what costs something is drafting them."""
    policy = SharedPolicy(costs(lambda rows: 1.0 + 0.001 * rows, 2, step=0.05), 2, MOST)
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen = policy.choose({0: {"mtp": (MOST, False)}, 1: {"mtp": (MOST, False)}}, 2)
        for number, chance in ((0, 0.95), (1, 0.0)):
            kind, length = chosen[number]
            hits = int((np.cumprod(rng.random(length) < chance)).sum())
            policy.observe(number, kind, length, hits, hits + 1)
    assert chosen[0][1] > 4
    assert chosen[1][1] <= 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_plain_pass_comes_first_and_again(count: int) -> None:
    """Without its cost nothing can be compared."""
    made = Costs(count * (MOST + 1))
    policy = SharedPolicy(made, count, MOST)
    offers = {number: {"mtp": (MOST, False)} for number in range(count)}
    for _ in range(2):
        assert {length for _, length in policy.choose(offers, count).values()} == {0}
        made.observe(count, 1.0)
    assert {length for _, length in policy.choose(offers, count).values()} == {1}  # no leap into the unknown
    lengths = [max(each) for each in played(SharedPolicy(costs(lambda rows: 1.0, count), count, MOST), count, 1.0, 400)]
    assert lengths.count(0) == 2
    assert max(lengths) == MOST


def test_no_more_than_is_offered() -> None:
    policy = SharedPolicy(costs(lambda rows: 1.0, 3), 3, MOST)
    played(policy, 3, 1.0, 50)
    chosen = policy.choose({0: {"mtp": (2, False), "lookup 4": (1, True)}, 1: {"mtp": (9, False)}, 2: {}}, 3)
    assert chosen[0][1] <= 2
    assert 2 < chosen[1][1] <= 9
    assert chosen[2] == ("", 0)
    assert policy.choose({}, 3) == {}
    assert policy.choose({1: {"mtp": (0, False)}}, 3) == {1: ("", 0)}


def test_one_of_them() -> None:
    """As `Proposals` asks for a single sequence."""
    policy = OfOne(SharedPolicy(costs(lambda rows: 1.0, 2), 2, MOST), 1)
    for _ in range(20):
        kind, length = policy.choose({"mtp": (MOST, False)})
        policy.observe(kind, length, length, length + 1)
    assert (kind, length) == ("mtp", MOST)
