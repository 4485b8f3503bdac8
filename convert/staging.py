"""Files that appear together when all are complete, and of which nothing is left when anything goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gemma_mtp.convert.errors import MtpError

PREFIX = ".gemma-mtp-"
# The end of a hidden folder's name once all its files are complete: what is left then only has to be moved.
COMPLETE = ".complete"
# Windows has no lock that ends with the process; there nothing is cleaned up.
LOCKS = os.name == "posix"


@contextmanager
def staging(folder: Path, names: Sequence[str], n_bytes: int, force: bool) -> Iterator[Path]:
    """A hidden folder whose files move to `folder` at the end, or are gone again if anything goes wrong.

    A process that is killed leaves its hidden folder behind; the next one to write there completes it if all files
    were whole and only some of them moved, and removes it otherwise.

    Args:
        folder: where the files appear; made if it is not there.
        names: the files.
        n_bytes: what they need together, about.
        force: replace files of the same names.

    Raises:
        MtpError: one of the files is there already, or the folder cannot be written or is full.
    """
    made: list[Path] = []
    hidden: Path | None = None
    try:
        clean_up(folder)
        there = [name for name in names if os.path.lexists(folder / name)]
        if there and not force:
            raise MtpError(
                f"{folder} already holds {', '.join(there)}; choose another folder, or pass --force to replace."
            )
        made = _make(folder)
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            raise MtpError(f"{folder}: {n_bytes:,} bytes to write, {free:,} free; make room or choose another folder.")
        with ExitStack() as held:
            hidden = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
            held.callback(os.close, _lock(hidden))
            yield hidden
            hidden = hidden.replace(hidden.with_name(hidden.name + COMPLETE))
            try:
                _move(hidden, folder)
            finally:
                _move(hidden, folder)  # what an interrupt left there: some of the files are worse than all or none
        made = []
    except OSError as problem:
        need = f"{n_bytes:,} bytes are needed; " if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise MtpError(
            f"cannot write into {folder}: {problem.strerror}; {need}make room or choose another folder."
        ) from None
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        for each in made:
            if not any(each.iterdir()):
                each.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; the new ones, innermost first."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new


def _move(hidden: Path, folder: Path) -> None:
    for path in sorted(hidden.iterdir()):
        path.replace(folder / path.name)


def _lock(hidden: Path) -> int:
    """An open folder under a lock that ends with the process, however it ends."""
    opened = os.open(hidden if LOCKS else os.devnull, os.O_RDONLY)
    if LOCKS:
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(opened)
            raise
    return opened


def clean_up(folder: Path) -> None:
    """Complete or remove what killed processes left in a folder; hidden folders of living ones are locked."""
    for hidden in folder.glob(f"{PREFIX}*/") if LOCKS else ():
        try:
            opened = _lock(hidden)
        except OSError:
            continue  # another process is at work there, or was quicker
        try:
            if hidden.name.endswith(COMPLETE):
                _move(hidden, folder)
            shutil.rmtree(hidden, ignore_errors=True)
        finally:
            os.close(opened)
