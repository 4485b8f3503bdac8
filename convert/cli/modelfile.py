"""The command `gemma-mtp modelfile`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from gemma_mtp.convert import link
from gemma_mtp.convert.modelfile import modelfile, renderer_of, sampling_of, written_modelfile


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
    targets = [part.path.name for part in link.read_parts(header)]
    drafter = link.find_drafter(out, header)
    if drafter is None:
        raise link.PairError(f"{link.why_no_drafter(out, header)}.")
    parts = link.read_parts(link.read_header(drafter))
    drafters = [os.path.relpath(part.path, out.parent) for part in parts]
    click.echo(modelfile(targets, drafters, sampling_of(header), renderer_of(header)), nl=False)
