"""The commands that convert a pair and look at the result; each is a thin skin over an importable function."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from gemma_mtp.convert import Pair, convert_pair, link, plan_pair
from gemma_mtp.convert.blocks import Type
from gemma_mtp.convert.cli_convert import FORMATS, describe_plan, read_options, read_size, show_plan, type_options
from gemma_mtp.convert.recipe import RECIPES, recipe_of
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

# Arrays that say nothing to a reader are shown by length alone.
SHOWN = 8


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("drafter", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("-q", "--quant", type=FORMATS, multiple=True, help="Format of the target; repeatable.")
@click.option("--drafter-quant", type=FORMATS, multiple=True, help="Format of the drafter; repeatable.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), help="Formats of both, where -q and --drafter-quant name "
              "none: cpu (Q4_0, Q4_0), gpu (Q4_K_M, Q8_0), qat (Q4_0, Q4_0). [default: qat for "
              "*-qat-q4_0-unquantized, else gpu]")  # fmt: skip
@type_options
@click.option("--name", help="Start of the file names. [default: the names of the two folders]")
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@click.option("--dry-run", is_flag=True, help="Print the plan with sizes and what is left out; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def convert(
    target: Path, drafter: Path, out: Path, quant: tuple[str, ...], drafter_quant: tuple[str, ...], recipe: str | None,
    imatrix: Path | None, tensor_type: tuple[str, ...], token_embedding_type: str | None,
    output_tensor_type: str | None, pure: bool, split_max_size: str | None, name: str | None, force: bool,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert a target and its drafter to two linked GGUF files and a Modelfile.

    TARGET and DRAFTER are Hugging Face folders with safetensors weights. All formats of llama-quantize are there; the
    options for single tensors have its names and its meaning.

    \b
    Examples:
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out --recipe cpu
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out -q Q4_K_M -q Q8_0 --dry-run
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out -q IQ3_M --imatrix imatrix.gguf
      gemma-mtp convert snapshots/8f3a snapshots/77c0 -o out --name gemma-4-E4B-it --split-max-size 4G
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    formats = RECIPES[recipe or recipe_of(target.resolve().name)]
    chosen = quant or formats[:1], drafter_quant or formats[1:]
    options: dict[str, Any] = {
        "options": read_options(tensor_type, token_embedding_type, output_tensor_type, pure),
        "imatrix": imatrix,
        "split_max_size": read_size(split_max_size),
    }
    if dry_run:
        plans = plan_pair(target, drafter, *chosen, name, **options)
        click.echo(json.dumps(describe_plan(plans))) if as_json else show_plan(plans)
        return
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        pair = convert_pair(
            target, drafter, out, *chosen, name, force,
            lambda done, total: bar.update(task, completed=done, total=total), **options,
        )  # fmt: skip
    _report(pair, as_json)


def _report(pair: Pair, as_json: bool) -> None:
    if as_json:
        roles = {role: str(getattr(pair, role)) for role in ("target", "drafter", "modelfile")}
        click.echo(json.dumps(roles | {"files": [str(path) for path in pair.files]}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("", "file", "MB", "types"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for path in pair.files:
        header = link.read_header(path)
        role = str(header.metadata.get(link.KEY_ROLE, ""))
        table.add_row(role, path.name, f"{path.stat().st_size / 1e6:.1f}", _type_counts(header))
    table.add_row("Ollama", pair.modelfile.name, "", "")
    click.echo(f"{pair.target.parent}:")
    Console().print(table)


def _type_counts(header: link.Header) -> str:
    counts = Counter(Type(tensor.type).name for tensor in header.tensors.values())
    return " ".join(f"{kind} x{count}" for kind, count in counts.most_common())


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show metadata, types and link of a GGUF file.

    \b
    Examples:
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf --tensors
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf --json | jq .link
    """
    header = link.read_header(file)
    found = describe(header)
    if as_json:
        click.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    table = Table(title=str(file), box=None, show_header=False, pad_edge=False, title_justify="left")
    for key, value in found["metadata"].items():
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        table.add_row(key, text if len(text) < 200 else text[:200] + " ...")
    table.add_row("tensors", f"{len(header.tensors)}: {_type_counts(header)}")
    for key, value in found["link"].items():
        table.add_row(f"link: {key}", str(value))
    console.print(table, markup=False)
    if tensors:
        listing = Table("tensor", "type", "shape", "bytes", box=None, pad_edge=False)
        for each in found["tensors"]:
            shape = " x ".join(map(str, each["shape"]))
            listing.add_row(each["name"], each["type"], shape, str(each["bytes"]))
        console.print(listing, markup=False)


def describe(header: link.Header) -> dict[str, Any]:
    """A header as plain values: metadata (long arrays by length), tensors (row length first), link."""
    drafter = link.find_drafter(header.path, header) if header.arch == link.TARGET_ARCH else None
    return {
        "file": str(header.path),
        "architecture": header.arch,
        "metadata": {key: _plain(value) for key, value in header.metadata.items()},
        "tensors": [
            {"name": name, "type": Type(t.type).name, "shape": list(t.shape), "bytes": t.size}
            for name, t in header.tensors.items()
        ],
        "link": {
            "role": header.metadata.get(link.KEY_ROLE),
            "source": header.metadata.get(link.KEY_SOURCE),
            "target": header.metadata.get(link.KEY_TARGET),
            "drafter": None if drafter is None else str(drafter),
            "ordered head": link.KEY_CENTROIDS in header.metadata if header.arch == link.DRAFTER_ARCH else None,
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float)):
        return value
    if len(value) > SHOWN * 8:
        shown = value[:SHOWN]
        return {"length": len(value), "first": shown if isinstance(shown, list) else shown.tolist()}
    return list(value) if isinstance(value, link.Strings) else value.tolist()


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def verify(out: Path, as_json: bool) -> None:
    """Check a converted pair: both files whole, every block finite, the drafter the target's own.

    OUT is the folder that convert wrote, or one GGUF file of it.

    \b
    Examples:
      gemma-mtp verify out
      gemma-mtp verify out/gemma-4-E2B-it-Q4_K_M.gguf --json
    """
    found = verify_files(out)
    if as_json:
        click.echo(json.dumps(found))
        return
    for file in found["files"]:
        click.echo(f"ok  {file['file']}: {file['tensors']} tensors, {file['bytes'] / 1e6:.1f} MB")
    for target, drafter in found["pairs"].items():
        click.echo(f"ok  {Path(drafter).name} drafts for {Path(target).name}")


def verify_files(out: Path) -> dict[str, Any]:
    """Read a folder's GGUF files, or one file and its drafter, from end to end.

    Raises:
        link.MtpError: naming the first file that is damaged, unlinked or not its target's.
    """
    paths = sorted(out.glob("*.gguf")) if out.is_dir() else [out]
    if not paths:
        raise link.MtpError(f"{out} holds no GGUF file; name the folder that gemma-mtp convert wrote.")
    headers = [link.read_header(path) for path in paths]
    pairs = {}
    for header in headers:
        if header.arch == link.TARGET_ARCH:
            drafter = link.find_drafter(header.path, header)
            if drafter is None:
                raise link.PairError(f"{header.path} has no linked drafter beside it; convert the pair again.")
            link.check(header, link.read_header(drafter))
            pairs[str(header.path)] = str(drafter)
    for header in headers:
        _all_finite(header)
    files = [{"file": str(h.path), "tensors": len(h.tensors), "bytes": h.path.stat().st_size} for h in headers]
    return {"files": files, "pairs": pairs}


def _all_finite(header: link.Header) -> None:
    from gemma_mtp.convert.quantize import valid

    data = np.memmap(header.path, np.uint8, "r")
    for name, tensor in header.tensors.items():
        if not valid(data[tensor.offset : tensor.offset + tensor.size], Type(tensor.type)):
            raise link.MtpError(f"{header.path}: tensor {name!r} is damaged (NaN or infinite); convert it again.")


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
def modelfile(out: Path) -> None:
    """Print the Modelfile of a converted pair.

    \b
    Example:
      gemma-mtp modelfile out > Modelfile
    """
    click.echo(_modelfile(out).read_text(encoding="utf-8"), nl=False)


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
