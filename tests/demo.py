"""`make demo`: convert the bundled pair, generate with and without MTP, show the proof.

Greedy continuations of prompts that the pair was not trained on, once with the drafter and once without; the last line
on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from gemma_mtp.convert import convert_pair
from gemma_mtp.runtime import Llama, Stats
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "tests" / "pair"
OUT = ROOT / "build" / "demo"
PROMPTS, TOKENS, DRAFT = 20, 128, 3
# A format whose kernels give one token the same logits alone and in a batch (README, "Same seed, same tokens").
QUANT = "Q8_0"


def held_out() -> list[str]:
    """The first prompts of tests/pair/prompts.json, from files that the training never saw."""
    prompts = json.loads((PAIR / "prompts.json").read_text())["prompts"]
    return [prompt["text"] for prompt in prompts[:PROMPTS]]


def generate(target: Path, drafter: str | None, label: str) -> tuple[list[str], Stats]:
    """Greedy continuations of the held-out prompts, and what they cost together."""
    total, texts = Stats(), []
    options: dict[str, Any] = {"n_ctx": 1024, "verbose": False, "draft_length": DRAFT, "flash_attn": True}
    with closing(Llama(target, drafter=drafter, **options)) as llm:
        for prompt in track(held_out(), label, console=Console(stderr=True), transient=True):
            made = llm(prompt, max_tokens=TOKENS, temperature=0.0)
            texts.append(made["choices"][0]["text"])
            total.add(llm.stats)
    return texts, total


def report(plain: Stats, mtp: Stats, sample: tuple[str, str]) -> None:
    """A sample and a table for people, on stderr."""
    console = Console(stderr=True, highlight=False)
    console.rule("one prompt and its continuation with MTP")
    console.print(sample[0], style="dim", end="", markup=False)
    console.print(sample[1], markup=False)
    table = Table(title=f"{PROMPTS} held-out prompts, {TOKENS} tokens each, greedy, {DRAFT} drafted per round")
    for heading in ("", "target passes", "tokens per pass", "tokens/s", "accepted", "by position"):
        table.add_column(heading, justify="right" if heading else "left")
    places = " ".join(f"{a / b:.2f}" for a, b in zip(mtp.accepted_per_position, mtp.drafted_per_position, strict=True))
    table.add_row("plain", str(plain.target_passes), f"{plain.tokens_per_target_pass:.2f}",
                  f"{plain.tokens_per_second:.0f}", "", "")  # fmt: skip
    table.add_row("MTP", str(mtp.target_passes), f"{mtp.tokens_per_target_pass:.2f}", f"{mtp.tokens_per_second:.0f}",
                  f"{mtp.acceptance:.1%}", places)  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", action="store_true", help="convert, then run gemma-mtp bench on the pair")
    arguments = parser.parse_args()
    pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", OUT, quant=QUANT, force=True)
    if arguments.bench:
        from gemma_mtp.runtime.cli import main as command

        command(["bench", str(pair.target)])
    texts, mtp = generate(pair.target, "auto", "with MTP")
    without, plain = generate(pair.target, None, "without MTP")
    report(plain, mtp, (held_out()[0], texts[0]))
    proof = {
        "identical": texts == without,
        "acceptance": round(mtp.acceptance, 4),
        "tokens_per_target_pass": round(mtp.tokens_per_target_pass, 3),
        "target": pair.target.name,
        "drafter": pair.drafter.name,
        "prompts": PROMPTS,
        "tokens": mtp.tokens,
        "draft_length": DRAFT,
        "acceptance_by_position": [
            round(a / b, 4) for a, b in zip(mtp.accepted_per_position, mtp.drafted_per_position, strict=True)
        ],
    }
    print(json.dumps(proof))
    return 0 if proof["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
