"""Commands as a user types them, and an Ollama that they find."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result
from gemma_mtp.convert.ollama.api import Client
from gemma_mtp.runtime.cli.main import main

# Where a store keeps what is named without a host.
LIBRARY = "registry.ollama.ai/library"


def run(*arguments: str | Path) -> Result:
    """A command as a user types it."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def keep(store: Path, name: str, **layers: Path) -> dict[str, Path]:
    """Put a model into a store as Ollama lays it out (seen in that of v0.33.0-rc2).

    Args:
        store: its folder.
        name: host/namespace/model/tag, whole.
        layers: files by kind: model, draft, projector.

    Returns:
        Their blobs by kind.
    """
    blobs, listed = {}, []
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    for kind, path in layers.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blobs[kind] = store / "blobs" / f"sha256-{digest}"
        shutil.copy(path, blobs[kind])
        media = f"application/vnd.ollama.image.{kind}"
        listed.append({"mediaType": media, "digest": f"sha256:{digest}", "size": path.stat().st_size})
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": listed}))
    return blobs


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
