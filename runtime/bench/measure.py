"""What a pair costs and what MTP brings: target pass, draft round, tokens per second; ours beside other builds.

Everything that is compared is measured in one run and alternates, as the speed of a machine drifts.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gemma_mtp.convert import link
from gemma_mtp.patches import stock, wheel
from gemma_mtp.runtime import native
from gemma_mtp.runtime.bench import machine
from gemma_mtp.runtime.bench.prompts import OURS, prompts
from gemma_mtp.runtime.bench.server import BATCH, manual
from gemma_mtp.runtime.bench.settings import MARGIN, PROMPT_TOKENS, Settings, Step
from gemma_mtp.runtime.bench.speed import ROUNDS, Speeds
from gemma_mtp.runtime.bench.worker import Worker

PASSES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12)
TIMES = 3  # timings at each visit


def measure(settings: Settings, step: Step = lambda label, done, total: None) -> dict[str, Any]:
    """Measure a pair.

    Args:
        settings: what to measure.
        step: told of progress: what is being measured, steps done and steps in all.

    Returns:
        The object that `gemma-mtp bench` prints as JSON; docs/bench.md says what its keys mean.

    Raises:
        RuntimeError: a process could not load the pair, or ended; or what is to be compared is no llama-server.
        gemma_mtp.convert.link.MtpError: a GGUF file is damaged.
        gemma_mtp.patches.source.BuildError: the stock build is wanted and cannot be made.
    """
    header = link.read_header(settings.target)
    _check_memory(settings)
    binaries = {name: _binary(name) for name in settings.against}
    for binary in binaries.values():
        manual(binary)
    result = _about(settings, header)
    with ExitStack() as stack:
        ours = stack.enter_context(closing(Worker(settings.target, settings.drafter, **settings.loading)))
        result["versions"] |= {"llama_cpp": ours.library["llama_cpp"], "patched": ours.library["patched"]}
        result["machine"] |= {"gpu": ours.library["gpu"], "features": ours.library["features"]}
        random = link.KEY_SEED in header.metadata
        prompt = _prompt(settings, ours, random, settings.ctx_filled)
        read = _read_prompts(settings, ours, random, binaries, step)
        with ExitStack() as others:
            workers = {"ours": ours}
            for name in sorted({"stock", "portable"} & set(binaries)):  # the third has our own library
                worker = Worker(settings.target, settings.drafter, binaries[name].parent, **settings.loading)
                workers[name] = others.enter_context(closing(worker))
            if settings.speeds:
                step("filling the context", 0, 1)
                ours.call("fill", tokens=prompt)
                found: dict[str, dict[str, Any]] = {"ours": {}}
            else:
                found = costs(workers, prompt, settings.repeat, step)
        result |= found["ours"] | read.get("ours", {})
        against: dict[str, Any] = {name: found.get(name, {}) | read.get(name, {}) for name in binaries}
        if OURS in read:
            result["prompt_server"] = read[OURS]["prompt"]
        if faster := [other["prompt_speedup"] for other in against.values() if "prompt_speedup" in other]:
            result["prompt_speedup"] = faster[0]
        for name, other in found.items():
            if name != "ours":
                against[name]["ratio"] = {
                    key: {n: round(other[key][n] / value, 3) for n, value in found["ours"][key].items()}
                    for key in ("target_pass_ms", "draft_round_ms")
                }
        if settings.passes:
            return result | ({"against": against} if against else {})
        ours.call("record", n=settings.recorded + MARGIN // 2)
        speeds = Speeds(settings, ours, prompt, found["ours"], binaries, step)
        result |= speeds.measure()
        for name, other in speeds.others.items():
            against[name] |= other
    return result | ({"against": against} if against else {})


def _check_memory(settings: Settings) -> None:
    """Refuse what would swap: on a CPU each process copies the weights into the order that its kernels read."""
    free = machine.free_memory()
    if free is None or native.has_gpu():
        return
    tables = link.read_header(settings.target).tensors.get("per_layer_token_embd.weight")
    weights = settings.target.stat().st_size - (tables.size if tables else 0) + settings.drafter.stat().st_size
    processes = 1 + len(settings.against) + bool(settings.prompt and {*settings.against} - {OURS})
    if processes * weights > free:
        raise RuntimeError(
            f"{processes} processes need about {processes * weights / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; "
            "measure fewer --layers, or leave --against away."
        )


def _read_prompts(
    settings: Settings, ours: Worker, random: bool, binaries: Mapping[str, Path], step: Step
) -> dict[str, dict[str, Any]]:
    """Prompts of the lengths asked for, by `Llama`, and where there are others by our llama-server and theirs."""
    if not settings.prompt:
        return {}

    def tokens(length: int) -> list[int]:
        return _prompt(settings, ours, random, length)

    servers = {OURS: _binary(OURS), **binaries} if binaries else {}
    return prompts(settings, ours, tokens, servers, step)


def _binary(name: str) -> Path:
    """llama-server of the stock or the portable build, made if need be, of the installed one, or at a path."""
    if os.sep in name:
        return Path(name)
    if name == "stock":
        stock.build_stock()
        return stock.stock_dir() / "llama-server"
    if name == "portable":
        return wheel.unpacked(wheel.cmake_args(portable=True)) / "llama_cpp" / "lib" / "llama-server"
    import llama_cpp

    binary = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
    if not binary.exists():
        raise RuntimeError(f"{binary} is not there; `gemma-mtp build` installs it.")
    return binary


def _about(settings: Settings, header: link.Header) -> dict[str, Any]:
    seed = header.metadata.get(link.KEY_SEED)
    flags = {key: value for key, value in asdict(settings).items() if key not in ("target", "drafter", "prompts")}
    flags |= {"n_batch": BATCH, "n_ubatch": BATCH}
    return {
        "target": settings.target.name,
        "drafter": settings.drafter.name,
        "layers": header.of_arch("block_count"),
        "weights": "from the file" if seed is None else f"random, seed {seed}",
        "ctx_filled": settings.ctx_filled,
        "flags": flags | {"n_ctx": settings.n_ctx, "acceptance": [chance.name for chance in settings.acceptance]},
        "machine": machine.describe(settings.threads),
        "versions": {"gemma_mtp": version("gemma-mtp"), "python": platform.python_version()},
    }


def _prompt(settings: Settings, worker: Worker, random: bool, length: int) -> list[int]:
    """So many tokens: random ones, or the prompts over and over."""
    if random:
        rng = np.random.default_rng(settings.seed)
        return [int(token) for token in rng.integers(1000, worker.library["n_vocab"], length)]
    tokens: list[int] = worker.call("tokenize", text="\n\n".join(settings.prompts))
    return (tokens * (length // len(tokens) + 1))[:length]


def costs(workers: Mapping[str, Worker], prompt: list[int], repeat: int, step: Step) -> dict[str, dict[str, Any]]:
    """Target pass by n, draft round by K (medians in ms) and the speed of prompts, for each worker in turn."""
    passes = [("target_pass", {"n": n}) for n in PASSES]
    rounds = [("draft_round", {"length": length}) for length in ROUNDS]
    bulk = {"n": PROMPT_TOKENS, "logits_all": False}
    plan: list[tuple[str, dict[str, int]]] = [*passes, *rounds, ("target_pass", bulk)]
    taken: dict[tuple[str, int], list[float]] = {}
    total = len(workers) * (1 + repeat * len(plan))
    done = 0
    for worker in workers.values():
        step("filling the context", done, total)
        worker.call("fill", tokens=prompt)
        done += 1
    for visit in range(repeat):
        for place, (name, arguments) in enumerate(plan):
            # Who goes first changes from visit to visit.
            order = list(workers.items())[:: 1 if (visit + place) % 2 == 0 else -1]
            for who, worker in order:
                step("target passes and draft rounds", done, total)
                times = 1 if arguments is bulk else TIMES
                taken.setdefault((who, place), []).extend(worker.call(name, times=times, **arguments))
                done += 1

    def medians(who: str, first: int, keys: Sequence[int]) -> dict[str, float]:
        return {str(key): round(median(taken[who, first + place]), 3) for place, key in enumerate(keys)}

    return {
        who: {
            "target_pass_ms": medians(who, 0, PASSES),
            "draft_round_ms": medians(who, len(PASSES), ROUNDS),
            "prompt_tokens_per_s": round(PROMPT_TOKENS / median(taken[who, len(plan) - 1]) * 1e3, 1),
        }
        for who in workers
    }
