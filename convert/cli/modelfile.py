"""The command `gemma-mtp modelfile`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from gemma_mtp.convert import link
from gemma_mtp.convert.modelfile import modelfile, written_modelfile


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
        click.echo(written_modelfile(out).read_text(encoding="utf-8"), nl=False)
        return
    header = link.read_header(out)
    link.read_parts(header)
    drafter = link.find_drafter(out, header)
    if drafter is None:
        raise link.PairError(f"{link.why_no_drafter(out, header)}.")
    click.echo(modelfile(out.name, os.path.relpath(drafter, out.parent), {}), nl=False)
