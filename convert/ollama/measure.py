"""A pair measured through Ollama's API: on the engine that Ollama came with and on ours, with drafts and without.

Every case is a server of its own, visited in turn, as the speed of a machine drifts. Replayed acceptance is our
llama-server's `--spec-synth-rates`, set by the environment, which Ollama hands on: it drafts, verifies and samples as
ever, no further than pays, then accepts at random.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError, warn
from gemma_mtp.convert.ollama import dispatch, shadow
from gemma_mtp.convert.ollama.api import LOADING, Client
from gemma_mtp.convert.ollama.create import check_types
from gemma_mtp.convert.ollama.installation import Engine, installation, our_engine, whose
from gemma_mtp.convert.ollama.trial import ENOUGH, flag_value
from gemma_mtp.patches.source import cache_dir

Step = Callable[[str, int, int], None]
# The name of a pair in the store that is made for it.
NAME = "gemma-mtp-bench"
SYNTH, METRICS = "LLAMA_ARG_SPEC_SYNTH_RATES", "LLAMA_ARG_ENDPOINT_METRICS"
# llama-server's metrics: tokens drafted and accepted, and how many drafts had a first token, a second, ...
COUNTED = re.compile(r"^llamacpp:spec_decode_num_(draft|accepted)_tokens_total (\d+)$", re.MULTILINE)
PLACES = re.compile(r'^llamacpp:spec_decode_num_draft_tokens_per_pos_total\{position="\d+"\} (\d+)$', re.MULTILINE)


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        target, drafter: GGUF files, of a split the first.
        prompt: begins each request, after a number of its own that keeps it out of the prompt cache.
        chances: of acceptance per token, to be replayed where the engine can.
        lengths: drafts in a round, of our engine at most.
        model: one of the user's store instead of the pair.
        tokens: generated in a request.
        n_ctx, threads, temp, seed: as llama.cpp has them.
        repeat: visits, of which medians are taken.
    """

    target: Path
    drafter: Path
    prompt: str
    chances: Sequence[float]
    lengths: Sequence[int]
    model: str
    tokens: int
    n_ctx: int
    threads: int
    temp: float
    seed: int
    repeat: int


@dataclass(frozen=True)
class Run:
    """One request: tokens read and made, seconds of generation and until the first token, drafted and accepted tokens,
    how many drafts had a first token, a second, ... where that is known; the llama-server that answered, and the bytes
    of memory that it holds."""

    read: int
    made: int
    seconds: float
    first: float
    drafted: int
    accepted: int
    places: tuple[int, ...]
    engine: str
    memory: int

    def rate(self, chance: float | None) -> float:
        """Tokens a second; at a replayed chance those expected of the drafts that were made, over the time they took.

        The server accepts at random, and the few dozen rounds of a request would scatter by several percent. How far
        a round drafts is chosen before, so it does not depend on what is accepted in it.
        """
        if chance is None or not self.places:
            return self.made / self.seconds
        accepted = sum(drafts * chance ** (place + 1) for place, drafts in enumerate(self.places))
        return (self.made - self.accepted + accepted) / self.seconds


@dataclass(frozen=True)
class Case:
    """An engine, drafts in a round, and the chance that is replayed; None for what the drafts deserve."""

    who: str
    length: int
    chance: float | None = None

    @property
    def name(self) -> str:
        if not self.length:
            return "plain"
        return f"{'own' if self.chance is None else f'{self.chance:g}'}, {self.length}"


def measure(wanted: Wanted, step: Step = lambda label, done, total: None) -> dict[str, Any]:
    """Measure through Ollama.

    Returns:
        Of each engine what runs, and by case ("plain", "own, 4", "0.8, 4") tokens a second, milliseconds until the
        first token of a prompt that is not cached, acceptance, and MB of memory that llama-server holds.

    Raises:
        MtpError: Ollama or our llama-server is not installed, or does not start, or refuses the pair.
    """
    if not wanted.model:
        check_types([link.read_header(wanted.target), link.read_header(wanted.drafter)])
    found, ours = installation(), our_engine()
    programs = {"ours": shadow.shadow(found, ours) / "bin" / "ollama"}
    if dispatch.status(found).installed:
        warn("the installed Ollama has gemma-mtp's llama-server in front; to measure its own as well: gemma-mtp ollama "
             "engine remove")  # fmt: skip
    elif not found.engine.is_ours:
        programs = {"ollama": found.program, **programs}
    engines = {"ollama": found.engine, "ours": ours}
    cases = [Case(who, length, chance) for who in programs for length, chance in _cases(wanted, engines[who])]
    runs: dict[Case, list[Run]] = {case: [] for case in cases}
    with ExitStack() as stack:
        store = _store(wanted, programs["ours"], stack)
        for visit in range(wanted.repeat):
            for place, case in enumerate(cases[:: 1 if visit % 2 == 0 else -1]):
                step(f"Ollama, {case.who}, {case.name}", visit * len(cases) + place, wanted.repeat * len(cases))
                with _serving(programs[case.who], store, case) as server:
                    runs[case].append(server.run(wanted, case, visit))
    return {
        "program": str(found.program),
        "prompt_tokens": runs[cases[0]][0].read,
        "engines": {
            who: {
                "engine": whose(next(runs[c][0].engine for c in cases if c.who == who)),
                "cases": {c.name: _found(c, runs[c]) for c in cases if c.who == who},
            }
            for who in programs
        },
    }


def _cases(wanted: Wanted, engine: Engine) -> Iterator[tuple[int, float | None]]:
    """Drafts and chance of every case of an engine."""
    yield 0, None
    for length in wanted.lengths:
        yield length, None
        if engine.replays:
            yield from ((length, chance) for chance in wanted.chances)


def _found(case: Case, runs: Sequence[Run]) -> dict[str, float]:
    drafted = sum(run.drafted for run in runs)
    found = {
        "tokens_per_s": round(median(run.rate(case.chance) for run in runs), 2),
        "first_token_ms": round(1e3 * median(run.first for run in runs)),
        "memory_mb": round(median(run.memory for run in runs) / 1e6),
    }
    return found | ({"acceptance": round(sum(run.accepted for run in runs) / drafted, 3)} if drafted else {})


def _store(wanted: Wanted, program: Path, stack: ExitStack) -> Path:
    """The user's store, or one that holds the pair for as long as `stack` is open."""
    if wanted.model:
        return shadow.store_here()
    store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ollama-store-", dir=cache_dir())))
    with _serving(program, store) as server:
        files = [
            {header.path.name: server.api.upload(header.path) for header in link.read_parts(link.read_header(path))}
            for path in (wanted.target, wanted.drafter)
        ]
        body = {"model": NAME, "files": files[0], "draft_files": files[1], "stream": False}
        server.api.post("/api/create", body, LOADING)
    return store


@contextmanager
def _serving(program: Path, store: Path, case: Case | None = None) -> Iterator[_Server]:
    """`ollama serve` on a store, at a free port, with the acceptance that a case replays.

    Args:
        program: Ollama's program, whose place says which engine it starts.
        store: of the models.
        case: what is measured.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    # The store may be another Ollama's as well: what that one is about to finish is not cleared away.
    env = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": str(store), "OLLAMA_NOPRUNE": "1", METRICS: "1"}
    if case is not None and case.chance is not None:
        env[SYNTH] = ",".join(f"{case.chance ** (place + 1):.9f}" for place in range(case.length))
    with tempfile.NamedTemporaryFile(prefix="ollama-log-", dir=cache_dir()) as log:
        process = subprocess.Popen(
            [program, "serve"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            server = _Server(Client(host), process.pid, Path(log.name))
            shadow.wait_for(process, server.api, server.log)
            yield server
        finally:
            shadow.end(process)


@dataclass(frozen=True)
class _Server:
    """A running Ollama: how it is asked, its process, and its log."""

    api: Client
    pid: int
    log: Path

    def run(self, wanted: Wanted, case: Case, visit: int) -> Run:
        """One request, after one that loads the model.

        Raises:
            MtpError: the answer ended too early to be timed.
        """
        options = {
            "num_predict": wanted.tokens, "num_ctx": wanted.n_ctx, "num_thread": wanted.threads, "stop": [],
            "seed": wanted.seed + visit, "temperature": wanted.temp, "draft_num_predict": case.length,
        }  # fmt: skip
        body = {"model": wanted.model or NAME, "raw": True, "options": options}
        loading = {**body, "prompt": "0", "options": {**options, "num_predict": 1}, "stream": False}
        self.api.post("/api/generate", loading, LOADING)
        start = time.perf_counter()
        lines = self.api.stream("/api/generate", {**body, "prompt": f"{visit + 1} {wanted.prompt}"}, LOADING)
        answer = next(lines)
        first = time.perf_counter() - start
        for answer in lines:  # noqa: B007 (the last one counts)
            pass
        made, seconds = answer["eval_count"], answer["eval_duration"] / 1e9
        if made < ENOUGH:
            raise MtpError(f"the model ended its answer after {made} tokens, too few to time; give other --prompts.")
        words, memory = _child(self.pid)
        drafts = _drafts(words) if case.length else (0, 0, ())
        return Run(answer["prompt_eval_count"], made, seconds, first, *drafts, words[0], memory)


def _drafts(words: Sequence[str]) -> tuple[int, int, tuple[int, ...]]:
    """What a llama-server with this command line has drafted, and what of that was accepted; and how many drafts had a
    first token, a second, ..., where it is ours."""
    if not (port := flag_value(words, "--port")):
        return 0, 0, ()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics") as answer:
        told = answer.read().decode()
    counted = {name: int(number) for name, number in COUNTED.findall(told)}
    return counted.get("draft", 0), counted.get("accepted", 0), tuple(map(int, PLACES.findall(told)))


def _child(parent: int) -> tuple[list[str], int]:
    """The command line of the process that another one started, and the bytes of memory that it holds; [""] and 0 where
    there is no /proc."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            if re.search(rf"^PPid:\t{parent}$", status, re.MULTILINE):
                words = os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
                held = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
                return words, 1024 * int(held[1] if held else 0)
        except OSError:
            continue  # it ended, or is not to be seen
    return [""], 0
