"""The header of a GGUF file, read without trusting a byte of it.

The layout is that of docs/gguf.md in ggml's repository, versions 2 and 3, little-endian; every rule of libggml's own
reader (ggml/src/gguf.cpp, `gguf_init_from_reader`) holds here too, so a header that passes is one that llama.cpp reads.
Time and memory are bounded whatever the file claims, and errors name file, key or tensor, wanted and got.
"""

from __future__ import annotations

import hashlib
import mmap
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.types import ALIGNMENT, BLOCKS, Type, fits, n_bytes, padded

# Number in the file: numpy type. 8 is a string, 9 an array.
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
# Bounds far above any model's: they keep a hostile file from costing minutes or gigabytes.
MAX_COUNT = 1 << 16  # keys, and tensors
MAX_ELEMENTS = 1 << 24  # of one array
MAX_STRING = 1 << 28  # bytes
MAX_ALIGNMENT = 1 << 16
MAX_NAME = 63  # bytes of a tensor's name: GGML_MAX_NAME without the zero at its end
MAX_DIMS = 4

_u32, _u64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: ggml type, shape in ggml's order (row length first), and bytes within the file."""

    type: Type
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights.

    `spans` gives the bytes [start, stop) of every metadata entry within the file, `tensor_table` those of the list of
    tensors; `data_start` is where the weights begin, a multiple of `alignment`.
    """

    path: Path
    arch: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    tensor_table: tuple[int, int] = (0, 0)
    data_start: int = 0
    alignment: int = ALIGNMENT

    def of_arch(self, key: str, default: Any = None) -> Any:
        """Metadata under the architecture's own prefix: `of_arch("block_count")` is `gemma4.block_count`."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    @property
    def vocabulary(self) -> Sequence[str]:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens if isinstance(tokens, (Strings, list)) else ()


class Strings(Sequence[str]):
    """An array of strings in a header, decoded when read: a vocabulary and its merges are most of a million.

    Args:
        raw: the strings as the file holds them, each after its length in 8 bytes.
        starts: where each string begins within `raw`, and one more for the end; [n + 1], each 8 past the length.
    """

    def __init__(self, raw: bytes, starts: npt.NDArray[np.int64]) -> None:
        self._raw, self._starts = raw, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return self._raw[self._starts[place] : self._starts[place + 1] - 8].decode(errors="replace")

    def distinct(self) -> int:
        """How many different strings there are to C, where a zero byte ends a string."""
        whole = {self._raw[start : stop - 8] for start, stop in pairwise(self._starts.tolist())}
        return len({each.partition(b"\0")[0] if b"\0" in each else each for each in whole})

    def digest(self) -> str:
        """SHA-256 over the strings as the file holds them."""
        return hashlib.sha256(self._raw).hexdigest()


class _Reader:
    """A cursor over a mapped file; every read is checked against the file's end first."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def fail(self, what: str) -> MtpError:
        return MtpError(f"{self.path} is damaged: {what}; copy or convert it again.")

    def need(self, count: int, what: str) -> int:
        """Step over `count` bytes; where they begin."""
        if count > self.size - self.at:
            raise MtpError(
                f"{self.path} is cut off or damaged: {what} wants {count} bytes at {self.at}, the file has "
                f"{self.size - self.at} there; copy or convert it again."
            )
        start, self.at = self.at, self.at + count
        return start

    def u32(self, what: str) -> int:
        value: int = _u32(self.data, self.need(4, what))[0]
        return value

    def u64(self, what: str, most: int, least: int = 0) -> int:
        value: int = _u64(self.data, self.need(8, what))[0]
        if not least <= value <= most:
            raise self.fail(f"{what} is {value}, wanted {least} to {most}")
        return value

    def text(self, what: str) -> bytes:
        count = self.u64(f"the length of {what}", MAX_STRING)
        start = self.need(count, what)
        return self.data[start : start + count]

    def name(self, what: str, most: int) -> str:
        """A key or a tensor's name: printable UTF-8, not empty."""
        raw = self.text(what)
        name = raw.decode(errors="replace")
        if not raw or len(raw) > most or not name.isprintable() or "\ufffd" in name:
            raise self.fail(f"{what} is {raw[:40]!r}, wanted 1 to {most} bytes of printable UTF-8")
        return name

    def value(self, key: str) -> Any:
        """A Python scalar, a numpy array [n], or Strings."""
        kind = self.u32(f"the type of {key}")
        if kind == STRING:
            return self.text(key).decode(errors="replace")
        if kind != ARRAY:
            return self.numbers(kind, 1, key)[0].item()
        kind = self.u32(f"the type of {key}'s elements")
        count = self.u64(f"the number of {key}'s elements", MAX_ELEMENTS)
        return self.strings(count, key) if kind == STRING else self.numbers(kind, count, key)

    def numbers(self, kind: int, count: int, key: str) -> npt.NDArray[Any]:
        if kind not in NUMBERS:
            raise self.fail(f"{key} has type {kind}, wanted one of 0 to 12")
        dtype = np.dtype(NUMBERS[kind])
        start = self.need(count * dtype.itemsize, key)
        raw = self.data[start : self.at]
        return np.frombuffer(raw, np.uint8) != 0 if kind == BOOL else np.frombuffer(raw, dtype)

    def strings(self, count: int, key: str) -> Strings:
        if 8 * count > self.size - self.at:
            self.need(8 * count, key)
        data, size, at = self.data, self.size, self.at
        starts = []
        for i in range(count):
            if at > size - 8:
                raise self.fail(f"string {i} of {key} begins at byte {at}, the file has {size}")
            starts.append(at + 8)
            at += 8 + _u64(data, at)[0]
        if at > size:
            raise self.fail(f"the last string of {key} ends at byte {at}, the file has {size}")
        first, self.at = self.at, at
        return Strings(data[first:at], np.array([*starts, at + 8], np.int64) - first)

    def tensor(self, number: int) -> tuple[str, Type, tuple[int, ...], int]:
        """Name, type, shape and offset of one tensor."""
        name = self.name(f"the name of tensor {number}", MAX_NAME)
        n_dims = self.u32(f"the number of dimensions of {name!r}")
        if n_dims > MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {n_dims} dimensions, wanted at most {MAX_DIMS}")
        shape = [self.u64(f"a dimension of {name!r}", (1 << 63) - 1, 1) for _ in range(n_dims)] or [1]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        number = self.u32(f"the type of {name!r}")
        if number not in BLOCKS:
            raise self.fail(f"tensor {name!r} has type {number}, which this version of llama.cpp does not know")
        kind = Type(number)
        if prod(shape) >= 1 << 63:
            raise self.fail(f"tensor {name!r} has shape {shape}, more elements than 64 bits count")
        if not fits(kind, shape[0]):
            wanted = f"a multiple of {BLOCKS[kind].values} for {kind.name}"
            raise self.fail(f"tensor {name!r} has rows of {shape[0]}, wanted {wanted}")
        return name, kind, tuple(shape), _u64(self.data, self.need(8, f"the offset of {name!r}"))[0]


def read(path: Path) -> Header:
    """Read and check metadata and tensor table of a GGUF file; the weights stay where they are.

    Raises:
        MtpError: there is no such file, it is not GGUF, or a part of its header is out of bounds, there twice,
            or at odds with the size of the file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MtpError(f"{path} is not a file; name a GGUF file.")
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise MtpError(f"{path} is not a GGUF file (it starts with {magic!r}); convert the checkpoint first.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Reader(path, data))
    except OSError as problem:
        raise MtpError(f"{path}: {problem.strerror}; name an existing GGUF file.") from None


def _header(reader: _Reader) -> Header:
    reader.at = 4
    version = reader.u32("the version")
    if version not in (2, 3):
        raise reader.fail(f"its version is {version}, wanted 2 or 3")
    n_tensors = reader.u64("the number of tensors", MAX_COUNT)
    n_keys = reader.u64("the number of keys", MAX_COUNT)
    metadata, spans = _metadata(reader, n_keys)
    arch = metadata.get("general.architecture", "")
    if not isinstance(arch, str):
        raise reader.fail(f"general.architecture is {arch!r}, wanted a string")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    table = reader.at
    tensors = [reader.tensor(number) for number in range(n_tensors)]
    end = reader.at
    start = padded(end, alignment)
    return Header(
        reader.path, arch, metadata, _placed(reader, tensors, start, alignment), spans, (table, end), start, alignment
    )


def _metadata(reader: _Reader, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Values by key, and where each entry lies."""
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for number in range(count):
        start = reader.at
        key = reader.name(f"key {number}", 1 << 16)
        if key in metadata:
            raise reader.fail(f"the key {key} is there twice")
        kind_at = reader.at
        value = metadata[key] = reader.value(key)
        spans[key] = start, reader.at
        if key == "general.alignment" and (
            _u32(reader.data, kind_at)[0] != UINT32 or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1)
        ):
            raise reader.fail(f"{key} is {value}, wanted a power of two from 8 to {MAX_ALIGNMENT} as 32 bits")
    return metadata, spans


def _placed(
    reader: _Reader, tensors: list[tuple[str, Type, tuple[int, ...], int]], start: int, alignment: int
) -> dict[str, Tensor]:
    """The tensors with their bytes: one after the other, no gap, no overlap, none beyond the end of the file."""
    placed: dict[str, Tensor] = {}
    wanted = 0
    for name, kind, shape, offset in tensors:
        if name in placed:
            raise reader.fail(f"the tensor {name!r} is there twice")
        if offset != wanted:
            raise reader.fail(f"tensor {name!r} begins at {offset} of the weights, wanted {wanted}")
        size = n_bytes(kind, shape)
        if start + offset + size > reader.size:
            raise MtpError(
                f"{reader.path} is cut off: tensor {name!r} ends at byte {start + offset + size}, the file has "
                f"{reader.size}; copy or convert it again."
            )
        placed[name] = Tensor(kind, shape, start + offset, size)
        wanted += padded(size, alignment)
    return placed
