"""Prompts: time to the first token of an answer and tokens per second, `Llama`'s and llama-servers', in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from gemma_mtp.runtime.bench.rates import ratio
from gemma_mtp.runtime.bench.server import Server
from gemma_mtp.runtime.bench.settings import Settings, Step
from gemma_mtp.runtime.bench.worker import Worker

OURS = "patched-server"  # what other servers are compared with
WARM = 64  # tokens that are read before anything is timed


def prompts(
    settings: Settings, ours: Worker, tokens: Callable[[int], list[int]], binaries: Mapping[str, Path], step: Step
) -> dict[str, dict[str, Any]]:
    """Measure prompts of the lengths that the settings name.

    Args:
        settings: what to measure.
        ours: the process that holds the pair.
        tokens: a prompt of so many tokens.
        binaries: llama-servers by name, ours among them if there are others.
        step: told of progress.

    Returns:
        "ours" for `Llama`, and by server: "prompt", by length `tokens_per_s` and `first_token_ms`; of a server that is
        not ours `prompt_speedup`, our server's tokens per second over its own, and `left_out`, flags that it lacks.
    """
    taken: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_server(settings, binary)) for name, binary in binaries.items()}
        read: dict[str, Callable[[list[int]], float]] = {"ours": lambda given: ours.call("first_token", tokens=given)}
        read |= {name: server.first_token for name, server in servers.items()}
        for one in read.values():
            one(tokens(WARM))
        for visit in range(settings.repeat):
            for place, length in enumerate(settings.prompt):
                step(f"a prompt of {length} tokens", visit * len(settings.prompt) + place,
                     settings.repeat * len(settings.prompt))  # fmt: skip
                prompt = tokens(length)
                # Who goes first changes from visit to visit.
                for who, one in list(read.items())[:: 1 if (visit + place) % 2 == 0 else -1]:
                    taken.setdefault((who, length), []).append(one(prompt))
    found: dict[str, dict[str, Any]] = {
        who: {"prompt": {str(length): _figures(length, taken[who, length]) for length in settings.prompt}}
        for who in read
    }
    for name in servers.keys() - {OURS}:
        found[name]["prompt_speedup"] = {
            str(length): round(ratio(taken[name, length], taken[OURS, length]), 3) for length in settings.prompt
        }
        found[name]["left_out"] = servers[name].left_out
    return found


def _server(settings: Settings, binary: Path) -> Server:
    return Server(
        binary, settings.target, None, 0, None, n_ctx=settings.n_ctx, threads=settings.threads,
        gpu_layers=settings.gpu_layers, flash_attn=settings.flash_attn,
    )  # fmt: skip


def _figures(length: int, milliseconds: list[float]) -> dict[str, float]:
    middle = median(milliseconds)
    return {"tokens_per_s": round(length / middle * 1e3, 1), "first_token_ms": round(middle, 1)}
