"""The commands that work on GGUF files as they are: link, inspect, verify."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from gemma_mtp.convert import integrity as verifying
from gemma_mtp.convert import link
from gemma_mtp.convert.gguf_io import read

if TYPE_CHECKING:
    from rich.progress import Progress

# Longer arrays say nothing to a reader: their first values and their length are shown.
SHOWN = 8


def progress_bar(what: str) -> Progress:
    """Bytes, rate and remaining time on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def type_counts(header: link.Header) -> str:
    counts = Counter(tensor.type.name for tensor in header.tensors.values())
    return " ".join(f"{kind} x{count}" for kind, count in counts.most_common())


@click.command("link")
@click.argument("target", metavar="TARGET.gguf", type=click.Path(path_type=Path))
@click.argument("drafter", metavar="DRAFTER.gguf", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write. [default: <drafter>-linked.gguf "
              "beside the target]")  # fmt: skip
@click.option("--in-place", is_flag=True, help="Replace the drafter: written beside it, checked, then renamed.")
@click.option("--ordered-from", metavar="SOURCE",
              help="Hugging Face folder or org/name of the drafter, to add its ordered head (E2B, E4B).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output, and a link to another target.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def link_command(
    target: Path,
    drafter: Path,
    out: Path | None,
    in_place: bool,
    ordered_from: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Link a target and a drafter that somebody else converted, after checking that they fit.

    Only the drafter is written anew; the target stays as it is, and so does its published hash. One linked drafter
    serves every quantization of its target. It is found by itself when it lies in the target's folder.

    \b
    Examples:
      gemma-mtp link gemma-4-E2B-it-Q4_K_M.gguf mtp-gemma-4-E2B-it.gguf
      gemma-mtp link gemma-4-E2B-it-Q4_K_M.gguf mtp-gemma-4-E2B-it.gguf --in-place
      gemma-mtp link target.gguf drafter.gguf --ordered-from gemma-4-E2B-it-assistant -o linked.gguf
    """
    from gemma_mtp.convert.relink import link_files

    if out is not None and in_place:
        raise click.UsageError("pass -o or --in-place, not both.")
    with progress_bar("linking") as bar:
        task = bar.add_task("", total=None)
        path = link_files(
            target, drafter, out, in_place, ordered_from, force,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"target": str(target), "drafter": str(path)}))
        return
    click.echo(f"{path} drafts for {target.name}")
    if path.resolve().parent != target.resolve().parent:
        click.echo(f"move it into {target.resolve().parent}, where it is found by itself", err=True)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show metadata, types and link of a GGUF file, one value a line.

    A file whose metadata makes no sense is shown too, with what is wrong with it. Of a Hugging Face folder it shows
    what would become metadata, the tensors, and which of them a conversion leaves out, with the reason.

    \b
    Examples:
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf --tensors
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf --json | jq .link
      gemma-mtp inspect gemma-4-E2B-it --json | jq .dropped
    """
    if file.is_dir():
        _inspect_checkpoint(file, tensors, as_json)
        return
    header = read.read(file)
    found = describe(header)
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = {key: _short(value) for key, value in found["metadata"].items()}
    elements = sum(each["elements"] for each in found["tensors"])
    rows["tensors"] = f"{len(header.tensors)}, {elements:,} elements: {type_counts(header)}"
    rows |= {f"link: {key}": _short(value) for key, value in found["link"].items() if value is not None}
    if found["problem"]:
        rows["problem"] = found["problem"]
    click.echo(f"{file}  {file.stat().st_size / 1e6:,.1f} MB")
    _table(rows)
    if tensors:
        click.echo()
        _tensor_table(found["tensors"])


def _inspect_checkpoint(folder: Path, tensors: bool, as_json: bool) -> None:
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.cli.preview import left_out
    from gemma_mtp.convert.plan import plan

    with open_checkpoint(folder) as checkpoint:
        planned = plan(checkpoint.config, checkpoint.index, "BF16")
        sources = checkpoint.index
    metadata = {f"{planned.arch}.{key}": value for key, (_, value) in planned.parameters.items()}
    found = [
        {"name": name, "type": source.dtype, "shape": list(source.shape), "bytes": source.size}
        for name, source in sources.items()
    ]
    if as_json:
        described = {"architecture": planned.arch, "parameters": planned.n_params, "metadata": metadata}
        click.echo(json.dumps({"folder": str(folder), **described, "tensors": found, "dropped": dict(planned.dropped)}))
        return
    rows = {key: _short(value) for key, value in metadata.items()}
    kinds = Counter(source.dtype for source in sources.values()).most_common()
    counts = " ".join(f"{kind} x{count}" for kind, count in kinds)
    rows["tensors"] = f"{len(found)}, {planned.n_params:,} parameters converted: {counts}"
    click.echo(f"{folder}  {planned.arch}")
    _table(rows)
    for line in left_out(planned):
        click.echo(_short(line))
    if tensors:
        click.echo()
        _tensor_table(found)


def _table(rows: dict[str, str]) -> None:
    """Two columns; a value that does not fit the width of the terminal is shortened, never wrapped."""
    left = max(map(len, rows))
    room = max(20, shutil.get_terminal_size().columns - left - 2)
    for key, text in rows.items():
        shown = text if len(text) <= room or key == "problem" else text[: room - 3] + "..."
        click.echo(f"{key:<{left}}  {shown}")


def _tensor_table(tensors: list[dict[str, Any]]) -> None:
    rows = [("tensor", "type", "shape", "bytes")]
    rows += [(t["name"], t["type"], " x ".join(map(str, t["shape"])), f"{t['bytes']:,}") for t in tensors]
    name, kind, shape, size = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        click.echo(f"{row[0]:<{name}}  {row[1]:<{kind}}  {row[2]:<{shape}}  {row[3]:>{size}}")


def _short(value: Any) -> str:
    """A value as one line of printable text: what a file says must not steer the terminal."""
    if isinstance(value, dict):
        first = ", ".join(json.dumps(each, ensure_ascii=False) for each in value["first"])
        text = f"{value['length']:,} values: {first}, ..."
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:2000])


def describe(header: link.Header) -> dict[str, Any]:
    """A header as plain values: metadata (long arrays by length), tensors (row length first), link, what is wrong."""
    problem, drafter = None, None
    try:
        link.check_model(header)
        drafter = link.find_drafter(header.path, header) if header.arch == link.TARGET_ARCH else None
    except link.MtpError as found:
        problem = str(found)
    return {
        "file": str(header.path),
        "architecture": header.arch,
        "metadata": {key: _plain(value) for key, value in header.metadata.items()},
        "tensors": [
            {"name": name, "type": t.type.name, "shape": list(t.shape), "elements": t.elements, "bytes": t.size}
            for name, t in header.tensors.items()
        ],
        "link": {
            "role": header.metadata.get(link.KEY_ROLE),
            "source": header.metadata.get(link.KEY_SOURCE),
            "target": header.metadata.get(link.KEY_TARGET),
            "drafter": None if drafter is None else str(drafter),
            "ordered head": link.KEY_CENTROIDS in header.metadata if header.arch == link.DRAFTER_ARCH else None,
        },
        "problem": problem,
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
    """Check a converted pair: both files whole, every hash right, every block finite, the drafter the target's own.

    OUT is the folder that convert wrote, or one GGUF file of it.

    \b
    Examples:
      gemma-mtp verify out
      gemma-mtp verify out/gemma-4-E2B-it-Q4_K_M.gguf --json
    """
    with progress_bar("reading") as bar:
        task = bar.add_task("", total=None)
        found = verifying.verify_files(out, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        click.echo(json.dumps(found))
        return
    for file in found["files"]:
        hashes = "hashes equal" if file["hashed"] else "no hashes in the file"
        click.echo(f"ok  {file['file']}: {file['tensors']} tensors, {file['bytes'] / 1e6:.1f} MB, {hashes}")
    for target, drafter in found["pairs"].items():
        click.echo(f"ok  {Path(drafter).name} drafts for {Path(target).name}")
