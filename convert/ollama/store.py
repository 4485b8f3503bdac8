"""What a model of Ollama's store is made of, and where its files lie."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.blobs import check_there, stores
from gemma_mtp.convert.modelfile import files_of
from gemma_mtp.convert.ollama.api import Client


@dataclass(frozen=True)
class Stored:
    """A model as Ollama has it: paths of its layers on Ollama's machine, and its settings.

    `parent` is the model that it was made from, "" if from files; `drafts` the tokens that are drafted in a round, at
    most if our engine runs it.
    """

    name: str
    family: str
    target: Path | None
    drafter: Path | None = None
    projectors: tuple[Path, ...] = ()
    renderer: str = ""
    parser: str = ""
    parent: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""

    @property
    def drafts(self) -> int:
        wanted = self.parameters.get("draft_num_predict", 4)
        return max(0, wanted) if self.drafter and isinstance(wanted, int) else 0

    @property
    def is_gemma4(self) -> bool:
        return self.family == link.TARGET_ARCH

    def read_target(self) -> link.Header:
        """Raises MtpError: it has none, or this user cannot read it, or it is damaged."""
        if self.target is None:
            raise MtpError(f"{self.name} holds no GGUF file (safetensors, or a model of the cloud); nothing can draft "
                           "for it here.")  # fmt: skip
        return _read(self.target)

    def read_drafter(self) -> link.Header | None:
        """Raises MtpError: this user cannot read it, or it is damaged."""
        return None if self.drafter is None else _read(self.drafter)


def tagged(name: str) -> str:
    """A model's name with its tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def stored(api: Client, name: str) -> Stored:
    """A model of the store.

    Raises:
        OllamaError: there is none of this name.
        MtpError: Ollama is not there.
    """
    shown = api.post("/api/show", {"model": name})
    text, details = str(shown.get("modelfile", "")), shown.get("details") or {}
    models, drafters = files_of(text, Path())
    models = [path for path in models if path.is_absolute()]
    # A model in one file is named again as its own projector.
    return Stored(
        name,
        str(details.get("family", "")),
        models[0] if models else None,
        drafters[-1] if drafters else None,
        tuple(path for path in models[1:] if path != models[0]),
        shown.get("renderer") or _setting(text, "RENDERER"),
        shown.get("parser") or _setting(text, "PARSER"),
        str(details.get("parent_model", "")),
        parameters(str(shown.get("parameters", ""))),
        " ".join(str(details[key]) for key in ("parameter_size", "quantization_level") if details.get(key)),
    )


def names(api: Client) -> list[str]:
    """The names of all models, the latest first."""
    return [str(each["name"]) for each in api.get("/api/tags").get("models") or []]


def parameters(text: str) -> dict[str, Any]:
    """The parameters that /api/show tells, a name and a value a line; of one that is there twice, a list."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        name, _, raw = line.strip().partition(" ")
        try:
            value = json.loads(raw)
        except ValueError:
            value = raw.strip().strip('"')
        if name in found:
            found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), value]
        elif name:
            found[name] = value
    return found


def blobs_folder(api: Client) -> Path | None:
    """The folder of the store's files, if it is one of this machine: that of any model, or where it lies by default."""
    if not api.is_here:
        return None
    for name in names(api):
        target = stored(api, name).target
        if target is not None:
            return target.parent if target.parent.is_dir() else None
    return next((store for store in stores() if store.is_dir()), None)


def check_room(api: Client, peak: int) -> str:
    """Refuse what does not fit the store's disk; what it takes, in words.

    Raises:
        MtpError: there is less room than that.
    """
    takes = f"{peak / 1e9:.2f} GB at the peak"
    folder = blobs_folder(api)
    if folder is None:
        return takes
    free = shutil.disk_usage(folder).free
    if free < peak:
        raise MtpError(
            f"Ollama's store at {folder} takes {takes}, and its disk has {free / 1e9:.2f} GB left; free some, or move "
            "the store: set OLLAMA_MODELS and start Ollama anew."
        )
    return f"{takes} of {free / 1e9:.1f} GB free"


def _read(path: Path) -> link.Header:
    check_there(path)
    return link.read_header(path)


def _setting(text: str, command: str) -> str:
    found: list[str] = re.findall(rf'^{command} "?([\w.-]+)"?\s*$', text, re.MULTILINE)
    return found[-1] if found else ""
