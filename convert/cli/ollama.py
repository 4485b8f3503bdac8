"""The commands `gemma-mtp ollama ...`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import click
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.modelfile import written_modelfile


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
    path = written_modelfile(out)
    program = shutil.which("ollama")
    if program is None:
        raise MtpError(f"ollama is not installed; get it from https://ollama.com/download, then run: "
                            f"ollama create {name} -f {path}")  # fmt: skip
    done = subprocess.run([program, "create", name, "-f", path], check=False)
    if done.returncode:
        raise MtpError(f"ollama create ended with status {done.returncode}.")
