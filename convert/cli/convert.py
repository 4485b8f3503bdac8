"""The commands that convert a pair and look at the result; each is a thin skin over an importable function."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from gemma_mtp.convert import Pair, convert_pair, link, plan_pair
from gemma_mtp.convert.cli.files import progress_bar, type_counts
from gemma_mtp.convert.cli.preview import FORMATS, describe_plan, read_options, read_size, show_plan, type_options
from gemma_mtp.convert.hub import AUTO, name_of
from gemma_mtp.convert.modelfile import modelfile
from gemma_mtp.convert.tensor_types import RECIPES, recipe_of

PROJECTOR_FORMATS = ["F16", "BF16", "F32", "Q8_0"]


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
@click.option("--mmproj-quant", type=click.Choice(PROJECTOR_FORMATS, case_sensitive=False), default="F16",
              show_default=True, help="Format of the projector.")  # fmt: skip
@click.option("--allow-unknown", metavar="KEY", multiple=True,
              help="Convert although config.json has this key, which may change the model; repeatable.")  # fmt: skip
@click.option("--name", help="Start of the file names. [default: the names of the two folders]")
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@click.option("--dry-run", is_flag=True, help="Print the plan with sizes and what is left out; write nothing, "
              "and download no more of weights than their headers.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def convert(
    target: str, drafter: str | None, named: str | None, out: Path, quant: tuple[str, ...],
    drafter_quant: tuple[str, ...], recipe: str | None, imatrix: Path | None, tensor_type: tuple[str, ...],
    token_embedding_type: str | None, output_tensor_type: str | None, pure: bool, split_max_size: str | None,
    mmproj: bool, mmproj_quant: str, allow_unknown: tuple[str, ...], name: str | None, force: bool, dry_run: bool,
    as_json: bool,
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
      gemma-mtp convert snapshots/8f3a snapshots/77c0 -o out --name gemma-4-E4B-it --split-max-size 4G
    """
    if drafter and named:
        raise click.UsageError("pass the drafter once, as second argument or with --drafter.")
    recipe = recipe or recipe_of(name_of(target))
    formats = RECIPES[recipe]
    sources = target, drafter or named or AUTO
    chosen = quant or formats[:1], drafter_quant or formats[1:]
    options: dict[str, Any] = {
        "options": replace(
            read_options(tensor_type, token_embedding_type, output_tensor_type, pure), qat=recipe == "qat"
        ),
        "imatrix": imatrix,
        "split_max_size": read_size(split_max_size),
        "mmproj": mmproj_quant if mmproj else None,
        "allow_unknown": allow_unknown,
    }
    if dry_run:
        plans = plan_pair(*sources, *chosen, name, **options)
        click.echo(json.dumps(describe_plan(plans))) if as_json else show_plan(plans)
        return
    with progress_bar("converting") as bar:
        task = bar.add_task("", total=None)
        pair = convert_pair(
            *sources, out, *chosen, name, force,
            lambda done, total: bar.update(task, completed=done, total=total), **options,
        )  # fmt: skip
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
        header = link.read_header(path)
        role = "projector" if path == pair.projector else str(header.metadata.get(link.KEY_ROLE, ""))
        table.add_row(role, path.name, f"{path.stat().st_size / 1e6:.1f}", type_counts(header))
    table.add_row("Ollama", pair.modelfile.name, "", "")
    click.echo(f"{pair.target.parent}:")
    Console().print(table)


@click.command("modelfile")
@click.argument("out", type=click.Path(path_type=Path, exists=True))
def modelfile_command(out: Path) -> None:
    """Print the Modelfile of a converted or linked pair.

    OUT is the folder that convert wrote, or the GGUF file of a target with its linked drafter beside it.

    \b
    Examples:
      gemma-mtp modelfile out
      gemma-mtp modelfile gemma-4-E2B-it-Q4_K_M.gguf > Modelfile
    """
    if out.is_dir():
        click.echo(_modelfile(out).read_text(encoding="utf-8"), nl=False)
        return
    drafter = link.find_drafter(out)
    if drafter is None:
        raise link.PairError(f"{out} has no linked drafter beside it; run gemma-mtp link first.")
    click.echo(modelfile(out.name, drafter.name, {}), nl=False)


def _modelfile(out: Path) -> Path:
    path = out / "Modelfile"
    if not path.exists():
        raise link.MtpError(f"{out} has no Modelfile; name the folder that gemma-mtp convert wrote.")
    return path


@click.group()
def ollama() -> None:
    """Hand a converted pair to Ollama."""


@ollama.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
def create(name: str, out: Path) -> None:
    """Run `ollama create NAME` with the Modelfile in OUT.

    \b
    Example:
      gemma-mtp ollama create gemma-4-e2b out && ollama run gemma-4-e2b
    """
    path = _modelfile(out)
    program = shutil.which("ollama")
    if program is None:
        raise link.MtpError(f"ollama is not installed; get it from https://ollama.com/download, then run: "
                            f"ollama create {name} -f {path}")  # fmt: skip
    done = subprocess.run([program, "create", name, "-f", path], check=False)
    if done.returncode:
        raise link.MtpError(f"ollama create ended with status {done.returncode}.")
