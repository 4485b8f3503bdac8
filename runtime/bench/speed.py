"""Tokens per second, plain and with MTP: ours, and llama-server's on the same pair, in turn."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.runtime.bench.rates import AUTO_LENGTH, OWN, Rates, expected_tokens, rate, report, server_report
from gemma_mtp.runtime.bench.server import Run, Server, can_draft
from gemma_mtp.runtime.bench.settings import Chance, Settings, Step
from gemma_mtp.runtime.bench.worker import Worker
from gemma_mtp.runtime.request import DraftLength

ROUNDS = (1, 2, 3, 4, 5, 6, 7, 8)  # draft lengths
SERVER_LENGTHS = (1, 2, 3, 4)  # those that llama-server's best is chosen from
DRAFT_LENGTH = 3  # for the drafter's own tokens


@dataclass(frozen=True)
class Case:
    """What is generated: without a drafter ("plain"), with its own drafts ("own"), or accepted with a chance."""

    name: str
    chance: Chance | None = None


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
        plain = Case("plain")
        lengths = {who: self._server_rounds(who) for who, binary in self.binaries.items() if can_draft(binary, True)}
        cases = [Case(chance.name, chance) for chance in self.settings.acceptance]
        cases += [Case(OWN)] if self.settings.own else []
        found, chosen = {}, {}
        for place, case in enumerate([plain, *cases]):
            self._step(f"tokens per second, {case.name}", place, len(cases) + 1)
            able = [who for who, binary in self.binaries.items() if self._able(binary, case)]
            chosen[case.name] = {who: self._server_length(who, case, lengths.get(who, {})) for who in able}
            found[case.name] = self._in_turn(case, chosen[case.name])
        first = found.pop("plain")
        for who in self.binaries:
            self.others[who] = {"server": server_report(who, first, found, chosen)}
        return report(first, found)

    def _able(self, binary: Path, case: Case) -> bool:
        """Whether a llama-server can generate so. None knows chances that take turns."""
        if case.chance is not None and case.chance.switches:
            return False
        return case.name == "plain" or can_draft(binary, case.chance is not None)

    def _in_turn(self, case: Case, lengths: Mapping[str, int]) -> Rates:
        """Ours without and with MTP and the servers, again and again."""
        rates = Rates()
        with ExitStack() as stack:
            servers = {who: stack.enter_context(self._server(who, case, length)) for who, length in lengths.items()}
            for server in servers.values():
                server.run(self.prompt, 4, 0)  # reads the prompt
            for visit in range(self.settings.repeat):
                runs = self._generate(case, 0, visit)
                rates.plain.append(rate(runs))
                if visit == 0:
                    rates.plain_tokens = [run["tokens"] for run in runs if "tokens" in run]
                for length in self._lengths(case):
                    runs = self._generate(case, length, visit)
                    rates.mtp.setdefault(length, []).append(rate(runs))
                    rates.runs.setdefault(length, []).extend(runs)
                if case.name != "plain":
                    self._measure_auto(rates, case, visit)
                for who, server in servers.items():
                    rates.servers.setdefault(who, []).append(self._server_rate(server, case, lengths[who], visit))
        return rates

    def _measure_auto(self, rates: Rates, case: Case, visit: int) -> None:
        """The draft length "auto", which begins knowing nothing, and is timed once it has learned."""
        self.ours.call("forget")
        learned: list[dict[str, Any]] = []
        while sum(run["generated"] for run in learned) < self.settings.warm_tokens:
            # Drafts that are replayed fall otherwise each time.
            runs = self._generate(case, AUTO_LENGTH, visit, 1 + len(learned))
            learned += runs
            if not any(run["generated"] for run in runs):
                break
        runs = self._generate(case, AUTO_LENGTH, visit)
        rates.auto.append(rate(runs))
        rates.runs.setdefault(AUTO_LENGTH, []).extend(runs)
        if learned:
            rates.learning.append(rate(learned))

    def _lengths(self, case: Case) -> tuple[int, ...]:
        if case.name == "plain":
            return ()
        if self.settings.draft:
            return self.settings.draft
        return (DRAFT_LENGTH,) if case.chance is None else (best_length(case.chance, self.cost),)

    def _generate(self, case: Case, length: DraftLength, visit: int, again: int = 0) -> list[dict[str, Any]]:
        n, seed = self.settings.tokens, self.settings.seed
        if case.name != OWN:
            seed += 1000 * visit + 100 * again
            chance, n = (case.chance.name, case.chance.tokens(n)) if case.chance else (None, n)
            return [self.ours.call("replay", n=n, length=length, chance=chance, seed=seed)]
        return [
            self.ours.call("generate", prompt=text, n=n, length=length, temp=self.settings.temp, seed=seed + place)
            for place, text in enumerate(self._texts)
        ]

    def _server(self, who: str, case: Case, length: int) -> Server:
        chance = case.chance.levels[0] if case.chance else None
        return Server(
            self.binaries[who], self.settings.target, self.settings.drafter if length else None, length, chance,
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
            return expected_tokens(case.chance, length) / run.round_seconds
        runs = [server.run(text, n, seed, self.settings.temp, ignore_eos=False) for text in self._texts]
        return sum(run.generated for run in runs) / sum(run.seconds for run in runs)

    def _server_rounds(self, who: str) -> dict[int, float]:
        """Seconds of a server's round by draft length; they do not depend on how much of a draft is accepted."""
        found = {}
        for place, length in enumerate(SERVER_LENGTHS if self.settings.acceptance else ()):
            self._step(f"best draft length of llama-server, {who}", place, len(SERVER_LENGTHS))
            with self._server(who, Case("0.5", Chance((0.5,))), length) as server:
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


def best_length(chance: Chance, cost: Mapping[str, Any]) -> int:
    """The draft length with most expected tokens per second, from measured passes and rounds."""

    def rate(length: int) -> float:
        taken = cost["target_pass_ms"][str(length + 1)] + cost["draft_round_ms"][str(length)]
        return expected_tokens(chance, length) / float(taken)

    return max(ROUNDS, key=rate)
