"""The command `gemma-mtp verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from gemma_mtp.convert.cli.named import named
from gemma_mtp.convert.cli.show import progress_bar
from gemma_mtp.convert.integrity import verify_files


@click.command("verify")
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def verify_command(out: str, as_json: bool) -> None:
    """Check a converted pair: both files whole, every hash right, every block finite, the drafter the target's own.

    OUT is the folder that convert wrote, one GGUF file of it, or the name of a model of Ollama.

    \b
    Examples:
      gemma-mtp verify out
      gemma-mtp verify out/gemma-4-E2B-it-Q4_K_M.gguf --json
      gemma-mtp verify gemma4:e4b
    """
    path, model = named(out)
    with progress_bar("reading") as progress:
        found = verify_files(path, progress, model.drafter if model else None)
    if as_json:
        click.echo(json.dumps(found))
        return
    for file in found["files"]:
        hashes = "hashes equal" if file["hashed"] else "no hashes in the file"
        if 0 < file["hashed"] < file["tensors"]:
            hashes = f"the {file['hashed']} hashes there are equal"
        click.echo(f"ok  {file['file']}: {file['tensors']} tensors, {file['bytes'] / 1e6:.1f} MB, {hashes}")
    for target, drafter in found["pairs"].items():
        click.echo(f"ok  {Path(drafter).name} drafts for {Path(target).name}")
