"""llama-server, ours, stock's or somebody else's, measured on the same pair.

Acceptance at a given chance is llama-server's own `--spec-synth-rates`: it drafts, verifies and samples as ever, then
accepts at random. Backend sampling of drafts is off: on a CPU it is a top-k over 262144 logits in one thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gemma_mtp.runtime import programs, server
from gemma_mtp.runtime.request import SAMPLING

START_SECONDS = 600
# As `Llama` has them: a prompt is read in pieces of so many tokens.
BATCH = 512
# Without these nothing is measured.
NEEDED = ("-m", "--host", "--port", "-c")


@cache
def manual(binary: Path) -> str:
    """What a llama-server's --help says.

    Raises:
        RuntimeError: it cannot be run, or is no llama-server.
    """
    try:
        done = subprocess.run(
            [binary, "--help"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise RuntimeError(f"{binary} --help: {getattr(problem, 'strerror', None) or problem}") from None
    said = done.stdout + done.stderr
    if missing := [flag for flag in NEEDED if flag not in flags(said)]:
        raise RuntimeError(f"{binary} is no llama-server: its --help does not name {', '.join(missing)}.")
    return said


def flags(text: str) -> set[str]:
    """The flags that a text names."""
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))


def can_draft(binary: Path, chance: bool) -> bool:
    """Whether a llama-server drafts with a Gemma 4 drafter, and simulates a chance of acceptance if that is asked."""
    text = manual(binary)
    return "draft-mtp" in text and (not chance or "--spec-synth-rates" in flags(text))


def understood(binary: Path, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments that a llama-server knows, and the flags among the others."""
    known, kept, unknown = flags(manual(binary)), [], []
    taken = True
    for argument in arguments:
        if argument.startswith("-"):
            taken = argument in known
            if not taken:
                unknown.append(argument)
        if taken:
            kept.append(argument)
    return kept, unknown


def attention(binary: Path, wanted: bool) -> list[str]:
    """How flash attention is asked for: by a word, or, in an older llama-server, by a flag alone."""
    (line,) = re.findall(r"^.*--flash-attn\b.*$", manual(binary), re.MULTILINE)[:1] or ("on|off",)
    if "off" in line:
        return ["-fa", "on" if wanted else "off"]
    return ["-fa"] if wanted else []


@dataclass(frozen=True)
class Run:
    """One request: tokens generated after the first, rounds of drafting (or plain passes), and the time of both."""

    generated: int
    rounds: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def round_seconds(self) -> float:
        return self.seconds / self.rounds


class Server(server.Server):
    """A running llama-server that is ready.

    Args:
        binary: llama-server.
        target: GGUF file of the target.
        drafter: of its drafter, or None for none.
        length: tokens it drafts in a round.
        chance: acceptance per token that it shall simulate, None for what the drafts deserve.
        n_ctx: context length of a slot.
        threads: for both models.
        gpu_layers: as llama.cpp's -ngl.
        flash_attn: whether to use flash attention.
        slots: requests at once.
        adaptive: whether a server of ours chooses the length, up to `length`.

    Attributes:
        left_out: flags that it does not know.

    Raises:
        RuntimeError: it ended, or did not get ready within ten minutes.
    """

    def __init__(
        self,
        binary: Path,
        target: Path,
        drafter: Path | None,
        length: int,
        chance: float | None,
        *,
        n_ctx: int,
        threads: int,
        gpu_layers: int,
        flash_attn: bool,
        slots: int = 1,
        adaptive: bool = False,
    ) -> None:
        port = programs.free_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{port}"
        layers = "999" if gpu_layers < 0 else str(gpu_layers)
        arguments = ["-m", str(target), "--host", "127.0.0.1", "--port", str(port), "-np", str(slots)]
        arguments += ["-c", str(n_ctx * slots)]
        arguments += ["-t", str(threads), "-ngl", layers, "-b", str(BATCH), "-ub", str(BATCH)]
        arguments += [*attention(binary, flash_attn), "--no-webui"]
        if drafter is not None:
            arguments += ["--spec-type", "draft-mtp", "--spec-draft-model", str(drafter), "--spec-draft-ngl", layers]
            arguments += ["--spec-draft-n-max", str(length), "--no-spec-draft-backend-sampling"]
            if "--spec-draft-adaptive" in flags(manual(binary)):  # ours
                arguments += ["--spec-draft-adaptive", "on" if adaptive else "off"]
            if chance is not None:
                rates = ",".join(f"{chance ** (place + 1):.9f}" for place in range(length))
                arguments += ["--spec-synth-rates", rates]
        else:
            arguments += ["--spec-type", "none"]
        kept, self.left_out = understood(binary, [*arguments, *server.LOGGING])
        super().__init__([str(binary), *kept], logging=())
        try:
            self.wait(seconds=START_SECONDS)
        except BaseException:
            self.stop()
            raise

    def wait(
        self, step: Callable[[str, float], None] = lambda part, share: None, seconds: float | None = START_SECONDS
    ) -> dict[str, Any]:
        """Wait until it is ready, by its /health, which every llama-server has.

        Raises:
            RuntimeError: it ended, or the time is over.
        """
        del step
        last = time.monotonic() + (seconds or START_SECONDS)
        while time.monotonic() < last:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=programs.LOOK):
                self._loaded = True
                return {}
            if self._process.poll() is not None:
                raise self.died()
            time.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {seconds:g} seconds.")

    def run(self, tokens: list[int], n: int, seed: int, temp: float = 0.0, ignore_eos: bool = True) -> Run:
        """Complete a prompt by n tokens. The prompt stays in the server's cache, so a second run only generates."""
        body = {"prompt": tokens, "n_predict": n, "seed": seed, "temperature": temp, "ignore_eos": ignore_eos}
        timings = self._complete(body | {"cache_prompt": True})["timings"]
        generated = timings["predicted_n"] - 1  # the first token is the prompt's
        accepted = timings.get("draft_n_accepted", 0)
        drafted = timings.get("draft_n", 0)
        return Run(generated, generated - accepted, drafted, accepted, timings["predicted_ms"] / 1e3)

    def first_token(self, tokens: list[int]) -> float:
        """Milliseconds from a prompt to the first token of its answer, greedy, by the clock of who asks.

        Raises:
            RuntimeError: it has read fewer tokens than there are.
        """
        clock = time.perf_counter()
        answer = self._complete({"prompt": tokens, "n_predict": 1, "temperature": 0.0, "cache_prompt": False})
        taken = (time.perf_counter() - clock) * 1e3
        read = answer["timings"]["prompt_n"]
        if read != len(tokens):
            raise RuntimeError(f"llama-server read {read} tokens of a prompt of {len(tokens)}.")
        return taken

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/completion", json.dumps({**SAMPLING, **body}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found
