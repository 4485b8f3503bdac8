"""A file of prompts and a file of answers, a line of JSON each; what was interrupted is gone on with.

A line of answers is written whole, in one call, as soon as it is there, so that a program that is killed leaves at most
one that is cut off, which the next one removes. Each names the line that it answers, and a digest of that line and of
the settings, so that answers of another file, or made otherwise, are not taken for these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

OTHER = "{path} holds answers to other prompts, or made with other settings (line {line}); name another file for these."


class Prompts:
    """The lines of a file that are not empty, each with its number.

    Args:
        path: the file.
        settings: what the answers depend on beside the lines.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.dumps(settings, sort_keys=True, default=str).encode()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip():
                    yield number, line

    def digest(self, line: bytes) -> str:
        """Of a line and the settings."""
        return hashlib.sha256(self._settings + b"\0" + line).hexdigest()[:16]


class Answers:
    """The file of answers, held by one program at a time.

    Args:
        path: the file; made if there is none.
        prompts: what is answered.

    Attributes:
        total: how many prompts there are.
        done: numbers of the lines that are answered.

    Raises:
        ValueError: it holds something else.
        RuntimeError: another program writes it.
    """

    def __init__(self, path: Path, prompts: Prompts) -> None:
        self.path, self._prompts = path, prompts
        if path.exists() and prompts.path.exists() and path.samefile(prompts.path):
            raise ValueError(f"{path} holds the prompts; name another file for the answers.")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            found = self._read()
            self.total = 0
            for number, line in prompts:
                self.total += 1
                if found.pop(number, digest := prompts.digest(line)) != digest:
                    raise ValueError(OTHER.format(path=path, line=number))
            if found:
                raise ValueError(OTHER.format(path=path, line=min(found)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write the file."""
        os.close(self._file)

    def left(self) -> Iterator[tuple[int, bytes]]:
        """The prompts that have no answer yet."""
        return ((number, line) for number, line in self._prompts if number not in self.done)

    def write(self, number: int, line: bytes, answer: Mapping[str, Any]) -> None:
        """Append the answer to a line of prompts."""
        made = {"line": number, **answer, "digest": self._prompts.digest(line)}
        try:
            data = json.dumps(made, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # half a surrogate, in an id
            data = json.dumps(made).encode() + b"\n"
        while data:  # a disk that is full takes a part, and raises at the next
            data = data[os.write(self._file, data) :]

    def _lock(self) -> None:
        with suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another program writes {self.path}; wait for it, or name another file.") from None

    def _read(self) -> dict[int, str]:
        """Digests of what is answered, by number of the line; what is cut off at the end is removed."""
        found: dict[int, str] = {}
        end = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    told = json.loads(line)
                    found[int(told["line"])] = str(told["digest"])
                except (ValueError, TypeError, KeyError) as problem:
                    raise ValueError(f"{self.path} is no file of answers; name another.") from problem
                end += len(line)
        self.done = frozenset(found)
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)
        return found
