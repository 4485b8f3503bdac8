"""llama-server, stock or our build, measured on the same pair.

Acceptance at a given chance is llama-server's own `--spec-synth-rates`: it drafts, verifies and samples as ever, then
accepts at random. Backend sampling of drafts is off: on a CPU it is a top-k over 262144 logits in one thread.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.runtime import programs, server
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


class Server(server.Server):
    """A running llama-server with one slot, that is ready.

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
        port = programs.free_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{port}"
        layers = ["all"] if gpu_layers < 0 else [str(gpu_layers)]
        command = [str(binary), "-m", str(target), "--host", "127.0.0.1", "--port", str(port), "-c", str(n_ctx)]
        command += ["-np", "1", "-t", str(threads), "-fa", "on" if flash_attn else "off", "--no-webui", "-ngl", *layers]
        if drafter is not None:
            command += ["--spec-type", "draft-mtp", "--spec-draft-model", str(drafter), "--spec-draft-ngl", *layers]
            command += ["--spec-draft-n-max", str(length), "--no-spec-draft-backend-sampling"]
            if chance is not None:
                rates = ",".join(f"{chance ** (place + 1):.9f}" for place in range(length))
                command += ["--spec-synth-rates", rates]
        else:
            command += ["--spec-type", "none"]
        super().__init__(command)
        try:
            self.wait(seconds=START_SECONDS)
        except BaseException:
            self.stop()
            raise

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
