"""Files that a command is given: by their path, or by the name of a model of Ollama."""

from __future__ import annotations

from pathlib import Path

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.blobs import StoredModel, find_model, what_it_is_not


def named(text: str) -> tuple[Path, StoredModel | None]:
    """A path that exists; else the target of a model of Ollama's store, and that model.

    Raises:
        MtpError: it is neither, or the model's files cannot be read.
    """
    path = Path(text)
    if path.exists():
        return path, None
    model = find_model(text)
    if model is None:
        raise MtpError(what_it_is_not(text))
    return model.target, model
