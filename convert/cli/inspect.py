"""The command `gemma-mtp inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from gemma_mtp.convert import link
from gemma_mtp.convert.cli.named import named
from gemma_mtp.convert.cli.show import counts_line, left_out, one_line, show_rows, show_tensors
from gemma_mtp.convert.gguf_io import read
from gemma_mtp.convert.pipeline import type_counts

# Longer arrays say nothing to a reader: their first values and their length are shown.
SHOWN = 8


@click.command()
@click.argument("file")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--allow-unknown", metavar="KEY", multiple=True, help="Of a folder: as in gemma-mtp convert.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect(file: str, tensors: bool, allow_unknown: tuple[str, ...], as_json: bool) -> None:
    """Show metadata, types and link of a GGUF file, one value a line.

    FILE may be the name of a model of Ollama: its target is shown.

    A file whose metadata makes no sense is shown too, with what is wrong with it. Of a Hugging Face folder it shows
    what would become metadata, the tensors, and which of them a conversion leaves out, with the reason; a folder that
    cannot be converted is refused.

    \b
    Examples:
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf --tensors
      gemma-mtp inspect out/gemma-4-E2B-it-Q4_K_M.gguf --json | jq .link
      gemma-mtp inspect gemma-4-E2B-it --json | jq .dropped
      gemma-mtp inspect gemma4:e4b
    """
    path, model = named(file)
    if path.is_dir():
        _inspect_checkpoint(path, tensors, allow_unknown, as_json)
        return
    header = read.read(path)
    found = plain_header(header, model.drafter if model else None)
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = {key: one_line(value) for key, value in found["metadata"].items()}
    elements = sum(each["elements"] for each in found["tensors"])
    rows["tensors"] = (
        f"{len(header.tensors)}, {elements:,} elements: {counts_line(type_counts(header.tensors.values()))}"
    )
    rows |= {f"link: {key}": one_line(value) for key, value in found["link"].items() if value is not None}
    if found["problem"]:
        rows["problem"] = found["problem"]
    click.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    show_rows(rows)
    if tensors:
        click.echo()
        show_tensors(found["tensors"])


def _inspect_checkpoint(folder: Path, tensors: bool, allowed: Collection[str], as_json: bool) -> None:
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.metadata import Headers
    from gemma_mtp.convert.plan import plan

    with open_checkpoint(folder, allowed) as checkpoint:
        planned = plan(checkpoint.config, checkpoint.index, "BF16")
        Headers(checkpoint, planned)  # what a file would say of the model is checked as it is made
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
    rows = {key: one_line(value) for key, value in metadata.items()}
    counts = counts_line(dict(Counter(source.dtype for source in sources.values()).most_common()))
    rows["tensors"] = f"{len(found)}, {planned.n_params:,} parameters converted: {counts}"
    click.echo(f"{folder}  {planned.arch}")
    show_rows(rows)
    for line in left_out(planned):
        click.echo(one_line(line))
    if tensors:
        click.echo()
        show_tensors(found)


def plain_header(header: link.Header, drafter: Path | None = None) -> dict[str, Any]:
    """A header as plain values: metadata (long arrays by length), tensors (row length first), link, what is wrong.

    Args:
        header: of any GGUF file.
        drafter: that of a model of Ollama; of a target the linked one beside it unless given.
    """
    problem = None
    try:
        link.check_model(header)
        if drafter is None and header.arch == link.TARGET_ARCH:
            drafter = link.find_drafter(header.path, header)
        elif drafter is not None:
            link.check(header, link.read_header(drafter))
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
