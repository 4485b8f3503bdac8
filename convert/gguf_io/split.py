"""Models in several files, named and cut as llama-gguf-split has it: NAME-00001-of-00003.gguf."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gemma_mtp.convert.gguf_io.read import Header, read
from gemma_mtp.convert.gguf_io.write import TensorInfo

# Of a file of several: its place, from 0, the number of files, and of tensors in all of them.
KEY_PLACE, KEY_COUNT, KEY_TENSORS = "split.no", "split.count", "split.tensors.count"

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


def read_parts(header: Header) -> list[Header]:
    """The header itself, or those of all files of a split.

    Raises:
        MtpError: a file of the split is missing or damaged.
    """
    count = header.metadata.get(KEY_COUNT, 0)
    stem = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", header.path.stem)
    if stem is None or not isinstance(count, int) or count < 2:
        return [header]
    return [read(header.path.with_name(_name(stem[1], index, count))) for index in range(count)]


def _name(stem: str, index: int, count: int) -> str:
    """As llama.cpp names a file (`llama_split_path`)."""
    return f"{stem}.gguf" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}.gguf"
