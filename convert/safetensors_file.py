"""The header of a safetensors file, checked before any other reader sees it.

The format is that of https://github.com/huggingface/safetensors#format: the length of the header in 8 bytes, the
header as JSON, then the tensors. safetensors' own reader takes the last of two entries of one name and says little of
what it refuses; here every entry is looked at, and file, tensor, wanted and got are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.files import check_download, is_file, reading

# Bits of one element.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# safetensors refuses longer ones.
MAX_HEADER = 100_000_000


class Entry(NamedTuple):
    """One tensor of a safetensors file: name of its type, shape as torch has it, bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Twice(ValueError):
    """A name that a JSON object holds twice."""


def _no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name; the header is checked against the file.

    Raises:
        MtpError: naming the file, and the tensor whose entry is damaged, out of bounds, overlapping or there twice.
    """
    again = "download it again."
    with reading(path):
        if not is_file(path):
            raise MtpError(f"{path} is not a file; pass the folder of a Hugging Face checkpoint.")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            check_download(path, start)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER):
                raise _cut_off(path, f"header wants {length}", f"{max(size - 8, 0)} after its first 8")
            file.seek(8)
            text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_twins)
    except _Twice as problem:
        raise MtpError(f"{path}: the header names {str(problem)!r} twice; {again}") from None
    except (ValueError, RecursionError) as problem:
        raise MtpError(f"{path}: the header is not JSON ({problem}); {again}") from None
    if not isinstance(header, dict):
        raise MtpError(f"{path}: the header is not a JSON object; {again}")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, entry: Any, base: int) -> Entry:
    """One tensor, its size checked against type and shape; `base` is where the file's tensors begin."""
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if dtype not in BITS:
        raise _wrong(path, name, "type", dtype, "a type of safetensors")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise _wrong(path, name, "shape", shape, "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _wrong(path, name, "data_offsets", offsets, "begin and end")
    bits = prod(shape) * BITS[dtype]
    wanted = bits // 8
    if bits % 8 or offsets[1] - offsets[0] != wanted:
        raise _wrong(path, name, "size in bytes", offsets[1] - offsets[0], f"{wanted} for {dtype} {shape}")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _cut_off(path: Path, want: str, has: str) -> MtpError:
    return MtpError(
        f"{path} is damaged or only partly downloaded: its {want} bytes, the file has {has}; download it again."
    )


def _wrong(path: Path, name: str, what: str, got: Any, wanted: str) -> MtpError:
    return MtpError(f"{path}: {what} of {name!r} is {str(got)[:80]!r}, wanted {wanted}; download it again.")


def _check_places(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """The tensors fill the file: one after the other, no gap, no overlap, none beyond the end."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            kind = "overlaps another" if entry.start < end else "leaves a gap"
            raise MtpError(
                f"{path}: {name!r} {kind}: it begins at {entry.start - base}, wanted {end - base}; download it again."
            )
        end = entry.stop
    if end != size:
        raise _cut_off(path, f"tensors want {end - base}", f"{size - base} for them")
