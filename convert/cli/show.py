"""Tables, counts and progress that several commands show."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from gemma_mtp.convert.pipeline import type_counts

if TYPE_CHECKING:
    from gemma_mtp.convert import PairPlan
    from gemma_mtp.convert.plan import Plan
    from gemma_mtp.convert.progress import Progress


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Bytes, rate and remaining time on stderr, if that is a terminal; told of bytes done and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counts_line(counts: Mapping[str, int]) -> str:
    """Types and how many tensors are of each, in a line."""
    return " ".join(f"{kind} x{count}" for kind, count in counts.items())


def show_rows(rows: dict[str, str]) -> None:
    """Two columns; a value that does not fit the width of the terminal is shortened, never wrapped."""
    left = max(map(len, rows))
    room = max(20, shutil.get_terminal_size().columns - left - 2)
    for key, text in rows.items():
        shown = text if len(text) <= room or key == "problem" else text[: room - 3] + "..."
        click.echo(f"{key:<{left}}  {shown}")


def show_tensors(tensors: list[dict[str, Any]]) -> None:
    """One line a tensor, with "name", "type", "shape" and "bytes" of each."""
    rows = [("tensor", "type", "shape", "bytes")]
    rows += [(t["name"], t["type"], " x ".join(map(str, t["shape"])), f"{t['bytes']:,}") for t in tensors]
    name, kind, shape, size = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        click.echo(f"{row[0]:<{name}}  {row[1]:<{kind}}  {row[2]:<{shape}}  {row[3]:>{size}}")


def one_line(value: Any) -> str:
    """A value as one line of printable text: what a file says must not steer the terminal."""
    if isinstance(value, dict):
        first = ", ".join(json.dumps(each, ensure_ascii=False) for each in value["first"])
        text = f"{value['length']:,} values: {first}, ..."
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:2000])


def describe_plan(plans: PairPlan) -> dict[str, Any]:
    """A plan as plain values."""
    found: dict[str, Any] = {"files": list(plans.files), "bytes": plans.n_bytes}
    for role, each in (("targets", plans.targets), ("drafters", plans.drafters)):
        found[role] = {
            file: {
                "bytes": plan.n_bytes,
                "parameters": plan.n_params,
                "types": type_counts(plan.tensors),
                "dropped": dict(plan.dropped),
                "tensors": {tensor.name: tensor.type.name for tensor in plan.tensors},
            }
            for file, plan in each.items()
        }
    if plans.projector:
        found["projector"] = {plans.projector[0]: {"bytes": plans.projector[1].n_bytes}}
    return found


def show_plan(plans: PairPlan) -> None:
    """Print files, sizes, types and what is left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "parameters", "MB", "types", box=None, pad_edge=False)
    for file, plan in {**plans.targets, **plans.drafters}.items():
        kinds = counts_line(type_counts(plan.tensors))
        table.add_row(file, f"{plan.n_params:,}", f"{plan.n_bytes / 1e6:,.1f}", kinds)
    if plans.projector:
        table.add_row(plans.projector[0], "", f"{plans.projector[1].n_bytes / 1e6:,.1f}", "projector")
    console = Console(highlight=False)
    console.print(table, markup=False)
    whole = {*plans.targets, *plans.drafters, *(plans.projector or ())[:1]}
    split = [file for file in plans.files if file not in whole]
    if split:
        console.print(f"split into {len(split)} files: {split[0]} to {split[-1]}", markup=False)
    for plan in (next(iter(plans.targets.values())), next(iter(plans.drafters.values()))):
        for line in left_out(plan):
            console.print(line, markup=False)
    console.print(f"{plans.n_bytes:,} bytes of tensors in all", markup=False)


def left_out(plan: Plan) -> list[str]:
    """What a plan leaves out on purpose, one line for each reason."""
    found = []
    for reason, count in Counter(plan.dropped.values()).items():
        first = next(name for name, why in plan.dropped.items() if why == reason)
        more = f" and {count - 1} more" if count > 1 else ""
        found.append(f"left out: {first}{more}: {reason}")
    return found
