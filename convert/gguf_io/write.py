"""All of a GGUF file before its weights, as bytes: the entries of its metadata, and the list of its tensors.

The gguf package packs an array value by value, which is slow for the tokens and merges of a vocabulary, and anew for
each file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.gguf_io import types
from gemma_mtp.convert.gguf_io.read import ARRAY, BOOL, FLOAT32, INT32, NUMBERS, STRING, UINT32
from gemma_mtp.convert.gguf_io.types import Type

MAGIC, VERSION = b"GGUF", 3
# Bytes before the metadata, and those of a hash in an array of strings: its length, and its digits.
METADATA, HASH = 24, 8 + 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor to write: GGUF name, shape as torch has it, [rows, row length], and ggml type."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def n_bytes(self) -> int:
        return types.n_bytes(self.type, self.shape)


@dataclass(frozen=True)
class Array:
    """An array as the file holds it, for those that are written more than once: type of its elements, number, bytes."""

    kind: int
    count: int
    raw: bytes

    @classmethod
    def of(cls, values: Sequence[Any] | npt.NDArray[Any]) -> Array:
        """Of strings, as str or bytes, or of numbers; Python's are bool, float32 or int32, numpy's what they are."""
        if isinstance(values, np.ndarray):
            kind = next(kind for kind, dtype in NUMBERS.items() if np.dtype(dtype) == values.dtype)
            return cls(kind, len(values), values.tobytes())
        if isinstance(values[0], (str, bytes)):
            encoded = [each if isinstance(each, bytes) else each.encode() for each in values]
            parts = [b""] * (2 * len(encoded))
            parts[::2] = map(struct.Struct("<Q").pack, map(len, encoded))
            parts[1::2] = encoded
            return cls(STRING, len(values), b"".join(parts))
        kind = BOOL if isinstance(values[0], bool) else FLOAT32 if isinstance(values[0], float) else INT32
        return cls(kind, len(values), np.asarray(values, NUMBERS[kind]).tobytes())


def entry(key: str, value: Any, kind: int | None = None) -> bytes:
    """One entry of the metadata: key, type and value.

    Args:
        key: its name.
        value: str, number, `Array`, or what `Array.of` takes.
        kind: number of the value's type; unless given a string, 32 bits without sign, or an array.
    """
    if kind is None:
        kind = STRING if isinstance(value, str) else UINT32 if isinstance(value, int) else ARRAY
    start = _string(key) + struct.pack("<I", kind)
    if kind == STRING:
        return start + _string(value)
    if kind == ARRAY:
        array = value if isinstance(value, Array) else Array.of(value)
        return start + struct.pack("<IQ", array.kind, array.count) + array.raw
    return start + np.array(value, NUMBERS[kind]).tobytes()


def header(entries: Sequence[bytes], tensors: Sequence[TensorInfo]) -> bytes:
    """All before the weights, padded, so that the first tensor follows; each begins where the last, padded, ends."""
    infos, offset = [], 0
    for tensor in tensors:
        shape = tensor.shape[::-1]
        infos.append(_string(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, offset))
        offset += types.padded(tensor.n_bytes)
    start = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries))
    raw = b"".join([start, *entries, *infos])
    return raw.ljust(types.padded(len(raw)), b"\0")


def _string(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return len(raw).to_bytes(8, "little") + raw
