"""Plans and an open checkpoint to GGUF files, in one pass: each row is read once, whatever is made of it.

Where every block goes is known before the first is made, so threads read, quantize and write on their own; what is in
memory is a few pieces of work for each of them. Only hashes want the pieces in order: the calling thread makes them.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gemma_mtp.convert.checkpoint import Checkpoint
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.files import BINARY, write_all, writing
from gemma_mtp.convert.gguf_io import types
from gemma_mtp.convert.gguf_io.split import Part
from gemma_mtp.convert.imatrix import Imatrix
from gemma_mtp.convert.integrity import put_hashes
from gemma_mtp.convert.metadata import Headers
from gemma_mtp.convert.plan import SOURCE_TYPES, Plan, Planned, rope_freqs
from gemma_mtp.convert.progress import More
from gemma_mtp.convert.qat import regrid
from gemma_mtp.convert.quantize import Bytes, blocks_of, largest_magnitude, valid, widen
from gemma_mtp.convert.tensor_types import EMBEDDINGS

# Values of one piece of work: 8 MiB as float32.
PIECE = 1 << 21
# Values in pieces that are begun or wait for their turn to be hashed.
AHEAD = 3 * PIECE * (os.cpu_count() or 1)


@dataclass(frozen=True)
class Output:
    """One model to write: its plan, the folder and the files there, and metadata of the pair (`mtp.*`).

    With `qat`, Q4_0 blocks are those of the grid that weights lie on, where there is one.
    """

    plan: Plan
    folder: Path
    parts: Sequence[Part[Planned]]
    link: Mapping[str, Any]
    imatrix: Imatrix | None = None
    qat: bool = False


class _Place(NamedTuple):
    """Where a tensor goes: an open file, the offset of its first block, what it becomes there, and the hash of that."""

    path: Path
    file: int
    offset: int
    tensor: Planned
    imatrix: Imatrix | None
    qat: bool
    hash: hashlib._Hash


class _File(NamedTuple):
    """An open file, where in its header the hashes belong, and those of its tensors in their order."""

    path: Path
    file: int
    place: int
    hashes: Sequence[hashlib._Hash]


class _Rows(NamedTuple):
    """Rows [start, stop) of a tensor, counted over all its matrices; never of two experts."""

    name: str
    start: int
    stop: int


def write(outputs: Sequence[Output], checkpoint: Checkpoint, headers: Headers, more: More) -> None:
    """Write GGUF files; the same input gives the same bytes.

    Args:
        outputs: with plans of this checkpoint; the caller keeps the files out of sight until all are whole.
        checkpoint: where the rows come from; each is read once.
        headers: of its files.
        more: called with the number of bytes after each piece.

    Raises:
        MtpError: a tensor holds NaN or infinite values.
        WriteError: the disk is full or cannot be written.
    """
    with ExitStack() as files:
        places: dict[str, list[_Place]] = defaultdict(list)
        created = [_create(output, part, headers, files, places) for output in outputs for part in output.parts]
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        files.callback(pool.shutdown, cancel_futures=True)  # before the files are closed
        for name, made in _in_order(pool, _pieces(outputs[0].plan), places, checkpoint):
            for place, data in zip(places[name], made, strict=True):
                place.hash.update(data.data)
            more(sum(data.nbytes for data in made))
        for file in created:
            with writing(file.path):
                put_hashes(file.file, file.place, [each.hexdigest() for each in file.hashes])


def _in_order(
    pool: ThreadPoolExecutor, pieces: Iterator[_Rows], places: Mapping[str, Sequence[_Place]], checkpoint: Checkpoint
) -> Iterator[tuple[str, list[Bytes]]]:
    """Tensor and blocks of every piece, made and written by the pool; those done early wait for their turn."""
    begun: deque[tuple[str, int, Future[list[Bytes]]]] = deque()
    ahead = 0
    for piece in pieces:
        n_values = (piece.stop - piece.start) * places[piece.name][0].tensor.shape[-1]
        while begun and ahead + n_values > AHEAD:
            name, values, made = begun.popleft()
            ahead -= values
            yield name, made.result()
        begun.append((piece.name, n_values, pool.submit(_piece, piece, places[piece.name], checkpoint)))
        ahead += n_values
    while begun:
        name, _, made = begun.popleft()
        yield name, made.result()


def _create(
    output: Output, part: Part[Planned], headers: Headers, files: ExitStack, places: Mapping[str, list[_Place]]
) -> _File:
    """Create one file of an output, its header first and of its final size; adds the places of its tensors."""
    head = headers.head(output.plan, part, output.link, output.imatrix)
    path = output.folder / part.file
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        files.callback(os.close, file)
        write_all(file, head.raw, 0)
    offset, hashes = len(head.raw), []
    for tensor in part.tensors:
        hashes.append(hashlib.sha256())
        places[tensor.name].append(_Place(path, file, offset, tensor, output.imatrix, output.qat, hashes[-1]))
        offset += types.padded(tensor.n_bytes)
    with writing(path):
        os.ftruncate(file, offset)
    return _File(path, file, head.hashes, hashes)


def _pieces(plan: Plan) -> Iterator[_Rows]:
    """All tensors in the order of the file, in pieces of whole rows."""
    for tensor in plan.tensors:
        n_rows = prod(tensor.shape[:-1])
        step = max(1, PIECE // tensor.shape[-1])
        whole = tensor.shape[-2] if len(tensor.shape) > 2 else n_rows
        for first in range(0, n_rows, whole):
            for start in range(first, first + whole, step):
                yield _Rows(tensor.name, start, min(start + step, first + whole))


def _piece(piece: _Rows, places: Sequence[_Place], checkpoint: Checkpoint) -> list[Bytes]:
    """Read some rows, and write what each output wants of them; returns that."""
    tensor = places[0].tensor
    length, source = tensor.shape[-1], types.Type.F32
    if tensor.source is None:
        raw: Bytes = np.array(rope_freqs(checkpoint.config), np.float32).view(np.uint8)
    else:
        source = SOURCE_TYPES[checkpoint.index[tensor.source].dtype]
        size = types.n_bytes(source, (length,))
        raw = checkpoint.read(tensor.source, piece.start * size, (piece.stop - piece.start) * size)
    try:
        magnitude = largest_magnitude(raw, source)
        values = None
        made: dict[Any, Bytes] = {(source, None, qat): raw for qat in (False, True)}
        written = []
        for path, file, offset, each, imatrix, qat, _ in places:
            weights = _weights(imatrix, each, piece)
            key = (each.type, None if weights is None else id(imatrix), qat)
            if key not in made:
                values = widen(raw, source.name).reshape(-1, length) if values is None else values
                made[key] = blocks_of(values, each.type, magnitude, weights)
                if qat and each.type is types.Type.Q4_0:
                    regrid(values, made[key])
                if weights is not None and not valid(made[key], each.type):
                    raise MtpError(f"its importances are too large for {each.type.name}; compute the matrix again")
            with writing(path):
                write_all(file, made[key].data, offset + piece.start * types.n_bytes(each.type, (length,)))
            written.append(made[key])
    except MtpError as problem:
        raise MtpError(f"{checkpoint.folder}: tensor {tensor.source!r}: {problem}.") from None
    return written


def _weights(imatrix: Imatrix | None, tensor: Planned, piece: _Rows) -> Any:
    """The importance of the columns of a piece, [row length], or None."""
    if imatrix is None or tensor.type in types.UNQUANTIZED:
        return None
    found = imatrix.of(tensor.name, tensor.shape, tensor.name in EMBEDDINGS)
    return None if found is None else found[piece.start // tensor.shape[-2] if len(tensor.shape) > 2 else 0]
