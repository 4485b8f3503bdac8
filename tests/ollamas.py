"""Commands as a user types them, and an Ollama that they find."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result
from gemma_mtp.convert.ollama.api import Client
from gemma_mtp.runtime.cli.main import main


def run(*arguments: str | Path) -> Result:
    """A command as a user types it."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@dataclass(frozen=True)
class Ollama:
    """A running Ollama, to which the environment points."""

    api: Client
    folder: Path

    def bare(self, name: str, target: Path) -> None:
        """A model without a drafter, as people have them."""
        modelfile = self.folder / "Modelfile"
        modelfile.write_text(f"FROM {target}\n")
        assert os.spawnlp(os.P_WAIT, "ollama", "ollama", "create", name, "-f", str(modelfile)) == 0
