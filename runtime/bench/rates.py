"""What the visits of a measurement amount to: medians, ratios, shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import harmonic_mean, median
from typing import Any, Literal

from gemma_mtp.runtime.bench.settings import Chance

OWN = "own"  # what is drafted is the drafter's own, not replayed
AUTO_LENGTH: Literal["auto"] = "auto"  # the draft length that Llama has by default


@dataclass
class Rates:
    """Tokens per second of one case, a value for each visit: plain, with MTP by draft length, and the servers'.

    Attributes:
        plain: without MTP.
        mtp: by fixed draft length.
        auto: with the draft length "auto", and while it learned.
        servers: by build.
        runs: what the worker told, by draft length.
        plain_tokens: what the drafter's own drafts must not change.
    """

    plain: list[float] = field(default_factory=list)
    mtp: dict[int, list[float]] = field(default_factory=dict)
    auto: list[float] = field(default_factory=list)
    learning: list[float] = field(default_factory=list)
    servers: dict[str, list[float]] = field(default_factory=dict)
    runs: dict[int | str, list[dict[str, Any]]] = field(default_factory=dict)
    plain_tokens: list[list[int]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The fastest fixed draft length."""
        return max(self.mtp, key=lambda length: median(self.mtp[length]))


def expected_tokens(chance: Chance | None, length: int) -> float:
    """Tokens a round of `length` drafted tokens brings on average when each is accepted with this chance; 1 for None.

    Leviathan et al., arXiv 2211.17192, equation 1: 1 + p + ... + p^length. Of chances that take turns, the harmonic
    mean: each lasts for equally many tokens.
    """
    if chance is None:
        return 1.0
    return harmonic_mean(sum(level**place for place in range(length + 1)) for level in chance.levels)


def rate(runs: Iterable[Mapping[str, Any]]) -> float:
    """Tokens per second of runs together, by the clock on the wall."""
    runs = list(runs)
    return float(sum(run["generated"] for run in runs)) / float(sum(run["seconds"] for run in runs))


def ratio(these: Iterable[float], those: Iterable[float]) -> float:
    """Median of the ratios of values measured one after the other."""
    return median(one / other for one, other in zip(these, those, strict=True))


def report(plain: Rates, found: Mapping[str, Rates]) -> dict[str, Any]:
    """Our part of the result, at the fastest draft length of each case."""
    best = {name: rates.best for name, rates in found.items()}
    every = [run for name, rates in found.items() for run in rates.runs[best[name]]]
    result: dict[str, Any] = {
        "tokens_per_s": {
            "plain": round(median(plain.plain), 2),
            "mtp": {name: round(median(rates.mtp[best[name]]), 2) for name, rates in found.items()},
        },
        "speedup": {name: round(ratio(r.mtp[best[name]], r.plain), 3) for name, r in found.items()},
        "draft_length": best,
        "speedup_by_length": {
            name: {str(length): round(ratio(made, rates.plain), 3) for length, made in rates.mtp.items()}
            for name, rates in found.items()
        },
        "acceptance": {name: round(_acceptance(r.runs[best[name]]), 3) for name, r in found.items()},
        "auto": {name: _auto(rates) for name, rates in found.items()},
        "overhead": _overhead(every),
        "replayed": [name for name in found if name != OWN],
        "left_record": sum(
            run.get("left_record", 0) for rates in found.values() for runs in rates.runs.values() for run in runs
        ),
    }
    if OWN in found:
        once = found[OWN].plain_tokens
        result["identical"] = all(
            [run["tokens"] for run in runs] == once * (len(runs) // len(once)) for runs in found[OWN].runs.values()
        )
    return result


def _auto(rates: Rates) -> dict[str, Any]:
    """The draft length "auto" beside plain and the best fixed length, which may be none at all."""
    fixed = {0: rates.plain, **rates.mtp}
    best = max(fixed, key=lambda length: median(fixed[length]))
    runs = rates.runs[AUTO_LENGTH]
    drafted, accepted = (sum(run["stats"][key] for run in runs) for key in ("drafted", "accepted"))
    found = {
        "tokens_per_s": round(median(rates.auto), 2),
        "speedup": round(ratio(rates.auto, rates.plain), 3),
        "best_fixed": best,
        "over_best_fixed": round(ratio(rates.auto, fixed[best]), 3),
        "drafted_per_round": round(drafted / max(sum(run["stats"]["target_passes"] for run in runs), 1), 2),
        "acceptance": round(accepted / max(drafted, 1), 3),
    }
    return found | ({"learning": round(ratio(rates.learning, rates.plain), 3)} if rates.learning else {})


def _acceptance(runs: Iterable[Mapping[str, Any]]) -> float:
    """Share of draft tokens accepted among those that were compared: all up to the first that was rejected."""
    accepted = rejected = 0
    for run in runs:
        stats = run["stats"]
        whole = stats["accepted_per_position"][-1] if stats["accepted_per_position"] else 0
        accepted += stats["accepted"]
        rejected += stats["drafts"] - whole
    return accepted / max(accepted + rejected, 1)


def _overhead(runs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What a round of the loop spends outside of the target's pass and of drafting: share of the round, and ms."""
    stats = [run["stats"] for run in runs]
    total = sum(each["loop_seconds"] for each in stats)
    outside = total - sum(each["pass_seconds"] + each["draft_seconds"] for each in stats)
    rounds = sum(each["target_passes"] for each in stats)
    return {"share": round(outside / total, 4), "ms_per_round": round(outside / rounds * 1e3, 3)} if rounds else {}


def server_report(
    who: str, plain: Rates, found: Mapping[str, Rates], chosen: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """A server's part. Its speed-up is over its own plain speed, by way of ours, which was measured beside both."""
    found = {name: rates for name, rates in found.items() if who in rates.servers}
    of_plain = ratio(plain.servers[who], plain.plain)
    return {
        "plain": round(median(plain.servers[who]), 2),
        "mtp": {name: round(median(r.servers[who]), 2) for name, r in found.items()},
        "speedup": {name: round(ratio(r.servers[who], r.plain) / of_plain, 3) for name, r in found.items()},
        "draft_length": {name: chosen[name][who] for name in found},
        "ours_over_it": {
            "plain": round(1 / of_plain, 3),
            **{name: round(ratio(r.mtp[r.best], r.servers[who]), 3) for name, r in found.items()},
        },
    }
