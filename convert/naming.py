"""What files and models are called: as the user says, or as their repository or folder is."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from gemma_mtp.convert.errors import MtpError

# Bytes of a file's name that the file systems of Linux and macOS take; Windows counts half or a third of them.
NAME_BYTES = 255
ASSISTANT = "-assistant"
# The name of a folder that Git or the Hugging Face cache made, which says nothing of the model.
COMMIT = re.compile(r"[0-9a-f]{40}")
# Control characters, what ends a line, and bytes that are not UTF-8.
UNSAFE = {"Cc", "Zl", "Zp", "Cs"}
RESERVED = '<>:"/\\|?*' if os.name == "nt" else "/"


def repository(folder: Path) -> str | None:
    """org/name of a snapshot in the Hugging Face cache, or of a link to one; None for any other folder."""
    for path in (folder.absolute(), folder.resolve()):
        cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$", path.as_posix())
        if cached:
            return f"{cached[1]}/{cached[2]}"
    return None


def name_of(source: str | os.PathLike[str]) -> str:
    """What a checkpoint is called: its repository, that of a snapshot in the cache, or its folder; never a commit.

    Characters that cannot stand in a line of text are written as %XX.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return os.fspath(source).partition("@")[0].rpartition("/")[2]
    found = repository(folder)
    if found is None:
        real = folder.resolve()
        above = (each.name for each in (real, *real.parents) if each.name != "snapshots")
        found = next((name for name in above if not COMMIT.fullmatch(name)), "")
    return "".join(map(_escaped, found.rpartition("/")[2]))


def one_line(name: str) -> bool:
    """Whether a name can stand in a line of text: it is UTF-8 without control characters."""
    return not any(unicodedata.category(each) in UNSAFE for each in name)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in UNSAFE:
        return character
    byte = "\udc80" <= character <= "\udcff"  # Python's sign for a byte of a file name that is not UTF-8
    return "".join(f"%{each:02X}" for each in character.encode(errors="surrogateescape" if byte else "surrogatepass"))


def stems(target: Path, drafter: Path, name: str | None) -> tuple[str, str]:
    """Starts of the file names of a target and its drafter, never the same.

    Args:
        target: folder of a checkpoint.
        drafter: the same.
        name: what the user calls the target, if anything.

    Raises:
        MtpError: the name cannot begin a file name, or the folder has none.
    """
    if name is None:
        first, second = name_of(target), name_of(drafter)
        if not first or not second:
            raise MtpError(f"{target if not first else drafter} has no name of its own; pass --name.")
        return first, f"{second}{ASSISTANT}" if _folded(second) == _folded(first) else second
    if any(each in RESERVED for each in name) or not one_line(name) or not name.strip(". "):
        raise MtpError(f"the name {name!r} is not a plain file name; pass --name with letters, digits and dashes.")
    return name, f"{name}{ASSISTANT}"


def check_names(files: Sequence[str]) -> None:
    """Whether files of these names can lie in one folder.

    Raises:
        MtpError: a name is too long, or two are the same on a disk that takes upper and lower case for equal.
    """
    for name in files:
        if (size := len(os.fsencode(name))) > NAME_BYTES:
            raise MtpError(
                f"the file name {name[:24]}...{name[-24:]} has {size} bytes, and disks take {NAME_BYTES}; pass --name "
                "with a shorter one."
            )
    known: dict[str, str] = {}
    for name in files:
        if _folded(name) in known:
            raise MtpError(f"two files would be called {name} and {known[_folded(name)]}; pass --name.")
        known[_folded(name)] = name


def _folded(name: str) -> str:
    """A name as disks compare it that take upper and lower case for equal."""
    return unicodedata.normalize("NFC", name).casefold()
