"""The command `gemma-mtp modelfile`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from gemma_mtp.convert.cli.named import named
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.modelfile import modelfile_of, written_modelfile


@click.command("modelfile")
@click.argument("out")
@click.option("--projector", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="mmproj file of the target, where OUT is a file.")  # fmt: skip
def modelfile_command(out: str, projector: Path | None) -> None:
    """Print the Modelfile of a converted or linked pair.

    OUT is the folder that convert wrote, the GGUF file of a target with its linked drafter beside it, or the name of a
    model of Ollama.

    \b
    Examples:
      gemma-mtp modelfile out
      gemma-mtp modelfile gemma-4-E2B-it-Q4_K_M.gguf > Modelfile
      gemma-mtp modelfile gemma4:e4b
    """
    path, model = named(out)
    if path.is_dir():
        if projector is not None:
            raise MtpError("the Modelfile of a folder names its projector itself; name the target's file.")
        click.echo(written_modelfile(path).read_text(encoding="utf-8"), nl=False)
        return
    if model is not None:
        text = modelfile_of(path, str, projector or next(iter(model.projectors), None), model.drafter)
    else:
        text = modelfile_of(path, lambda file: os.path.relpath(file, path.parent), projector)
    click.echo(text, nl=False)
