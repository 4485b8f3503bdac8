"""The command `gemma-mtp convert`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from gemma_mtp.convert import Pair, convert_pair, plan_pair
from gemma_mtp.convert.cli.show import counts_line, describe_plan, progress_bar, show_plan
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.hub import AUTO_DRAFTER
from gemma_mtp.convert.naming import name_of
from gemma_mtp.convert.pipeline import EXTEND, KEEP
from gemma_mtp.convert.tensor_types import (
    ALIASES,
    PROJECTOR_QUANTS,
    QUANTS,
    RECIPES,
    Options,
    parse_tensor_type,
    parse_type,
    recipe_of,
)

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
    """The four options as the rules of types take them.

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


@click.command()
@click.argument("target")
@click.argument("drafter", required=False)
@click.option("--drafter", "named", metavar="auto|SOURCE", help="The drafter, instead of as second argument. "
              "[default: auto, the one published for an official target]")  # fmt: skip
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("-q", "--quant", type=FORMATS, multiple=True, help="Format of the target; repeatable.")
@click.option("--drafter-quant", type=FORMATS, multiple=True, help="Format of the drafter; repeatable.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), help="Formats of both, where -q and --drafter-quant name "
              "none: cpu (Q4_0, Q4_0), gpu (Q4_K_M, Q8_0), qat (Q4_0, Q4_0, with the scales of the training). "
              "[default: qat for *-qat-q4_0-unquantized, else gpu]")  # fmt: skip
@type_options
@click.option("--mmproj", is_flag=True, help="Convert the projector too: vision, and audio where there is one.")
@click.option("--mmproj-quant", type=click.Choice(PROJECTOR_QUANTS, case_sensitive=False), default="F16",
              show_default=True, help="Format of the projector.")  # fmt: skip
@click.option("--drafter-vocab", type=click.Choice([KEEP, EXTEND]), default=KEEP, show_default=True,
              help="What the drafter does with tokens that were added to the target: it takes them (extend), or is "
              "refused.")  # fmt: skip
@click.option("--allow-unknown", metavar="KEY", multiple=True, help="Convert although config.json or tokenizer.json "
              "has this key, which may change the model; repeatable.")  # fmt: skip
@click.option("--name", help="Start of the file names, and general.name. [default: the names of the two folders]")
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@click.option("--dry-run", is_flag=True, help="Print the plan with sizes and what is left out; write nothing, "
              "and download no more of weights than their headers.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def convert(
    target: str, drafter: str | None, named: str | None, out: Path, quant: tuple[str, ...],
    drafter_quant: tuple[str, ...], recipe: str | None, imatrix: Path | None, tensor_type: tuple[str, ...],
    token_embedding_type: str | None, output_tensor_type: str | None, pure: bool, split_max_size: str | None,
    mmproj: bool, mmproj_quant: str, drafter_vocab: str, allow_unknown: tuple[str, ...], name: str | None, force: bool,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert a target and its drafter to two linked GGUF files and a Modelfile.

    TARGET and DRAFTER are Hugging Face folders with safetensors weights, or repositories, org/name[@revision], which
    are downloaded into the Hugging Face cache. All formats of llama-quantize are there; the options for single tensors
    have its names and its meaning.

    \b
    Examples:
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out
      gemma-mtp convert google/gemma-4-E2B-it --drafter auto -o out --recipe cpu
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out -q Q4_K_M -q Q8_0 --dry-run
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out -q IQ3_M --imatrix imatrix.gguf
      gemma-mtp convert gemma-4-E4B-it gemma-4-E4B-it-assistant -o out --mmproj
      gemma-mtp convert my-fine-tune gemma-4-E4B-it-assistant -o out --drafter-vocab extend
      gemma-mtp convert snapshots/8f3a snapshots/77c0 -o out --name gemma-4-E4B-it --split-max-size 4G
    """
    if drafter and named:
        raise click.UsageError("pass the drafter once, as second argument or with --drafter.")
    recipe = recipe or recipe_of(name_of(target))
    formats = RECIPES[recipe]
    sources = target, drafter or named or AUTO_DRAFTER
    chosen = quant or formats[:1], drafter_quant or formats[1:]
    options: dict[str, Any] = {
        "options": replace(
            read_options(tensor_type, token_embedding_type, output_tensor_type, pure), qat=recipe == "qat"
        ),
        "imatrix": imatrix,
        "split_max_size": read_size(split_max_size),
        "mmproj": mmproj_quant if mmproj else None,
        "allow_unknown": allow_unknown,
        "drafter_vocab": drafter_vocab,
    }
    if dry_run:
        plans = plan_pair(*sources, *chosen, name, **options)
        click.echo(json.dumps(describe_plan(plans))) if as_json else show_plan(plans)
        return
    with progress_bar("converting") as progress:
        pair = convert_pair(*sources, out, *chosen, name, force, progress, **options)
    _report(pair, as_json)


def _report(pair: Pair, as_json: bool) -> None:
    if as_json:
        roles = {role: getattr(pair, role) for role in ("target", "drafter", "projector", "modelfile")}
        found = {role: str(path) for role, path in roles.items() if path}
        click.echo(json.dumps(found | {"files": [str(path) for path in pair.files]}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "file", "MB", "types"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for path in pair.files:
        role, types = pair.contents[path]
        table.add_row(role, path.name, f"{path.stat().st_size / 1e6:.1f}", counts_line(types))
    table.add_row("Ollama", pair.modelfile.name, "", "")
    click.echo(f"{pair.target.parent}:")
    Console().print(table)
