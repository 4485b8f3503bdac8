"""Verification and noise as pure functions: whatever is drafted, the target's own tokens come out."""

from __future__ import annotations

from itertools import product

import numpy as np
from gemma_mtp.runtime.accept import walk
from gemma_mtp.runtime.draft.length import fitting
from gemma_mtp.runtime.sampling import gumbel, lowest_best
from gemma_mtp.runtime.stats import Stats


def test_every_draft_gives_the_targets_tokens() -> None:
    """All drafts of up to three tokens over a tiny vocabulary against all target continuations."""
    for target in product(range(3), repeat=4):
        for length in range(4):
            for draft in product(range(3), repeat=length):
                asked: list[int] = []

                def choose(i: int, asked: list[int] = asked, target: tuple[int, ...] = target) -> int:
                    asked.append(i)
                    return target[i]

                made = list(walk(draft, choose))
                hits = next((i for i, (a, b) in enumerate(zip(draft, target, strict=False)) if a != b), length)
                assert [token for token, _ in made] == list(target[: hits + 1])
                assert [accepted for _, accepted in made] == [True] * hits + [False]
                assert asked == list(range(hits + 1))


def test_choices_are_made_only_when_asked_for() -> None:
    choices = walk([1, 2], lambda i: i + 1)
    assert next(choices) == (1, True)


def test_draft_fits_context_and_batch() -> None:
    for wanted, past, ctx, batch in product(range(6), range(12), (1, 8, 11), (1, 3, 8)):
        length = fitting(wanted, past, ctx, batch)
        assert 0 <= length <= wanted
        assert length == 0 or (past + 1 + length <= ctx and 1 + length <= batch)
    assert fitting(3, 4, 8, 8) == 3
    assert fitting(3, 5, 8, 8) == 2


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    ids = np.arange(50, dtype=np.int32)
    noise = gumbel(7, 3, ids)
    assert np.array_equal(noise, gumbel(7, 3, ids))
    assert np.array_equal(noise[10:20], gumbel(7, 3, ids[10:20]))
    assert np.abs(noise - gumbel(8, 3, ids)).min() > 0
    assert np.abs(noise - gumbel(7, 4, ids)).min() > 0


def test_noise_is_standard_gumbel() -> None:
    """Kolmogorov-Smirnov distance of 200 000 values; 1.95 / sqrt(n) is exceeded by chance once in a thousand."""
    ids = np.arange(2000, dtype=np.int32)
    noise = np.sort(np.concatenate([gumbel(seed, 5 * seed, ids) for seed in range(100)]))
    uniform = np.exp(-np.exp(-noise))
    distance = np.abs(uniform - np.arange(len(noise)) / len(noise)).max()
    assert distance < 1.95 / np.sqrt(len(noise))


def test_argmax_of_noisy_logits_draws_the_distribution() -> None:
    """Chi-square with 7 degrees of freedom over 20 000 seeds; 24.3 is exceeded by chance once in a thousand."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -2.0])
    ids = np.array([3, 11, 200, 7, 250000, 0, 1, 99], dtype=np.int32)
    draws = np.array([int((logits + gumbel(seed, 17, ids)).argmax()) for seed in range(20_000)])
    wanted = np.exp(logits) / np.exp(logits).sum() * len(draws)
    chi2 = ((np.bincount(draws, minlength=8) - wanted) ** 2 / wanted).sum()
    assert chi2 < 24.3


def test_neighbouring_positions_are_independent() -> None:
    """Chi-square of the pairs drawn at two positions, 9 degrees of freedom; 27.9 by chance once in a thousand."""
    ids = np.arange(4, dtype=np.int32)
    pairs = np.zeros((4, 4))
    for seed in range(8000):
        pairs[gumbel(seed, 1, ids).argmax(), gumbel(seed, 2, ids).argmax()] += 1
    wanted = pairs.sum(1, keepdims=True) * pairs.sum(0, keepdims=True) / pairs.sum()
    assert ((pairs - wanted) ** 2 / wanted).sum() < 27.9


def test_argmax_takes_the_lowest_of_equals() -> None:
    assert lowest_best(np.array([9, 5, 3], dtype=np.int32), np.array([0.0, 2.0, 2.0])) == 3


def test_stats_add_up() -> None:
    one, two = Stats(tokens=4, target_passes=2, seconds=0.5), Stats(tokens=9, target_passes=2, seconds=1.0)
    one.drafted_round(["mtp"] * 3)
    one.accepted_at(0, "mtp")
    two.drafted_round(["lookup"])
    two.drafted_round(["grammar", "mtp", "mtp", "mtp"])
    two.drafted_round([])
    two.accepted_at(0, "grammar")
    two.accepted_at(1, "mtp")
    one.add(two)
    assert (one.drafts, one.drafted, one.accepted) == (3, 8, 3)
    assert one.drafted_per_position == [3, 2, 2, 1]
    assert one.accepted_per_position == [2, 1, 0, 0]
    assert one.drafted_from == {"mtp": 6, "lookup": 1, "grammar": 1}
    assert one.accepted_from == {"mtp": 2, "grammar": 1}
    assert one.acceptance == 3 / 8
    assert one.mean_accepted == 1.0
    assert one.as_dict()["tokens_per_target_pass"] == 3.0
    assert Stats().line().endswith("without MTP")
