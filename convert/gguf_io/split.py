"""Models in several files, named and cut as llama-gguf-split has it: NAME-00001-of-00003.gguf."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.read import Header, read
from gemma_mtp.convert.gguf_io.write import TensorInfo

# Of a file of several: its place, from 0, the number of files, and of tensors in all of them.
KEY_PLACE, KEY_COUNT, KEY_TENSORS = "split.no", "split.count", "split.tensors.count"
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

Info = TypeVar("Info", bound=TensorInfo)


@dataclass(frozen=True)
class Part(Generic[Info]):
    """One file of a model: its name, its place among `count` files, and the tensors that it holds."""

    file: str
    index: int
    count: int
    tensors: tuple[Info, ...]


def cut(stem: str, tensors: Sequence[Info], most: int | None = None) -> tuple[Part[Info], ...]:
    """The files of a model: one, or as many as it takes to keep the tensors of each within `most` bytes.

    Each holds at least one tensor.

    Args:
        stem: name of the file without its ending.
        tensors: in the order of the file.
        most: bytes; one file unless given.
    """
    groups: list[list[Info]] = [[]]
    size = 0
    for tensor in tensors:
        if most is not None and groups[-1] and size + tensor.n_bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    count = len(groups)
    return tuple(Part(_name(stem, index, count), index, count, tuple(group)) for index, group in enumerate(groups))


def is_part(path: Path) -> bool:
    """Whether a file is named as one of several."""
    return PART_NAME.fullmatch(path.name) is not None


def read_parts(header: Header, common: Sequence[str] = ()) -> list[Header]:
    """The header itself, or those of all files of a split, which must be parts of one model.

    Args:
        header: of a whole model, or of the first part.
        common: keys that every part which has them has with the value of the first. Parts from other programs lack
            them.

    Raises:
        MtpError: this is not the first part; a part is missing, renamed, damaged, or of another conversion.
    """
    place, count = (_counted(header, key) for key in (KEY_PLACE, KEY_COUNT))
    if count < 2:
        return [header]
    stem = _stem(header.path, place, count)
    first = header.path.with_name(_name(stem, 0, count))
    if place and first.exists():
        raise MtpError(f"{header.path} is part {place + 1} of {count}; name the first part: {first}.")
    if place:
        raise _missing(first, 0, count)
    parts = [header]
    for index in range(1, count):
        path = header.path.with_name(_name(stem, index, count))
        if not path.exists():
            raise _missing(path, index, count)
        parts.append(read(path))
        _check_part(header, parts[-1], index, common)
    names = [name for part in parts for name in part.tensors]
    wanted = header.metadata.get(KEY_TENSORS, len(names))
    if len(names) != wanted or len(set(names)) != len(names):
        raise MtpError(
            f"{header.path}: its {count} parts hold {len(set(names))} different tensors in {len(names)}, wanted "
            f"{wanted}: they are of different conversions; copy or convert them again."
        )
    return parts


def _counted(header: Header, key: str) -> int:
    value = header.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise MtpError(f"{header.path} is damaged: {key} is {value!r}, wanted a number; copy or convert it again.")
    return value


def _stem(path: Path, place: int, count: int) -> str:
    """What the names of all parts begin with; a part under another name is one that llama.cpp does not find."""
    for name in (path.name, path.resolve().name):
        found = PART_NAME.fullmatch(name)
        if found is None or (int(found[2]), int(found[3])) != (place + 1, count):
            continue
        if name == path.name:
            return found[1]
        raise MtpError(f"{path} leads to part {place + 1} of {count}, and parts are found by their names; name it "
                       f"itself: {path.resolve()}.")  # fmt: skip
    # what parts of one name that were numbered otherwise have in common
    stem = re.sub(rf"-\d+-of-\d+.*|[-_. ]*0*{place + 1}$", "", path.stem) or path.stem
    raise MtpError(
        f"{path} is part {place + 1} of {count} under another name, and parts are found by their names; rename it to "
        f"{_name(stem, place, count)}, and the others likewise."
    )


def _missing(path: Path, index: int, count: int) -> MtpError:
    return MtpError(f"{path}, part {index + 1} of {count}, is missing; copy it there, or convert the model again.")


def _check_part(first: Header, part: Header, index: int, common: Sequence[str]) -> None:
    """Check that a file is what its name says, and of the same model as the first."""
    what = f"{part.path}, part {index + 1}"
    count, place = first.metadata[KEY_COUNT], _counted(part, KEY_PLACE)
    for key in (KEY_COUNT, KEY_TENSORS, *common):
        wanted, got = first.metadata.get(key), part.metadata.get(key)
        if got != wanted and not (got is None and key in common):
            raise MtpError(
                f"{what}, is of another conversion: its {key} is {_short(got)}, that of {first.path.name} is "
                f"{_short(wanted)}; copy the right file there, or convert the model again."
            )
    if place != index:
        raise MtpError(
            f"{what} by its name, is part {place + 1} of {count} by what it holds; give the parts their own names."
        )


def _short(value: Any) -> str:
    return "not there" if value is None else str(value)[:12]


def _name(stem: str, index: int, count: int) -> str:
    """As llama.cpp names a file (`llama_split_path`)."""
    return f"{stem}.gguf" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}.gguf"
