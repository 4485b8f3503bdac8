"""llama-server, stock or our build, measured on the same pair.

Acceptance at a given chance is llama-server's own `--spec-synth-rates`: it drafts, verifies and samples as ever, then
accepts at random. Backend sampling of drafts is off: on a CPU it is a top-k over 262144 logits in one thread.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gemma_mtp.runtime.request import SAMPLING

START_SECONDS = 600


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


class Server:
    """A running llama-server with one slot.

    Args:
        binary: llama-server.
        target: GGUF file of the target.
        drafter: of its drafter, or None for none.
        length: tokens it drafts in a round.
        chance: acceptance per token that it shall simulate, None for what the drafts deserve.
        n_ctx: context length.
        threads: for both models.
        gpu_layers: as llama.cpp's -ngl.
        flash_attn: whether to use flash attention.

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
    ) -> None:
        self._length = length if drafter is not None else 0
        layers = ["all"] if gpu_layers < 0 else [str(gpu_layers)]
        command = [str(binary), "-m", str(target), "--host", "127.0.0.1", "--port", "0", "-c", str(n_ctx)]
        command += ["-np", "1", "-t", str(threads), "-fa", "on" if flash_attn else "off", "--no-webui", "-ngl", *layers]
        if drafter is not None:
            command += ["--spec-type", "draft-mtp", "--spec-draft-model", str(drafter), "--spec-draft-ngl", *layers]
            command += ["--spec-draft-n-max", str(length), "--no-spec-draft-backend-sampling"]
            if chance is not None:
                rates = ",".join(f"{chance ** (place + 1):.9f}" for place in range(length))
                command += ["--spec-synth-rates", rates]
        else:
            command += ["--spec-type", "none"]  # ours would find the drafter beside the target
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        try:
            self.url = self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _wait(self) -> str:
        """The address at which it listens, once the model is loaded."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            # Not by seeking: the server writes at the place where this file stands.
            told = os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")
            if found := re.search(r"listening on (http://\S+)\n", told):
                return found[1]
            if self._process.poll() is not None:
                tail = " / ".join(told.strip().splitlines()[-3:])
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}: {tail}")
            time.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {START_SECONDS} seconds; try fewer --layers.")

    def run(self, tokens: list[int], n: int, seed: int, temp: float = 0.0, ignore_eos: bool = True) -> Run:
        """Complete a prompt by n tokens. The prompt stays in the server's cache, so a second run only generates."""
        body = {
            **SAMPLING, "prompt": tokens, "n_predict": n, "seed": seed, "temperature": temp, "ignore_eos": ignore_eos,
            "cache_prompt": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            timings: dict[str, Any] = json.load(answer)["timings"]
        generated = timings["predicted_n"] - 1  # the first token is the prompt's
        accepted = timings.get("draft_n_accepted", 0)
        drafted = timings.get("draft_n", 0)
        return Run(generated, generated - accepted, drafted, accepted, timings["predicted_ms"] / 1e3)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
