"""Plain generation against MTP on a real pair, in one process and one run."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
from gemma_mtp.runtime import native
from gemma_mtp.runtime.pair import open_pair
from gemma_mtp.runtime.stats import Stats
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PROMPTS = (
    "def parse_arguments(argv):\n    ",
    "The history of the steam engine begins with",
    "import json\nimport os\n\nclass Settings:\n    ",
)


def compare(
    target: str,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temp: float,
    repeat: int,
    draft_length: int,
    **loading: Any,
) -> dict[str, Any]:
    """Generate from each prompt `repeat` times without and with drafting, alternating, and compare.

    Args:
        target: GGUF file with a linked drafter.
        prompts: texts to continue.
        max_tokens: tokens per prompt.
        temp: temperature; 0 for greedy.
        repeat: runs per prompt and mode.
        draft_length: tokens drafted in a round.
        loading: further arguments of `Llama`.

    Returns:
        Medians over runs of tokens per second, their ratio, the MTP counters, and the machine.

    Raises:
        gemma_mtp.convert.link.MtpError: the target has no drafter.
        ValueError: draft_length is 0.
    """
    if draft_length == 0:
        raise ValueError("a draft length of 0 is what MTP is compared with; give 1 or more.")
    rates: dict[int, list[float]] = {0: [], draft_length: []}
    total, same = Stats(), True
    with open_pair(target, **loading) as llm, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=repeat * len(rates) * len(prompts))
        for _ in range(repeat):
            texts: dict[int, list[str]] = {}
            for length, seen in rates.items():
                llm.draft_length = length
                run = Stats()
                for seed, prompt in enumerate(prompts):
                    made = llm(prompt, max_tokens=max_tokens, temperature=temp, top_k=64, seed=seed)
                    texts.setdefault(length, []).append(made["choices"][0]["text"])
                    run.add(llm.stats)
                    progress.advance(task)
                seen.append((run.tokens - len(prompts)) / run.seconds)
                if length:
                    total.add(run)
            same = same and texts[0] == texts[draft_length]
    plain, mtp = median(rates[0]), median(rates[draft_length])
    return {
        "target": Path(target).name,
        "draft_length": draft_length,
        "temperature": temp,
        "identical": same,
        "tokens_per_s": {"plain": round(plain, 2), "mtp": round(mtp, 2)},
        "speedup": round(mtp / plain, 3),
        "mtp": total.as_dict(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"llama_cpp": llama_cpp.__version__, "patched": native.patched()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    table = Table(title=f"{result['target']}, {result['draft_length']} drafted, temperature {result['temperature']:g}")
    for heading in ("", "tokens/s", "over plain", "accepted", "tokens per target pass"):
        table.add_column(heading, justify="left" if not heading else "right")
    rates, mtp = result["tokens_per_s"], result["mtp"]
    table.add_row("plain", f"{rates['plain']:.1f}", "1.00", "", "1.00")
    passes = f"{(mtp['accepted'] + mtp['drafts']) / max(mtp['drafts'], 1):.2f}"
    table.add_row("MTP", f"{rates['mtp']:.1f}", f"{result['speedup']:.2f}", f"{mtp['acceptance']:.0%}", passes)
    Console().print(table)
