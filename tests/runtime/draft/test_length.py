"""The policy of draft lengths, simulated with the cost tables that were measured at E2B shape (KERNELS of the project).

Each run has the noise of a machine: passes vary, speed drifts, and one pass in a hundred takes nearly twice as long.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from draft_reference import Acceptance, rates
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.draft.policy import Policy

Level = Callable[[int], float]
MOST = 15
# Milliseconds of a target pass over n tokens, E2B shape, Q4_0, context 256, two Zen 5 cores.
STOCK = {1: 41.9, 2: 70.6, 3: 96.1, 4: 78.9, 5: 108, 6: 134, 8: 146, 12: 194, 16: 242}
MULTI_ROW = {1: 32.9, 2: 36.2, 3: 42.9, 4: 46.0, 5: 55.4, 6: 59.5, 7: 68.9, 8: 75.2, 9: 88.4, 16: 160}
SLOW_MEMORY = {1: 42.4, 2: 42.4, 3: 46.2, 4: 49.3, 5: 58.8, 6: 60.2, 7: 67.8, 8: 72.5, 9: 84.3, 16: 150}
TABLES = {
    "stock": (STOCK, 0.45),
    "dense head": (STOCK, 5.5),
    "multi-row": (MULTI_ROW, 0.45),
    "slow": (SLOW_MEMORY, 0.45),
}
CONSTANT = (0.0, 0.2, 0.35, 0.6, 0.8, 0.95)


def always(level: float) -> Callable[[int], float]:
    """The same chance, however many tokens were made."""
    return lambda made: level


LEVELS = {str(level): always(level) for level in CONSTANT}
LEVELS["switching"] = lambda made: 0.1 if made // 64 % 2 == 0 else 0.9


class Machine:
    """Simulated passes; times in seconds."""

    def __init__(self, table: dict[int, float], step: float, seed: int) -> None:
        self.random, self.drift = random.Random(seed), 0.0
        self.milliseconds = np.interp(np.arange(1, MOST + 2), list(table), list(table.values()))
        self.step = step

    def noise(self) -> float:
        return math.exp(self.drift + self.random.gauss(0, 0.05)) * (1.8 if self.random.random() < 0.01 else 1.0)

    def run(self, tokens: int, level: Level, choose: Callable[[], int], told: Callable[..., None]) -> float:
        """Tokens per second of a run with the lengths that `choose` gives."""
        made, seconds = 0, 0.0
        while made < tokens:
            self.drift = 0.95 * self.drift + self.random.gauss(0, 0.0125)
            length, accepted = choose(), 0
            while accepted < length and self.random.random() < level(made):
                accepted += 1
            passed = float(self.milliseconds[length]) / 1000 * self.noise()
            drafting = length * self.step / 1000 * self.noise()
            told(length, accepted, passed, drafting)
            made, seconds = made + accepted + 1, seconds + passed + drafting
        return made / seconds


def adaptive(table: dict[int, float], step: float, level: Level, seed: int) -> float:
    """Tokens per second of 384 tokens, after 256 that taught the policy."""
    costs = Costs(MOST + 1)
    policy, machine = Policy(costs, MOST), Machine(table, step, seed)

    def told(length: int, accepted: int, passed: float, drafting: float) -> None:
        costs.observe(length + 1, passed)
        if length:
            costs.observe(STEP, drafting / length)
        policy.observe("mtp", length, accepted, accepted + 1)

    def choose() -> int:
        return policy.choose({"mtp": (MOST, False)})[1]

    machine.run(256, level, choose, told)
    return machine.run(384, level, choose, told)


def fixed(table: dict[int, float], step: float, level: Level, length: int) -> float:
    """Tokens per second with one length throughout."""
    return Machine(table, step, 1000).run(6000, level, lambda: length, lambda *_: None)


@pytest.mark.parametrize("name", TABLES)
def test_never_slower_than_plain_and_near_the_best_fixed_length(name: str) -> None:
    table, step = TABLES[name]
    for level in LEVELS.values():
        ours = float(np.mean([adaptive(table, step, level, seed) for seed in range(12)]))
        plain, *others = [fixed(table, step, level, length) for length in (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14)]
        assert ours >= 0.97 * plain, (name, ours / plain)
        assert ours >= 0.94 * max(plain, *others), (name, ours / max(plain, *others))


def test_switching_acceptance_is_followed() -> None:
    """Better than any fixed length, where lengths differ in what they bring."""
    for name in ("multi-row", "slow"):
        table, step = TABLES[name]
        ours = np.mean([adaptive(table, step, LEVELS["switching"], seed) for seed in range(12)])
        assert ours > max(fixed(table, step, LEVELS["switching"], length) for length in range(8))


def test_rates_are_tokens_over_seconds() -> None:
    made = rates(np.array([0.5, 0.25]), lambda n: 1.0 + 0.1 * n, 0.05)
    assert np.allclose(made, [1 / 1.1, 1.5 / 1.25, 1.75 / 1.4])


def test_acceptance_is_learned_and_forgotten() -> None:
    belief = Acceptance(4)
    assert np.all(np.diff(belief.reach(4)) < 0)
    for _ in range(20):
        belief.observed(4, 4)
        belief.passed(5)
    assert belief.reach(1)[0] > 0.85
    for _ in range(4):
        belief.observed(4, 0)
        belief.passed(1)
    assert belief.reach(1)[0] < 0.35
    low = belief.reach(1)[0]
    belief.passed(100)
    assert belief.reach(1)[0] > low


def test_places_have_odds_of_their_own() -> None:
    """First places always accepted, second ones never."""
    belief = Acceptance(2)
    for _ in range(400):
        belief.observed(2, 1)
    first, second = belief.reach(2)
    assert second / first < 0.6


def known(table: dict[int, float], step_seconds: float) -> Costs:
    """Costs that were measured often."""
    costs = Costs(MOST + 1)
    for n, value in table.items():
        for _ in range(5):
            costs.observe(n, value / 1000)
            costs.observe(STEP, step_seconds)
    return costs


def test_where_drafts_clearly_do_not_pay_few_are_made_until_a_source_comes_up() -> None:
    for rounds in range(100, 106):
        policy = Policy(known(MULTI_ROW, 0.001), MOST)
        for _ in range(40):
            policy.observe("mtp", 1, 0, 1)
        lengths = [policy.choose({"mtp": (MOST, False)})[1] for _ in range(rounds)]
        assert set(lengths) == {0, 1} and 1 <= sum(lengths) <= 12
        while policy.choose({"mtp": (MOST, False)})[1]:
            pass
        assert policy.choose({"mtp": (MOST, False), "lookup": (8, True)}) != ("", 0)


def test_a_free_source_is_preferred_at_equal_acceptance_and_a_bad_one_is_left() -> None:
    policy = Policy(known(STOCK, 0.01), MOST)
    offers = {"mtp": (3, False), "lookup": (3, True)}
    for _ in range(5):
        policy.observe("mtp", 3, 3, 4)
        policy.observe("lookup", 3, 3, 4)
    assert policy.choose(offers) == ("lookup", 3)
    for _ in range(10):
        policy.observe("lookup", 3, 0, 1)
        policy.observe("mtp", 3, 3, 4)
    assert policy.choose(offers) == ("mtp", 3)
    assert policy.choose({"mtp": (0, False)})[1] == 0


def test_costs_are_measured_kept_and_damaged_files_ignored(tmp_path: Path) -> None:
    costs = Costs(8)
    assert costs.pass_seconds(3) > costs.pass_seconds(1)
    for _ in range(10):
        costs.observe(1, 0.040)
        costs.observe(4, 0.080)
        costs.observe(STEP, 0.001)
    costs.observe(1, 0.400)  # a hiccup
    assert 0.036 < costs.pass_seconds(1) < 0.045
    assert costs.pass_seconds(8) >= costs.pass_seconds(4)
    costs.observe(9, 1.0)  # beyond the table
    path = tmp_path / "costs" / "table.json"
    costs.save(path)
    kept = Costs.load(path, 8)
    assert math.isclose(kept.pass_seconds(4), costs.pass_seconds(4), rel_tol=0.01)
    assert [place for place in range(9) if kept.seen(place)] == [STEP, 1, 4]
    for text in ("", "{}", '{"format": 1, "factor": [1], "seen": [1], "speed": NaN}', "[]"):
        path.write_text(text)
        assert Costs.load(path, 8).seen(1) == 0
    (tmp_path / "file").write_text("")
    costs.save(tmp_path / "file" / "table.json")  # cannot be written: nothing happens


def test_a_slow_phase_does_not_look_like_a_dear_batch() -> None:
    costs = Costs(8)
    for _ in range(10):
        costs.observe(1, 0.040)
        costs.observe(4, 0.050)
    for _ in range(30):
        costs.observe(4, 0.075)
    assert costs.pass_seconds(4) / costs.pass_seconds(1) < 1.6


def test_what_is_dear_only_once_is_tried_again() -> None:
    """The first step of a drafter reads its weights from the disk."""
    costs = Costs(MOST + 1)
    policy, made = Policy(costs, MOST), []
    for _ in range(12):
        made.append(policy.choose({"mtp": (MOST, False)})[1])
        costs.observe(made[-1] + 1, 0.033 + 0.003 * made[-1])
        if made[-1]:
            costs.observe(STEP, 0.5 if sum(map(bool, made)) == 1 else 0.0005)
        policy.observe("mtp", made[-1], made[-1], made[-1] + 1)
    assert made[:4] == [0, 0, 1, 1] and min(made[4:]) > 1
