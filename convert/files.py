"""Files as every system has them: bytes at a place of an open file, and errors that say whether reading or writing
failed, and which file it was.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_mtp.convert.errors import MtpError

# Windows would read and write text otherwise.
BINARY = getattr(os, "O_BINARY", 0)
# What the beginning of a file tells of a download that brought something else.
LFS = b"version https://git-lfs"
HTML = (b"<!doctype html", b"<html")

# One for each open file, where a place can only be reached by moving there (Windows).
_turns: dict[int, threading.Lock] = {}


class WriteError(OSError):
    """An output that cannot be written: `filename` says which, errno and strerror why."""


@contextmanager
def reading(path: Path, advice: str = "copy or download it again") -> Iterator[None]:
    """Name the file that cannot be read; what was found to be a fault of writing stays one.

    Raises:
        MtpError: for an OSError within the block.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as problem:
        raise MtpError(f"{path} cannot be read: {problem.strerror or problem}; {advice}.") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written.

    Raises:
        WriteError: for an OSError within the block, in which nothing else is read but under `reading`.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as problem:
        raise WriteError(problem.errno, problem.strerror or str(problem), str(path)) from None


def read_small(path: Path) -> bytes:
    """All of a file that must be one: of a pipe nothing might ever come.

    Raises:
        MtpError: it is a folder, a pipe or the like, it cannot be read, or a download brought something else.
    """
    with reading(path):
        if not is_file(path):
            raise MtpError(f"{path} is not a file; copy or download it again.")
        found = path.read_bytes()
    check_download(path, found)
    return found


def is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one; raises OSError where that cannot be told."""
    return stat.S_ISREG(path.stat().st_mode)


def check_download(path: Path, start: bytes) -> None:
    """Look at the beginning of a file for what a failed download leaves in its place.

    Raises:
        MtpError: it is a pointer of Git LFS, or a web page.
    """
    if start.startswith(LFS):
        raise MtpError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in {path.parent}.")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith(HTML):
        raise MtpError(f"{path} is a web page, not the file itself; download it again, logged in if it is gated.")


def write_small(path: Path, text: str) -> None:
    """Write a text as UTF-8; raises WriteError."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


def read_into(file: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer from a place of an open file; threads may do so at once.

    Returns:
        How many bytes there were: fewer than the buffer takes only where the file ends.
    """
    done = 0
    while done < len(buffer):
        more = _read(file, buffer[done:], offset + done)
        if not more:
            break
        done += more
    return done


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write to a place of an open file, however little of it the system takes at a time; threads may do so at once."""
    view = memoryview(data).cast("B")
    while view:
        done = _write(file, view, offset)
        view, offset = view[done:], offset + done


def _read(file: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    with _moved(file, offset):
        found = os.read(file, len(buffer))
    buffer[: len(found)] = found
    return len(found)


def _write(file: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _moved(file, offset):
        return os.write(file, data)


@contextmanager
def _moved(file: int, offset: int) -> Iterator[None]:
    """An open file at a place of it, for one thread at a time."""
    with _turns.setdefault(file, threading.Lock()):
        os.lseek(file, offset, os.SEEK_SET)
        yield
