"""The Modelfile of a pair, in the syntax of ollama's parser/parser.go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.naming import one_line

# What Gemma 4's generation_config.json says, for checkpoints that come without one.
SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
# Ollama's own default (its pull request 15980).
DRAFT_NUM_PREDICT = 4


def modelfile(target: str, drafter: str, generation: Mapping[str, Any], projector: str | None = None) -> str:
    """Text of the Modelfile.

    Neither template nor stop words are set: Ollama takes its Gemma 4 renderer and parser by architecture, and the ends
    of a turn from the GGUF file.

    Args:
        target: file name of the target, beside the Modelfile.
        drafter: file name of its drafter.
        generation: the target's generation_config.json, or {}.
        projector: file name of its mmproj file, if there is one; Ollama takes that by a second FROM.

    Raises:
        MtpError: a name cannot stand in a line of text.
    """
    for name in (target, drafter, projector or ""):
        if not one_line(name):
            raise MtpError(f"a Modelfile cannot name the file {name!r}; rename it.")
    lines = [f"FROM ./{target}", *([f"FROM ./{projector}"] if projector else []), f"DRAFT ./{drafter}"]
    lines += [f"PARAMETER {key} {generation.get(key, value):g}" for key, value in SAMPLING.items()]
    lines.append(f"PARAMETER draft_num_predict {DRAFT_NUM_PREDICT}")
    return "\n".join(lines) + "\n"


def written_modelfile(folder: Path) -> Path:
    """The Modelfile that a conversion wrote.

    Raises:
        MtpError: there is none.
    """
    path = folder / "Modelfile"
    if not path.exists():
        raise MtpError(f"{folder} has no Modelfile; name the folder that gemma-mtp convert wrote.")
    return path
