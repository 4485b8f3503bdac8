"""Importance matrices as llama-imatrix writes them, GGUF or the older format (common/imatrix-loader.cpp)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import link
from gemma_mtp.convert.files import is_file, reading
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.link import MtpError

SUMS, COUNTS = ".in_sum2", ".counts"
# llama-quantize keeps names of files and data sets to 127 bytes.
NAME_BYTES = 127
ADVICE = "name the file that llama-imatrix wrote"


@dataclass(frozen=True)
class Imatrix:
    """`weights`: GGUF tensor name to mean squares of its input, [experts * row length]; and where they come from."""

    path: Path
    weights: Mapping[str, npt.NDArray[np.float32]]
    dataset: str | None
    n_chunks: int

    def metadata(self) -> dict[str, str | int]:
        """The keys that llama-quantize adds (tools/quantize/quantize.cpp)."""
        found: dict[str, str | int] = {"quantize.imatrix.file": _cut_name(str(self.path))}
        if self.dataset is not None:
            found["quantize.imatrix.dataset"] = _cut_name(self.dataset)
        found["quantize.imatrix.entries_count"] = len(self.weights)
        if self.n_chunks > 0:
            found["quantize.imatrix.chunks_count"] = self.n_chunks
        return found

    def of(self, name: str, shape: tuple[int, ...], optional: bool) -> npt.NDArray[np.float32] | None:
        """Weights of a tensor, [experts, row length], or None where there are none.

        Raises:
            MtpError: the matrix is of a tensor of another size; of an embedding (`optional`) it is then not used.
        """
        found = self.weights.get(name)
        if found is None:
            return None
        experts = shape[0] if len(shape) > 2 else 1
        if found.size != experts * shape[-1]:
            if optional:
                return None
            raise MtpError(
                f"{self.path} is of another model: it has {found.size} values for {name}, wanted {experts * shape[-1]}."
            )
        return found.reshape(experts, shape[-1])


def _cut_name(text: str) -> str:
    return text.encode(errors="backslashreplace")[:NAME_BYTES].decode(errors="ignore")


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix.

    Raises:
        MtpError: the file is missing, damaged, empty, or holds values that are no numbers.
    """
    with reading(path, ADVICE):
        if not is_file(path):
            raise MtpError(f"{path} is not a file; {ADVICE}.")
        with path.open("rb") as file:
            magic = file.read(4)
            found = _gguf(path, file) if magic == b"GGUF" else _legacy(path)
    for name, values in found.weights.items():
        if not bool(np.isfinite(values).all()):
            raise MtpError(f"{path}: the weights of {name} hold NaN or infinite values; compute the matrix again.")
    return found


def _gguf(path: Path, file: BinaryIO) -> Imatrix:
    header = link.read_header(path)

    def values(name: str) -> npt.NDArray[np.float32]:
        tensor = header.tensors.get(name)
        if tensor is None or tensor.type is not Type.F32:
            raise MtpError(f"{path}: {name} is missing or not F32; compute the matrix again.")
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.size), np.float32)

    keys = [f"imatrix.{key}" for key in ("datasets", "chunk_count", "chunk_size")]
    names = [name.removesuffix(SUMS) for name in header.tensors if name.endswith(SUMS)]
    if not names or any(key not in header.metadata for key in keys):
        raise MtpError(f"{path} is a GGUF file, but no importance matrix; {ADVICE}.")
    weights = {}
    for name in names:
        counts = np.rint(values(name + COUNTS))
        sums = values(name + SUMS).reshape(len(counts), -1)
        # An expert that no token reached has no say in which column matters.
        mean = sums / np.where(counts > 0, counts, 1)[:, None].astype(np.float32)
        weights[name] = np.ascontiguousarray(np.where(counts[:, None] > 0, mean, np.float32(1)), np.float32).ravel()
    datasets, n_chunks = header.metadata[keys[0]], int(header.metadata[keys[1]])
    return Imatrix(path, weights, datasets[0] if len(datasets) else None, n_chunks)


def _legacy(path: Path) -> Imatrix:
    """n, then n times: name, calls, values; after that, if the file goes on, the chunks and the data set's name."""
    raw = path.read_bytes()
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if size < 0 or at + size > len(raw):
            raise MtpError(f"{path} is no importance matrix, or is cut off; {ADVICE}.")
        at += size
        return raw[at - size : at]

    def number() -> int:
        value: int = struct.unpack("<i", take(4))[0]
        return value

    weights = {}
    count = number()
    for _ in range(count):
        name = take(number()).decode(errors="replace")
        n_calls, n_values = number(), number()
        values = np.frombuffer(take(4 * n_values), np.float32)
        weights[name] = values / np.float32(n_calls) if n_calls > 0 else values.copy()
    if not weights:
        raise MtpError(f"{path} holds no importance matrix; {ADVICE}.")
    n_chunks = number() if at < len(raw) else 0
    dataset = take(number()).decode(errors="replace") if at < len(raw) else None
    return Imatrix(path, weights, dataset or None, n_chunks)
