"""Other trees of llama.cpp: a folder or an archive that holds one somewhere.

Standard library only, like all of patches/.
"""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .source import BuildError

# Two files that a tree of llama.cpp has, from its root.
SIGNS = ("ggml/CMakeLists.txt", "src/llama.cpp")


@contextmanager
def llama_tree(path: Path) -> Iterator[Path]:
    """The root of the llama.cpp in a folder, or in an archive (.tar.*, .zip, .whl), which is unpacked for the while.

    Raises:
        BuildError: there is nothing at the path, or no llama.cpp in it.
    """
    if path.is_dir():
        found = [f.relative_to(path).as_posix() for depth in range(4) for f in path.glob("*/" * depth + SIGNS[0])]
        found += [f.relative_to(path).as_posix() for depth in range(4) for f in path.glob("*/" * depth + SIGNS[1])]
        yield path / _root(path, found)
        return
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder)
        try:
            root = _unpack(path, into)
        except (OSError, tarfile.TarError, zipfile.BadZipFile) as problem:
            raise BuildError(f"{path} cannot be read as a folder or an archive: {problem}") from None
        yield into / root


def _unpack(path: Path, into: Path) -> str:
    """Unpack the llama.cpp of an archive; returns its root in it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            root = _root(path, names := archive.namelist())
            archive.extractall(into, [name for name in names if _wanted(name, root)])
            return root
    with tarfile.open(path) as archive:
        root = _root(path, archive.getnames())
        archive.extractall(into, [m for m in archive if _wanted(m.name, root)], filter="data")
        return root


def _wanted(name: str, root: str) -> bool:
    return name.startswith(root) and ".git" not in name.split("/")


def _root(path: Path, names: Iterable[str]) -> str:
    """Where in a tree the outermost llama.cpp lies: empty, or with a slash at its end."""
    there = set(names)
    roots = {name.removesuffix(SIGNS[0]) for name in there if name.endswith(SIGNS[0])}
    complete = [root for root in roots if root in ("", "./") or root.endswith("/") if root + SIGNS[1] in there]
    if not complete:
        raise BuildError(f"{path} holds no sources of llama.cpp ({' and '.join(SIGNS)}); name a tree or an sdist.")
    return min(complete, key=lambda root: (root.count("/"), root))
