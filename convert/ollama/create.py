"""A converted pair becomes a model of Ollama: all is checked before Ollama reads the first byte."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError, PairError
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.modelfile import files_of, modelfile_of, written_modelfile
from gemma_mtp.convert.ollama.api import DOWNLOAD, Client
from gemma_mtp.convert.ollama.store import Stored, stored

# Types for which Ollama's reader has no size (fs/ggml/ggml.go, TypeSize).
UNSIZED = (Type.Q2_0, Type.TQ1_0, Type.TQ2_0)


@dataclass(frozen=True)
class Ready:
    """A Modelfile whose files were checked, and the bytes that Ollama's store takes while it makes a model of them."""

    path: Path
    peak: int


def create(api: Client, name: str, ready: Ready) -> Stored:
    """Run `ollama create`, which shows its progress itself.

    Raises:
        MtpError: the program is not installed, or it fails.
    """
    done = subprocess.run([program(), "create", name, "-f", ready.path], check=False)
    if done.returncode:
        raise MtpError(f"ollama create ended with status {done.returncode}; what it says stands above.")
    return stored(api, name)


def program() -> str:
    """The program of Ollama.

    Raises:
        MtpError: it is not installed.
    """
    found = shutil.which("ollama")
    if found is None:
        raise MtpError(f"ollama is not installed here; get it from {DOWNLOAD}, then run this again.")
    return found


@contextmanager
def ready(out: Path, projector: Path | None = None) -> Iterator[Ready]:
    """What Ollama will be given of a pair, checked.

    Args:
        out: the folder that a conversion wrote, or the GGUF file of a target with its linked drafter beside it.
        projector: mmproj file of a target that is named by its file.

    Raises:
        PairError: drafter and target do not belong together, or there is no drafter.
        MtpError: a file or a part is missing or damaged, or is of a type that Ollama does not take.
    """
    if out.is_dir():
        if projector is not None:
            raise MtpError("the Modelfile of a folder names its projector itself; name the target's file.")
        path = written_modelfile(out)
        yield Ready(path, check_files(path.read_text(encoding="utf-8"), out))
        return
    text = modelfile_of(out, lambda path: str(path.absolute()), projector)
    with tempfile.TemporaryDirectory(prefix="gemma-mtp-") as folder:
        path = Path(folder) / "Modelfile"
        path.write_text(text, encoding="utf-8")
        yield Ready(path, check_files(text, path.parent))


def check_files(text: str, folder: Path) -> int:
    """Check what a Modelfile names as Ollama will read it.

    Args:
        text: the Modelfile.
        folder: where it lies.

    Returns:
        Bytes that Ollama's store takes at the peak: every file, and once more what Ollama writes anew, targets and what
        was split.
    """
    models, drafts = files_of(text, folder)
    for path in (*models, *drafts):
        if not path.is_file():
            raise MtpError(f"the Modelfile names {path}, which is not there; put it there, or convert again.")
    first = {header.arch: header for path in (*models, *drafts) if (header := link.read_header(path)).arch}
    if not {link.TARGET_ARCH, link.DRAFTER_ARCH} <= first.keys():
        missing = "drafter" if link.TARGET_ARCH in first else "target"
        raise PairError(
            f"{folder / 'Modelfile'} names no {missing}; name a folder that gemma-mtp convert wrote, or write its "
            "Modelfile with gemma-mtp modelfile TARGET.gguf."
        )
    targets = _parts(first[link.TARGET_ARCH], models)
    drafters = _parts(first[link.DRAFTER_ARCH], drafts)
    check_types([*targets, *drafters])
    link.check(targets[0], drafters[0])
    rewritten = [*targets, *(drafters if len(drafters) > 1 else ())]
    return sum(path.stat().st_size for path in (*models, *drafts, *(header.path for header in rewritten)))


def _parts(first: link.Header, paths: Sequence[Path]) -> list[link.Header]:
    """The files of a model, which must all be named: Ollama takes none that is not."""
    parts = link.read_parts(first)
    named = {path.resolve() for path in paths}
    n_named = sum(part.path.resolve() in named for part in parts)
    if n_named < len(parts):
        raise MtpError(
            f"the Modelfile names {n_named} of the {len(parts)} parts of {first.path.name}, and Ollama takes none that "
            f"is not named; write it anew: gemma-mtp modelfile {first.path} > {first.path.parent / 'Modelfile'}"
        )
    return parts


def check_types(headers: Sequence[link.Header]) -> None:
    """Refuse types that Ollama reads the file of, and then cannot size.

    Raises:
        MtpError: naming the first such tensor.
    """
    for header in headers:
        for name, tensor in header.tensors.items():
            if tensor.type in UNSIZED:
                raise MtpError(
                    f"{header.path.name} has {name} in {tensor.type.name}, a type that Ollama cannot size ('size "
                    "overflow'); convert with another format, for instance Q2_K or Q4_0."
                )
