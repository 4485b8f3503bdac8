"""`make demo`: convert the bundled pair, generate with and without MTP, show the proof, then what a user will feel.

Greedy continuations of prompts that the pair was not trained on, once with the drafter and once without. The pair is
too small to be made faster, so its acceptance is then replayed at the shape of E2B with random weights. The last line
on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gemma_mtp.convert import MtpError, convert_pair
from gemma_mtp.convert.random_pair import write_pair
from gemma_mtp.patches import source
from gemma_mtp.runtime import Llama, Stats
from gemma_mtp.runtime.bench import machine
from gemma_mtp.runtime.bench.measure import measure
from gemma_mtp.runtime.bench.settings import Chance, Settings, Step
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "tests" / "pair"
OUT = ROOT / "build" / "demo"
PROMPTS, TOKENS, DRAFT = 20, 128, 3
# A format whose kernels give one token the same logits alone and in a batch (docs/measurements.md).
QUANT = "Q8_0"
SHAPE = "E2B"
# Layers of that shape to measure, all if they fit, and the GB of the files (Q4_0).
LAYERS = {35: 3.4, 20: 2.1, 10: 1.2}
SPARE = 2.5  # GB of memory beside the files: the weights as the kernels read them, and room for others

console = Console(stderr=True, highlight=False)


def held_out() -> list[str]:
    """The first prompts of tests/pair/prompts.json, from files that the training never saw."""
    prompts = json.loads((PAIR / "prompts.json").read_text())["prompts"]
    return [prompt["text"] for prompt in prompts[:PROMPTS]]


def continued(target: Path, drafter: str | None, label: str) -> tuple[list[str], Stats]:
    """Greedy continuations of the held-out prompts, and what they cost together."""
    total, texts = Stats(), []
    options: dict[str, Any] = {"n_ctx": 1024, "verbose": False, "draft_length": DRAFT}
    with closing(Llama(target, drafter=drafter, **options)) as llm, progress() as step:
        for place, prompt in enumerate(held_out()):
            step(label, place, PROMPTS)
            made = llm(prompt, max_tokens=TOKENS, temperature=0.0)
            texts.append(made["choices"][0]["text"])
            total.add(llm.stats)
    return texts, total


@contextmanager
def progress() -> Iterator[Step]:
    """A bar on a terminal; elsewhere a line whenever something else begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        said = ""

        def step(label: str, done: int, total: int) -> None:
            nonlocal said
            bar.update(task, description=label, completed=done, total=total)
            if not console.is_terminal and label != said:
                console.print(label, soft_wrap=True)
            said = label

        yield step


def show_proof(plain: Stats, mtp: Stats, sample: tuple[str, str], identical: bool) -> None:
    """A sample and a table for people."""
    console.rule("one prompt and its continuation with MTP")
    console.print(sample[0], style="dim", end="", markup=False)
    console.print(sample[1], markup=False)
    table = Table(title=f"the bundled pair: {PROMPTS} held-out prompts, {TOKENS} tokens each, greedy, {DRAFT} drafted")
    for heading in ("", "target passes", "tokens per pass", "accepted", "by position"):
        table.add_column(heading, justify="right" if heading else "left")
    places = " ".join(f"{a / b:.2f}" for a, b in zip(mtp.accepted_per_position, mtp.drafted_per_position, strict=True))
    table.add_row("plain", str(plain.target_passes), f"{plain.tokens_per_target_pass:.2f}", "", "")
    table.add_row("MTP", str(mtp.target_passes), f"{mtp.tokens_per_target_pass:.2f}", f"{mtp.acceptance:.1%}", places)
    console.print(table)
    console.print("the same tokens with MTP as without" if identical else "MTP changed the tokens: that is a fault")


def right_so_far(stats: Stats) -> float:
    """Chance that a draft token is accepted, given that all before it in its round were."""
    rejected = stats.drafts - (stats.accepted_per_position[-1] if stats.accepted_per_position else 0)
    return stats.accepted / max(stats.accepted + rejected, 1)


def layers_that_fit(folder: Path) -> tuple[int, str]:
    """Layers of the shape that memory and disk hold, 0 for too few of them, and what they lack if not all fit."""
    folder.mkdir(parents=True, exist_ok=True)
    memory, disk = machine.free_memory(), shutil.disk_usage(folder).free
    fitting = [
        layers for layers, size in LAYERS.items()
        if (memory is None or memory > (size + SPARE) * 1e9) and disk > 1.2 * size * 1e9
    ]  # fmt: skip
    rooms = [f"{disk / 1e9:.1f} GB of disk"] + ([] if memory is None else [f"{memory / 1e9:.1f} GB of memory"])
    return max(fitting, default=0), f"{' and '.join(rooms)} are free"


def felt(chance: float) -> dict[str, Any] | None:
    """Tokens per second at the shape of E2B, plain and with the draft length "auto", for drafts right by this chance.

    None where the machine is too small for it.
    """
    cache = source.cache_dir() / "shapes"
    layers, reason = layers_that_fit(cache)
    depth = max(LAYERS)
    if not layers:
        console.print(f"speed at the shape of {SHAPE} is left out: {reason}")
        return None
    formats: dict[str, Any] = {"quant": "Q4_0", "drafter_quant": "Q4_0", "drafter_head": "Q4_0"}
    acceptance = Chance((round(chance, 2),))
    try:
        with progress() as step:
            making = f"random weights of {SHAPE}'s shape, {LAYERS[layers]} GB, kept in {cache}"
            files = write_pair(
                SHAPE, cache, layers=None if layers == depth else layers,
                progress=lambda done, total: step(making, done, total), **formats,
            )  # fmt: skip
            settings = Settings(
                *files, ctx_filled=64, acceptance=(acceptance,), own=False, draft=(DRAFT,), tokens=48, warm_tokens=96,
                repeat=1, threads=machine.physical_cores(), speeds=True,
            )  # fmt: skip
            result = measure(settings, step)
    except (MtpError, RuntimeError) as problem:
        console.print(f"speed at the shape of {SHAPE} is left out: {problem}")
        return None
    auto = result["auto"][acceptance.name]
    found = {
        "layers": layers,
        "acceptance": acceptance.levels[0],
        "plain": round(auto["tokens_per_s"] / auto["speedup"], 2),  # that was measured beside it
        "mtp": auto["tokens_per_s"],
        "speedup": auto["speedup"],
        "identical": result["left_record"] == 0,
        "cpu": result["machine"]["cpu"],
        "threads": result["machine"]["threads"],
    }
    some = "" if layers == depth else f" with {layers} of its {depth} layers ({reason})"
    same = ", same tokens" if found["identical"] else ""
    console.print(
        f"{SHAPE}'s shape{some}, random weights in Q4_0, {found['threads']} threads of {found['cpu']}; drafts are "
        f"accepted as those above were ({found['acceptance']:.0%}), their length is auto, the default:",
        soft_wrap=True,
    )
    console.print(
        f"[bold]{found['plain']:.1f} → {found['mtp']:.1f} tokens/s, {found['speedup']:.1f} times{same}[/bold]"
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", action="store_true", help="convert, then run gemma-mtp bench on the pair")
    arguments = parser.parse_args()
    pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", OUT, quant=QUANT, force=True)
    if arguments.bench:
        from gemma_mtp.runtime.cli.main import main as command

        command(["bench", str(pair.target)])
    texts, mtp = continued(pair.target, "auto", "with MTP")
    without, plain = continued(pair.target, None, "without MTP")
    show_proof(plain, mtp, (held_out()[0], texts[0]), texts == without)
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
        SHAPE: felt(right_so_far(mtp)),
    }
    print(json.dumps(proof))
    return 0 if proof["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
