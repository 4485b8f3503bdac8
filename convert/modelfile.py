"""The Modelfile of a pair, in the syntax of ollama's parser/parser.go (read in v0.33.0-rc2, and run there)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.read import Header
from gemma_mtp.convert.naming import one_line

# What Gemma 4's generation_config.json says, for checkpoints that come without one.
SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
# The same as a GGUF file has them.
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp", "top_k": "general.sampling.top_k", "top_p": "general.sampling.top_p",
}  # fmt: skip
# Ollama's own default (its pull request 15980). Its own engine drafts so many in every round, and may run the model
# tomorrow; on ours it is a bound (docs/ollama.md).
DRAFT_NUM_PREDICT = 4
# Architecture of an mmproj file.
PROJECTOR = "clip"
# What ends a turn. Ollama adds it by itself only where renderer or parser are left to it (server/create.go).
STOP = "<turn|>"
PARSER = "gemma4"
# Ollama's renderers: E2B and E4B end an answer's prompt in one way, 12B, 26B and 31B in another. The neutral "gemma4"
# is resolved by the name, else from 12e9 parameters on, and the 12B has 11.9e9 (server/renderer_resolution.go).
SMALL, LARGE = "gemma4-small", "gemma4-large"
# The first Ollama whose llama.cpp takes the drafters of all sizes; "gemma4-assistant" itself is known since 0.30.9.
REQUIRES = "0.30.10"


def renderer(per_layer_input: Any) -> str:
    """Ollama's renderer for a target: the small models are those with embeddings for each layer.

    Args:
        per_layer_input: width of these, hidden_size_per_layer_input in config.json; 0 or None without.
    """
    return SMALL if per_layer_input else LARGE


def renderer_of(target: Header) -> str:
    """Ollama's renderer for a target's file."""
    return renderer(target.of_arch("embedding_length_per_layer_input", 0))


def sampling_of(target: Header) -> dict[str, Any]:
    """What a target's file says of sampling, as generation_config.json names it."""
    return {key: target.metadata[name] for key, name in SAMPLING_KEYS.items() if name in target.metadata}


def modelfile(
    targets: Sequence[str],
    drafters: Sequence[str],
    generation: Mapping[str, Any],
    renderer: str,
    projector: str | None = None,
) -> str:
    """Text of the Modelfile.

    Args:
        targets: names of the target's files, all parts of it if it is split: Ollama takes the files that are named, and
            no others. They lie beside the Modelfile, unless they are whole paths.
        drafters: the same of its drafter.
        generation: the target's generation_config.json, or {}.
        renderer: Ollama's renderer for the target.
        projector: its mmproj file, if there is one; Ollama takes that by another FROM.

    Raises:
        MtpError: a name cannot stand in a line of text.
    """
    named = [("FROM", name) for name in (*targets, *([projector] if projector else []))]
    named += [("DRAFT", name) for name in drafters]
    for _, name in named:
        if not one_line(name):
            raise MtpError(f"a Modelfile cannot name the file {name!r}; rename it.")
    lines = [f"{command} {name if Path(name).is_absolute() else f'./{name}'}" for command, name in named]
    lines += [f"RENDERER {renderer}", f"PARSER {PARSER}", f"REQUIRES {REQUIRES}", f"PARAMETER stop {STOP}"]
    lines += [f"PARAMETER {key} {generation.get(key, value):g}" for key, value in SAMPLING.items()]
    lines.append(f"PARAMETER draft_num_predict {DRAFT_NUM_PREDICT}")
    return "\n".join(lines) + "\n"


def modelfile_of(
    target: Path, named: Callable[[Path], str], projector: Path | None = None, drafter: Path | None = None
) -> str:
    """Text of the Modelfile of a target's file and its drafter.

    Args:
        target: GGUF file; of a split, its first file.
        named: how the Modelfile shall name a file.
        projector: mmproj file of the target.
        drafter: its GGUF file; the linked one beside the target unless given.

    Raises:
        PairError: there is no drafter, or it is not the target's.
        MtpError: a file is missing or damaged, or the projector is none.
    """
    header = link.read_header(target)
    targets = link.read_parts(header)
    found = drafter or link.find_drafter(target, header)
    if found is None:
        raise link.PairError(f"{link.why_no_drafter(target, header)}.")
    drafters = link.read_parts(link.read_header(found))
    link.check(header, drafters[0])
    if projector is not None and link.read_header(projector).arch != PROJECTOR:
        raise MtpError(f"{projector} is no projector; pass the mmproj file of {target.name}.")
    files, drafts = ([named(part.path) for part in parts] for parts in (targets, drafters))
    encoders = None if projector is None else named(projector)
    return modelfile(files, drafts, sampling_of(header), renderer_of(header), encoders)


def written_modelfile(folder: Path) -> Path:
    """The Modelfile that a conversion wrote.

    Raises:
        MtpError: there is none.
    """
    path = folder / "Modelfile"
    if not path.exists():
        raise MtpError(f"{folder} has no Modelfile; name the folder that gemma-mtp convert wrote.")
    return path


def files_of(text: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """The files that a Modelfile names by FROM, and those by DRAFT.

    Args:
        text: the Modelfile; that of Ollama's /api/show too. What stands in quotes over several lines names no file.
        folder: where relative paths begin.
    """
    plain = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    found: dict[str, list[Path]] = {"FROM": [], "DRAFT": []}
    for command, name in re.findall(r"^(FROM|DRAFT)[ \t]+(.+?)[ \t]*$", plain, re.MULTILINE | re.IGNORECASE):
        found[command.upper()].append(folder / Path(name.strip('"')).expanduser())
    return found["FROM"], found["DRAFT"]
