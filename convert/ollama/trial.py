"""A short answer of a model: that it runs, how fast, and whether drafts are used and taken.

Ollama's API says nothing of drafts. Its llama-server does, which is a process of its own that listens on this machine:
the command line says whether it drafts, and its own answers count what was drafted and accepted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.convert.ollama.api import LOADING, Client
from gemma_mtp.convert.ollama.store import Stored

QUESTION = "Count from one to thirty in words, separated by commas."
PROMPT = f"<|turn>user\n{QUESTION}<turn|>\n<|turn>model\n"
N_TOKENS = 64
# Fewer take no time that could be told.
ENOUGH = 8
# What the model sets and llama-server takes under the same name.
SET = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Trial:
    """What was seen. Rates are in tokens a second, 0 where the model said too little to tell.

    `drafting` and `acceptance` (accepted drafts among all) are None where this machine does not show them; `engine` is
    the llama-server that answered, `stale` whether it drafts with a drafter that is not the model's.
    """

    rate: float
    drafts: int
    drafting: bool | None = None
    acceptance: float | None = None
    engine: str = ""
    stale: bool = False

    def __str__(self) -> str:
        on = self.drafts > 0 and self.drafting is not False
        drafts = f"drafts on, up to {self.drafts} a round" if on else "drafts off"
        if on and self.acceptance is not None:
            drafts += f", {self.acceptance:.0%} accepted"
        elif on:
            drafts += ", acceptance not to be seen from here (Ollama's log has it: draft acceptance)"
        return f"{drafts}, {f'{self.rate:.1f} tokens/s' if self.rate else 'too short an answer to time'}"


def trial(api: Client, model: Stored) -> Trial:
    """Have a model answer once; it is loaded for that, and stays so for as long as Ollama keeps models.

    Raises:
        OllamaError: it does not start, or cannot answer.
    """
    asked = {"model": model.name, "messages": [{"role": "user", "content": QUESTION}], "stream": False}
    rate = 0.0
    for sampling in ({}, {"temperature": 0}):
        answer = api.post("/api/chat", {**asked, "options": {"num_predict": N_TOKENS, **sampling}}, LOADING)
        if answer.get("eval_count", 0) >= ENOUGH:
            rate = answer["eval_count"] / max(answer.get("eval_duration", 0), 1) * 1e9
            break
    server = next(servers(model), None) if api.is_here else None
    if server is None:
        return Trial(rate, model.drafts)
    if "--spec-type" not in server:
        return Trial(rate, model.drafts, False, None, server[0])
    stale = flag_value(server, "--spec-draft-model") != str(model.drafter)
    return Trial(rate, model.drafts, True, _acceptance(server, model), server[0], stale)


def servers(model: Stored) -> Iterator[list[str]]:
    """The command lines of the llama-server processes that have a model loaded."""
    for line in _command_lines():
        if flag_value(line, "--model") == str(model.target) and flag_value(line, "--port"):
            yield line


def _command_lines() -> Iterator[list[str]]:
    """The command lines of all processes that this user may see; none on Windows."""
    if sys.platform == "linux":
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                yield (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            except OSError:
                continue  # it ended, or is not to be seen
    elif os.name == "posix":
        done = subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, text=True, check=False)
        yield from (line.split() for line in done.stdout.splitlines())


def flag_value(line: Sequence[str], flag: str) -> str:
    """What stands behind a flag in a command line; "" without it."""
    at = line.index(flag) + 1 if flag in line else len(line)
    return line[at] if at < len(line) else ""


def _acceptance(server: Sequence[str], model: Stored) -> float | None:
    """The share of drafted tokens that were accepted in an answer of llama-server itself."""
    sampling = {key: model.parameters[key] for key in SET if key in model.parameters}
    body = {"prompt": PROMPT, "n_predict": N_TOKENS, "cache_prompt": False, "ignore_eos": True, **sampling}
    body |= {"speculative.n_max": model.drafts}  # in every round, where ours would draft as far as it pays
    request = urllib.request.Request(
        f"http://127.0.0.1:{flag_value(server, '--port')}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=LOADING) as answer:
            timings: Any = json.loads(answer.read()).get("timings", {})
        return float(timings["draft_n_accepted"] / timings["draft_n"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError):
        return None  # it listens in a container, or counts otherwise
