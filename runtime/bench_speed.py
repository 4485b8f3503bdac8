"""Tokens per second, plain and with MTP: ours, and llama-server's on the same pair, in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from gemma_mtp.runtime.bench_server import Run, Server
from gemma_mtp.runtime.bench_settings import Settings, Step
from gemma_mtp.runtime.bench_worker import Worker
from gemma_mtp.runtime.replay import expected_tokens

ROUNDS = (1, 2, 3, 4, 5, 6, 7, 8)  # draft lengths
SERVER_LENGTHS = (1, 2, 3, 4)  # those that llama-server's best is chosen from
DRAFT_LENGTH = 3  # for the drafter's own tokens
OWN = "own"  # what is drafted is the drafter's own, not replayed


@dataclass(frozen=True)
class Case:
    """What is generated: without a drafter ("plain"), with its own drafts ("own"), or accepted with a chance."""

    name: str
    chance: float | None = None


@dataclass
class Rates:
    """Tokens per second of one case, a value for each visit: plain, with MTP by draft length, and the servers'."""

    plain: list[float] = field(default_factory=list)
    mtp: dict[int, list[float]] = field(default_factory=dict)
    servers: dict[str, list[float]] = field(default_factory=dict)
    runs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    plain_tokens: list[list[int]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The fastest draft length."""
        return max(self.mtp, key=lambda length: median(self.mtp[length]))


class Speeds:
    """Generates and counts.

    Args:
        settings: what to measure.
        ours: the process that holds the pair, its context filled with the prompt and the continuation recorded.
        prompt: tokens of the context.
        cost: medians of target passes and draft rounds.
        binaries: llama-server to compare with, by name.
        step: told of progress.

    Attributes:
        others: what was found of the servers, after `measure`.
    """

    def __init__(
        self,
        settings: Settings,
        ours: Worker,
        prompt: list[int],
        cost: Mapping[str, Any],
        binaries: Mapping[str, Path],
        step: Step,
    ) -> None:
        self.settings, self.ours, self.prompt, self.cost, self.binaries = settings, ours, prompt, cost, binaries
        self._step = step
        self._texts = [ours.call("tokenize", text=text) for text in settings.prompts] if settings.own else []
        self.others: dict[str, dict[str, Any]] = {}

    def measure(self) -> dict[str, Any]:
        """Plain first, then every acceptance, then the drafter's own tokens; each beside plain and the servers."""
        plain, lengths = Case("plain"), {who: self._server_rounds(who) for who in self.binaries}
        cases = [Case(f"{chance:g}", chance) for chance in self.settings.acceptance]
        cases += [Case(OWN)] if self.settings.own else []
        found, chosen = {}, {}
        for place, case in enumerate([plain, *cases]):
            self._step(f"tokens per second, {case.name}", place, len(cases) + 1)
            chosen[case.name] = {who: self._server_length(who, case, lengths[who]) for who in self.binaries}
            found[case.name] = self._in_turn(case, chosen[case.name])
        first = found.pop("plain")
        for who in self.binaries:
            self.others[who] = {"server": _server_report(who, first, found, chosen)}
        return _report(first, found)

    def _in_turn(self, case: Case, lengths: Mapping[str, int]) -> Rates:
        """Ours without and with MTP and the servers, again and again."""
        rates = Rates()
        with ExitStack() as stack:
            servers = {who: stack.enter_context(self._server(who, case, length)) for who, length in lengths.items()}
            for server in servers.values():
                server.run(self.prompt, 4, 0)  # reads the prompt
            for visit in range(self.settings.repeat):
                runs = self._generate(case, 0, visit)
                rates.plain.append(_rate(runs))
                if visit == 0:
                    rates.plain_tokens = [run["tokens"] for run in runs if "tokens" in run]
                for length in self._lengths(case):
                    runs = self._generate(case, length, visit)
                    rates.mtp.setdefault(length, []).append(_rate(runs))
                    rates.runs.setdefault(length, []).extend(runs)
                for who, server in servers.items():
                    rates.servers.setdefault(who, []).append(self._server_rate(server, case, lengths[who], visit))
        return rates

    def _lengths(self, case: Case) -> tuple[int, ...]:
        if case.name == "plain":
            return ()
        if self.settings.draft:
            return self.settings.draft
        return (DRAFT_LENGTH,) if case.chance is None else (best_length(case.chance, self.cost),)

    def _generate(self, case: Case, length: int, visit: int) -> list[dict[str, Any]]:
        n, seed = self.settings.tokens, self.settings.seed
        if case.name != OWN:
            seed += 1000 * visit
            return [self.ours.call("replay", n=n, length=length, chance=case.chance or 0.0, seed=seed)]
        return [
            self.ours.call("generate", prompt=text, n=n, length=length, temp=self.settings.temp, seed=seed + place)
            for place, text in enumerate(self._texts)
        ]

    def _server(self, who: str, case: Case, length: int) -> Server:
        return Server(
            self.binaries[who], self.settings.target, self.settings.drafter if length else None, length, case.chance,
            n_ctx=self.settings.n_ctx, threads=self.settings.threads, gpu_layers=self.settings.gpu_layers,
            flash_attn=self.settings.flash_attn,
        )  # fmt: skip

    def _server_rate(self, server: Server, case: Case, length: int, visit: int) -> float:
        """Tokens per second. At a given acceptance the measured time of a round is put to the tokens expected of it.

        The server accepts at random, and a few dozen rounds would scatter by several percent.
        """
        n, seed = self.settings.tokens, self.settings.seed
        if case.name != OWN:
            run = server.run(self.prompt, n, seed + visit)
            return expected_tokens(case.chance or 0.0, length) / run.round_seconds
        runs = [server.run(text, n, seed, self.settings.temp, ignore_eos=False) for text in self._texts]
        return sum(run.generated for run in runs) / sum(run.seconds for run in runs)

    def _server_rounds(self, who: str) -> dict[int, float]:
        """Seconds of a server's round by draft length; they do not depend on how much of a draft is accepted."""
        found = {}
        for place, length in enumerate(SERVER_LENGTHS if self.settings.acceptance else ()):
            self._step(f"best draft length of llama-server, {who}", place, len(SERVER_LENGTHS))
            with self._server(who, Case("0.5", 0.5), length) as server:
                server.run(self.prompt, 4, 0)
                run: Run = server.run(self.prompt, self.settings.tokens, self.settings.seed)
                found[length] = run.round_seconds
        return found

    def _server_length(self, who: str, case: Case, rounds: Mapping[int, float]) -> int:
        """The draft length at which a server is fastest."""
        if case.name == "plain":
            return 0
        if case.chance is not None:
            chance = case.chance
            return max(rounds, key=lambda length: expected_tokens(chance, length) / rounds[length])
        rates = {}
        for length in SERVER_LENGTHS:
            with self._server(who, case, length) as server:
                rates[length] = self._server_rate(server, case, length, 0)
        return max(rates, key=lambda length: rates[length])


def best_length(chance: float, cost: Mapping[str, Any]) -> int:
    """The draft length with most expected tokens per second, from measured passes and rounds."""

    def rate(length: int) -> float:
        taken = cost["target_pass_ms"][str(length + 1)] + cost["draft_round_ms"][str(length)]
        return expected_tokens(chance, length) / float(taken)

    return max(ROUNDS, key=rate)


def _rate(runs: Iterable[Mapping[str, Any]]) -> float:
    runs = list(runs)
    return float(sum(run["generated"] for run in runs)) / float(sum(run["seconds"] for run in runs))


def _ratio(these: Iterable[float], those: Iterable[float]) -> float:
    """Median of the ratios of values measured one after the other."""
    return median(one / other for one, other in zip(these, those, strict=True))


def _report(plain: Rates, found: Mapping[str, Rates]) -> dict[str, Any]:
    """Our part of the result, at the fastest draft length of each case."""
    best = {name: rates.best for name, rates in found.items()}
    every = [run for name, rates in found.items() for run in rates.runs[best[name]]]
    result: dict[str, Any] = {
        "tokens_per_s": {
            "plain": round(median(plain.plain), 2),
            "mtp": {name: round(median(rates.mtp[best[name]]), 2) for name, rates in found.items()},
        },
        "speedup": {name: round(_ratio(r.mtp[best[name]], r.plain), 3) for name, r in found.items()},
        "draft_length": best,
        "speedup_by_length": {
            name: {str(length): round(_ratio(made, rates.plain), 3) for length, made in rates.mtp.items()}
            for name, rates in found.items()
        },
        "acceptance": {name: round(_acceptance(r.runs[best[name]]), 3) for name, r in found.items()},
        "overhead": _overhead(every),
        "replayed": [name for name in found if name != OWN],
        "left_record": sum(run.get("left_record", 0) for run in every),
    }
    if OWN in found:
        runs = found[OWN].runs[best[OWN]]
        with_mtp = [run["tokens"] for run in runs]
        once = found[OWN].plain_tokens
        result["identical"] = with_mtp == once * (len(with_mtp) // len(once))
    return result


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
    """What a round spends outside llama_decode and the draft call: share of the round, and ms."""
    runs = list(runs)
    total = sum(run["seconds"] for run in runs)
    outside = total - sum(run["decode_seconds"] + run["draft_seconds"] for run in runs)
    rounds = sum(run["rounds"] for run in runs)
    return {"share": round(outside / total, 4), "ms_per_round": round(outside / rounds * 1e3, 3)} if rounds else {}


def _server_report(
    who: str, plain: Rates, found: Mapping[str, Rates], chosen: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """A server's part. Its speed-up is over its own plain speed, by way of ours, which was measured beside both."""
    of_plain = _ratio(plain.servers[who], plain.plain)
    return {
        "plain": round(median(plain.servers[who]), 2),
        "mtp": {name: round(median(r.servers[who]), 2) for name, r in found.items()},
        "speedup": {name: round(_ratio(r.servers[who], r.plain) / of_plain, 3) for name, r in found.items()},
        "draft_length": {name: chosen[name][who] for name in found},
        "ours_over_it": {
            "plain": round(1 / of_plain, 3),
            **{name: round(_ratio(r.mtp[r.best], r.servers[who]), 3) for name, r in found.items()},
        },
    }
