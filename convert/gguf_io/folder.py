"""GGUF files by what they hold, and where the other file of a pair may lie.

Ollama and the Hugging Face cache keep files under their hashes, without an ending, and show them through links.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gemma_mtp.convert.gguf_io.write import MAGIC

# Bytes of a file that are looked at. The architecture, which every writer puts first, is among them.
START = 4096
ENDING = ".gguf"


def is_regular(path: Path) -> bool:
    """Whether there is such a file; also False where that cannot be told, or no file can have such a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def beginning(path: Path) -> bytes:
    """The first bytes of a GGUF file; b"" of anything else, and of what cannot be read."""
    if not is_regular(path):  # opening a FIFO would wait for its other end
        return b""
    try:
        with path.open("rb", buffering=0) as file:
            start: bytes = file.read(START)
    except OSError:
        return b""
    return start if start.startswith(MAGIC) else b""


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing where it may not be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder by name: whatever begins as one, and what ends as one and so ought to be one."""
    return [path for path in contents(folder) if beginning(path) or _ought(path)]


def _ought(path: Path) -> bool:
    """Whether a file is named as GGUF, a link that leads nowhere included."""
    return path.suffix.lower() == ENDING and (is_regular(path) or (path.is_symlink() and not path.exists()))


def folders_around(path: Path) -> list[Path]:
    """Where the other file of a pair may lie, each folder once.

    The folder of the path as given, those that it leads to if it is a link, and in the Hugging Face cache all folders
    of the same repository, those with names before the one with hashes.
    """
    links = [path]
    while links[-1].is_symlink() and len(links) < 40:  # as many as Linux follows
        links.append(links[-1].parent / links[-1].readlink())
    real = path.resolve().parent
    cached = [each for folder in (path.absolute().parent, real) for each in _snapshots(folder)]
    found: dict[Path, Path] = {}
    for folder in (path.parent, *cached, *(each.parent.resolve() for each in links[1:]), real):
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _snapshots(folder: Path) -> Iterable[Path]:
    """The folders of all revisions of the repository in the Hugging Face cache that a folder belongs to."""
    for repository in (folder, *folder.parents):
        if repository.name.startswith("models--") and (repository / "snapshots").is_dir():
            return _with_subfolders(repository / "snapshots")
    return ()


def _with_subfolders(root: Path) -> Iterator[Path]:
    for place, inside, _ in os.walk(root):
        inside.sort()
        yield Path(place)
