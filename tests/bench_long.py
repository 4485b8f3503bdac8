"""What a token of a long answer costs: by `generate`, `create_completion`, with log-probabilities, in a chat's stream.

    python tests/bench_long.py [TARGET] [--lengths 500,2000,4000] [--draft 0] [--repeat 5] [-t THREADS] [--json]

TARGET has its drafter beside it; without one, the bundled pair is converted to Q8_0. Answers are greedy, and the same
tokens by each way but in the chat, which has a prompt of its own. --draft 0 is without MTP, where every token is a pass
of the target and so costs the least beside what is measured. Everything is measured in turn, and the medians of the
visits count. What a way takes over `generate` is told of the time beside the passes, too: the passes are the same by
each way, and machines vary by more there than a way costs. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from demo import PAIR
from gemma_mtp.convert import convert_pair
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.bench.machine import physical_cores
from prompts import PROMPT
from rich.console import Console
from rich.table import Table

GREEDY: dict[str, Any] = {"temperature": 0.0}
TOP = 5  # log-probabilities at each token
USER = {"role": "user", "content": PROMPT}
# Gives the tokens that were made.
Ask = Callable[[Llama, int], int]


def generate(llm: Llama, tokens: int) -> int:
    with closing(llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)) as made:
        return sum(1 for _ in zip(range(tokens), made, strict=False))


def completion(llm: Llama, tokens: int, **more: Any) -> int:
    made: Any = llm.create_completion(PROMPT, max_tokens=tokens, **GREEDY, **more)
    return int(made["usage"]["completion_tokens"])


def with_logprobs(llm: Llama, tokens: int) -> int:
    return completion(llm, tokens, logprobs=TOP)


def chat_stream(llm: Llama, tokens: int) -> int:
    for _ in llm.create_chat_completion([USER], max_tokens=tokens, stream=True, **GREEDY):
        pass
    return llm.stats.tokens


WAYS: dict[str, Ask] = {"generate": generate, "create_completion": completion, "with logprobs": with_logprobs,
                        "a chat's stream": chat_stream}  # fmt: skip


class Visit(NamedTuple):
    """Milliseconds a token: by the clock, and of these beside the target's passes and the drafts."""

    took: float
    beside: float


def visit(llm: Llama, ask: Ask, tokens: int) -> Visit:
    """Ask once, of an object that has seen nothing."""
    llm.reset()
    begun = perf_counter()
    made = ask(llm, tokens)
    took = perf_counter() - begun
    if made != tokens:
        raise SystemExit(f"error: {made} tokens where {tokens} were asked for; the model ends its answer.")
    stats = llm.stats
    passes = stats.pass_seconds + stats.draft_seconds + stats.prompt_seconds
    return Visit(1e3 * took / tokens, 1e3 * (took - passes) / tokens)


def measured(llm: Llama, lengths: list[int], repeat: int) -> list[dict[str, Any]]:
    """A row for each way and length."""
    for ask in WAYS.values():
        visit(llm, ask, min(lengths))  # what is made once
    found: dict[tuple[str, int], list[Visit]] = {(way, length): [] for way in WAYS for length in lengths}
    for _ in range(repeat):
        for length in lengths:
            for way, ask in WAYS.items():
                found[way, length].append(visit(llm, ask, length))
    middle = {key: Visit(*(median(each) for each in zip(*visits, strict=True))) for key, visits in found.items()}
    rows = []
    for (way, length), (took, beside) in middle.items():
        least = middle["generate", length]
        over = {"by_clock": took / least.took - 1, "beside_passes": (beside - least.beside) / least.took}
        rows.append(
            {"way": way, "tokens": length, "ms_per_token": took, "beside_passes_ms": beside, "over_generate": over}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "tokens", "ms a token", "beside passes", "over generate", "by what is beside passes")
    for row in rows:
        over = (f"{100 * each:+.1f} %" for each in row["over_generate"].values())
        times = (f"{row[key]:.3f}" for key in ("ms_per_token", "beside_passes_ms"))
        table.add_row(row["way"], str(row["tokens"]), *times, *over)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path)
    parser.add_argument("--lengths", default="500,2000,4000", help="tokens of the answers")
    parser.add_argument("--draft", type=int, default=0, help="tokens to draft in a round")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=physical_cores())
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    lengths = [int(length) for length in chosen.lengths.split(",")]
    options = {"n_ctx": max(lengths) + 64, "n_threads": chosen.threads, "n_threads_batch": chosen.threads}
    with tempfile.TemporaryDirectory() as folder:
        target = chosen.target
        if target is None:
            folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
            target = convert_pair(*folders, Path(folder), "Q8_0").target
        with closing(Llama(target, draft_length=chosen.draft, verbose=False, **options)) as llm:
            rows = measured(llm, lengths, chosen.repeat)
    show(rows)
    if chosen.json:
        about = {"model": target.name, "threads": chosen.threads, "draft": chosen.draft, "repeat": chosen.repeat}
        print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    main()
