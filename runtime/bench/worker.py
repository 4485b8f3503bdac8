"""Measurements of one pair with one libllama, in a process of their own.

Which libllama is loaded is decided when llama_cpp is imported (LLAMA_CPP_LIB_PATH), so comparing two builds takes two
processes. Each reads requests from stdin and answers on stdout, one JSON object a line; only one works at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_mtp.runtime.bench.replay import Rehearsal, Replaying
    from gemma_mtp.runtime.request import DraftLength
    from gemma_mtp.runtime.stats import Stats


class Worker:
    """Another process that holds a pair and measures it: `call` names a public method of `Measure`.

    Args:
        target: GGUF file of the target.
        drafter: of its drafter.
        library: folder of another libllama than the installed one.
        options: arguments of `Llama`.

    Raises:
        RuntimeError: the process could not load the pair, or ended; with the last lines it wrote.
    """

    def __init__(self, target: Path, drafter: Path, library: Path | None = None, **options: Any) -> None:
        env = dict(os.environ, PYTHONWARNINGS="ignore")
        if library is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(library)
        self._busy = False
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemma_mtp.runtime.bench.worker"],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        try:
            self.library: dict[str, Any] = self._ask({"target": str(target), "drafter": str(drafter), **options})
        except BaseException:
            self.close()
            raise

    def call(self, name: str, **arguments: Any) -> Any:
        return self._ask({"name": name, "arguments": arguments})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._busy = True
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        self._busy = False
        if not answer:
            self._log.seek(0)
            tail = " / ".join(self._log.read().strip().splitlines()[-3:])
            raise RuntimeError(f"the measuring process ended: {tail or 'it was killed, perhaps for want of memory'}")
        parsed = json.loads(answer)
        if "error" in parsed:
            raise RuntimeError(parsed["error"])
        return parsed["answer"]

    def close(self) -> None:
        if self._busy:  # interrupted: nobody waits for the answer any more
            self._process.kill()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was written last was never read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


class Measure:
    """What can be measured of an open pair. Times are in milliseconds unless said."""

    def __init__(self, llm: Replaying) -> None:
        self.llm = llm
        self._prompt: list[int] = []
        self._record: list[int] = []
        self.forget()

    def tokenize(self, text: str) -> list[int]:
        return list(self.llm.tokenize(text.encode()))

    def text(self, tokens: list[int]) -> str:
        return str(self.llm.detokenize(tokens).decode(errors="replace"))

    def fill(self, tokens: list[int]) -> float:
        """Put a prompt into the KV cache, whose last token stays out as the one to go on from; time of the rest."""
        self.llm.reset()
        self._prompt = tokens
        clock = perf_counter()
        self.llm.eval(tokens[:-1])
        self._synchronize()
        return (perf_counter() - clock) * 1e3

    def first_token(self, tokens: list[int]) -> float:
        """From a prompt to the first token of its answer, greedy, with nothing of it in the KV cache before."""
        self.llm.draft_length = 0
        self.llm.reset()
        clock = perf_counter()
        with closing(self.llm.generate(tokens, temp=0.0)) as made:
            next(made)
        return (perf_counter() - clock) * 1e3

    def target_pass(self, n: int, times: int, warm: int = 1, logits_all: bool = True) -> list[float]:
        """Target passes over n tokens behind the prompt, with logits for all or the last; untimed ones come first.

        The prompt's last token is followed by its first ones: one token again and again would meet the same experts.
        """
        batch, past = (self._prompt[-1:] + self._prompt * n)[:n], self.llm.n_tokens
        taken = []
        for _ in range(warm + times):
            self.llm._batch.set_batch(batch=batch, n_past=past, logits_all=logits_all)
            clock = perf_counter()
            self.llm._ctx.decode(self.llm._batch)
            self._synchronize()
            taken.append((perf_counter() - clock) * 1e3)
            self.llm._ctx.kv_cache_seq_rm(-1, past, -1)
        return taken[warm:]

    def draft_round(self, length: int, times: int, warm: int = 1) -> list[float]:
        """Rounds of `length` drafted tokens behind the prompt."""
        from gemma_mtp.runtime.draft.drafter import DraftSettings

        drafter = self.llm.drafter
        assert drafter is not None
        self.target_pass(1, 1, 0)
        hidden, token = self.llm.hidden(0), self._prompt[-1]
        taken = []
        for _ in range(warm + times):
            clock = perf_counter()
            drafter.draft(token, hidden, self.llm.n_tokens, length, DraftSettings())
            taken.append((perf_counter() - clock) * 1e3)
        return taken[warm:]

    def record(self, n: int) -> list[int]:
        """The target's own greedy continuation of the prompt, which `replay` then proposes."""
        self.llm.draft_length = 0
        self._record = list(self._prompt)
        for token in self.llm.generate(self._prompt, temp=0.0):
            self._record.append(token)
            if len(self._record) == len(self._prompt) + n:
                break
        return self._record[len(self._prompt) :]

    def forget(self) -> None:
        """Know nothing of costs and acceptance, as when a pair is first run on a machine, and keep nothing on disk."""
        from gemma_mtp.runtime.draft.costs import Costs
        from gemma_mtp.runtime.draft.policy import policy_for
        from gemma_mtp.runtime.request import MOST

        class Forgotten(Costs):
            def save(self, path: Path) -> None:
                del path

        self.llm._costs = Forgotten(MOST + 1)
        self.llm._policy = policy_for(self.llm._costs, MOST)

    def replay(self, n: int, length: DraftLength, chance: str | None, seed: int) -> dict[str, Any]:
        """Generate about n tokens, whole rounds, with recorded drafts accepted with this chance; length 0 for none.

        Should the target leave its record, which takes a near-tie, it is put back on it.
        """
        from gemma_mtp.runtime.bench.replay import Rehearsal
        from gemma_mtp.runtime.bench.settings import Chance
        from gemma_mtp.runtime.stats import Stats

        total, segments = Stats(), 0
        begin = at = len(self._prompt)
        self.llm.draft_length = length
        given = None if chance is None else Chance.parse(chance)
        while at < begin + n:
            segments += 1
            at = self._follow(at, Rehearsal(begin + n, self._record, given, seed + segments, begin))
            total.add(self.llm.stats)
        return self._result(total, segments) | {"left_record": segments - 1}

    def _follow(self, at: int, run: Rehearsal) -> int:
        """Generate along the record from a place in it; returns the place to go on from."""
        with closing(self.llm.running(run, self._record[:at], temp=0.0)) as tokens:
            for token in tokens:
                right = token == self._record[at]
                at += 1
                if not right:
                    break
        return at

    def generate(self, prompt: list[int], n: int, length: DraftLength, temp: float, seed: int) -> dict[str, Any]:
        """Generate n tokens, or up to the end of the turn, with what the drafter proposes; length 0 for none."""
        from gemma_mtp.runtime.bench.replay import Rehearsal
        from gemma_mtp.runtime.request import SAMPLING

        self.llm.draft_length = length
        self.llm.set_seed(seed)
        made: list[int] = []
        settings = {name: value for name, value in SAMPLING.items() if name != "temperature"} | {"temp": temp}
        with closing(self.llm.running(Rehearsal(len(prompt) + n), prompt, **settings)) as tokens:
            for token in tokens:
                made.append(token)
                if token == self.llm.token_eos():
                    break
        return self._result(self.llm.stats, 1) | {"tokens": made[:n]}

    def _result(self, stats: Stats, segments: int) -> dict[str, Any]:
        """Counters, and what a speed is made of. The first token of a segment is its prompt's.

        "seconds" are the clock's, as a user has them and as llama-server counts them, plain and with MTP alike; the
        loop's own, in the counters, leave out what this measurement does between two tokens.
        """
        return {
            "generated": stats.tokens - segments,
            "seconds": stats.generation_seconds,
            "stats": stats.as_dict(),
        }

    def _synchronize(self) -> None:
        from llama_cpp import llama_cpp as lib

        lib.llama_synchronize(self.llm.ctx)


def main() -> None:
    """Load a pair as the first line says, then answer requests until stdin ends."""
    # llama.cpp and Python may print what they like; only answers go where the other side reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measure: Measure | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if measure is None:
                measure, about = _open(**request)
                answer = {"answer": about}
            else:
                answer = {"answer": getattr(measure, request["name"])(**request["arguments"])}
        except (ValueError, RuntimeError, MemoryError) as problem:
            answer = {"error": str(problem) or type(problem).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if measure is not None:
        measure.llm.close()


def _open(target: str, drafter: str, **options: Any) -> tuple[Measure, dict[str, Any]]:
    import llama_cpp
    from gemma_mtp.runtime import native
    from gemma_mtp.runtime.bench.replay import Replaying

    clock = perf_counter()
    llm = Replaying(target, drafter=drafter, verbose=False, **options)
    about = {
        "llama_cpp": llama_cpp.__version__,
        "patched": native.patched(),
        "cpu_library": Path(native.cpu_library() or "").name,
        "features": (llama_cpp.llama_print_system_info() or b"").decode().strip(),
        "load_seconds": round(perf_counter() - clock, 2),
        "n_vocab": llm.n_vocab(),
        "gpu": native.has_gpu() and llm.model_params.n_gpu_layers != 0,
    }
    return Measure(llm), about


if __name__ == "__main__":
    main()
