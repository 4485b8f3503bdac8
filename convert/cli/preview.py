"""The options of `gemma-mtp convert`, and what it prints of a plan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.tensor_types import ALIASES, QUANTS, Options, parse_tensor_type, parse_type

if TYPE_CHECKING:
    from gemma_mtp.convert import PairPlan
    from gemma_mtp.convert.plan import Plan

FORMATS = click.Choice([*QUANTS, *ALIASES], case_sensitive=False)
UNITS = {"M": 10**6, "G": 10**9}


def type_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """llama-quantize's options for the types of single tensors, by its names; they are the target's."""
    for option in reversed((
        click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix of the target."),
        click.option("--tensor-type", multiple=True, metavar="PATTERN=TYPE",
                     help="Type of the target's tensors whose names the regular expression is found in; repeatable."),
        click.option("--token-embedding-type", metavar="TYPE", help="Type of the target's token embeddings."),
        click.option("--output-tensor-type", metavar="TYPE", help="Type of the target's output matrix."),
        click.option("--pure", is_flag=True, help="The format's own type for every tensor of the target: no mixture."),
        click.option("--split-max-size", metavar="N(M|G)", help="Split models larger than that, as llama.cpp does."),
    )):  # fmt: skip
        command = option(command)
    return command


def read_options(
    tensor_type: tuple[str, ...], token_embedding_type: str | None, output_tensor_type: str | None, pure: bool
) -> Options:
    """The four options as the recipe takes them.

    Raises:
        MtpError: a type or a pattern cannot be read.
    """
    embedding, output = (
        None if name is None else parse_type(name) for name in (token_embedding_type, output_tensor_type)
    )
    return Options(tuple(map(parse_tensor_type, tensor_type)), embedding, output, pure)


def read_size(text: str | None) -> int | None:
    """Bytes in a size like 500M or 4G, as gguf-split spells it.

    Raises:
        MtpError: it is not such a size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)([MG])", text.upper())
    if found is None:
        raise MtpError(f"{text!r} is not a size; write for instance --split-max-size 4G or 500M.")
    return int(found[1]) * UNITS[found[2]]


def describe_plan(plans: PairPlan) -> dict[str, Any]:
    """A plan as plain values."""
    found: dict[str, Any] = {"files": list(plans.files), "bytes": plans.n_bytes}
    for role, each in (("targets", plans.targets), ("drafters", plans.drafters)):
        found[role] = {
            file: {
                "bytes": plan.n_bytes,
                "parameters": plan.n_params,
                "types": dict(_types(plan)),
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
        kinds = " ".join(f"{kind} x{count}" for kind, count in _types(plan))
        table.add_row(file, f"{plan.n_params:,}", f"{plan.n_bytes / 1e6:,.1f}", kinds)
    if plans.projector:
        table.add_row(plans.projector[0], "", f"{plans.projector[1].n_bytes / 1e6:,.1f}", "projector")
    console = Console(highlight=False)
    console.print(table, markup=False)
    whole = {*plans.targets, *plans.drafters, *(plans.projector or ())}
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


def _types(plan: Plan) -> list[tuple[str, int]]:
    return Counter(tensor.type.name for tensor in plan.tensors).most_common()
