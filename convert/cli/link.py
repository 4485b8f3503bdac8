"""The command `gemma-mtp link`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from gemma_mtp.convert.cli.named import named
from gemma_mtp.convert.cli.show import progress_bar
from gemma_mtp.convert.gguf_io.blobs import is_store, owner_of
from gemma_mtp.convert.gguf_io.folder import folders_around


@click.command("link")
@click.argument("target")
@click.argument("drafter", metavar="DRAFTER.gguf", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write. [default: <drafter>-linked.gguf "
              "beside the target]")  # fmt: skip
@click.option("--in-place", is_flag=True, help="Replace the drafter: written beside it, checked, then renamed.")
@click.option("--ordered-from", metavar="SOURCE",
              help="Hugging Face folder or org/name of the drafter, to add its ordered head (E2B, E4B).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output, and a link to another target.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def link_command(
    target: str,
    drafter: Path,
    out: Path | None,
    in_place: bool,
    ordered_from: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Link a target and a drafter that somebody else converted, after checking that they fit.

    TARGET is a GGUF file, or the name of a model of Ollama. Only the drafter is written anew; the target stays as it
    is, and so does its published hash. One linked drafter serves every quantization of its target. It is found by
    itself when it lies in the target's folder.

    \b
    Examples:
      gemma-mtp link gemma-4-E2B-it-Q4_K_M.gguf mtp-gemma-4-E2B-it.gguf
      gemma-mtp link gemma-4-E2B-it-Q4_K_M.gguf mtp-gemma-4-E2B-it.gguf --in-place
      gemma-mtp link target.gguf drafter.gguf --ordered-from gemma-4-E2B-it-assistant -o linked.gguf
    """
    from gemma_mtp.convert.relink import link_files

    if out is not None and in_place:
        raise click.UsageError("pass -o or --in-place, not both.")
    file, model = named(target)
    with progress_bar("linking") as progress:
        path = link_files(file, drafter, out, in_place, ordered_from, force, progress)
    if as_json:
        click.echo(json.dumps({"target": str(file), "drafter": str(path)}))
        return
    click.echo(f"{path} drafts for {target if model else file.name}")
    if is_store(file.parent):
        attach = f"gemma-mtp ollama attach {owner_of(file) or 'NAME'} --drafter {path}"
        click.echo(f"name it with --drafter, or give it to Ollama: {attach}", err=True)
    elif path.resolve().parent not in [folder.resolve() for folder in folders_around(file)]:
        click.echo(f"move it into {file.absolute().parent}, where it is found by itself", err=True)
