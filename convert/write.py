"""Plans and an open checkpoint to GGUF files, in one pass: each row is read once, whatever is made of it.

Where every block goes is known before the first is made, so threads read, quantize and write on their own; what is in
memory is one piece of work for each of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from gemma_mtp.convert import blocks
from gemma_mtp.convert.checkpoint import Checkpoint
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.header import header, padded
from gemma_mtp.convert.imatrix import Imatrix
from gemma_mtp.convert.plan import SOURCE_TYPES, Plan, Planned, parts, rope_freqs
from gemma_mtp.convert.quantize import Bytes, blocks_of, largest, widen
from gemma_mtp.convert.recipe import EMBEDDINGS
from gemma_mtp.convert.verify import seal

# Values of one piece of work: 8 MiB as float32.
PIECE = 1 << 21
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Output:
    """One model file to write: its plan, where, metadata of the pair (`mtp.*`), and the largest size of a part."""

    plan: Plan
    path: Path
    link: Mapping[str, Any]
    imatrix: Imatrix | None = None
    part_bytes: int | None = None


class _Place(NamedTuple):
    """Where a tensor goes: an open file, the offset of its first block, and what it becomes there."""

    file: int
    offset: int
    tensor: Planned
    imatrix: Imatrix | None


class _Rows(NamedTuple):
    """Rows [start, stop) of a tensor, counted over all its matrices; never of two experts."""

    name: str
    start: int
    stop: int


def write(outputs: Sequence[Output], checkpoint: Checkpoint, progress: Progress) -> None:
    """Write GGUF files; the same input gives the same bytes.

    Args:
        outputs: with plans of this checkpoint; the caller keeps the files out of sight until all are whole.
        checkpoint: where the rows come from; each is read once.
        progress: called with the number of bytes after each piece, from any thread but one at a time.

    Raises:
        MtpError: the vocabulary does not fit the model, or a tensor holds NaN or infinite values.
        OSError: the disk is full or cannot be written.
    """
    lock = Lock()
    with ExitStack() as files:
        places: dict[str, list[_Place]] = {}
        for output in outputs:
            for name, place in _create(output, checkpoint, files):
                places.setdefault(name, []).append(place)

        def work(piece: _Rows) -> None:
            written = _piece(piece, places[piece.name], checkpoint)
            with lock:
                progress(written)

        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            pending = [pool.submit(work, piece) for piece in _pieces(outputs[0].plan)]
            done, _ = wait(pending, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for output in outputs:
        for path, _ in parts(output.plan, output.path, output.part_bytes):
            seal(path)


def _create(output: Output, checkpoint: Checkpoint, files: ExitStack) -> Iterator[tuple[str, _Place]]:
    """Create the file or the parts of an output, headers first and of their final size."""
    for path, part in parts(output.plan, output.path, output.part_bytes):
        tensors = part.tensors
        start = header(output.plan, part, checkpoint, output.link, output.imatrix)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        files.callback(os.close, file)
        _write_all(file, memoryview(start), 0)
        offset = len(start)
        for tensor in tensors:
            yield tensor.name, _Place(file, offset, tensor, output.imatrix)
            offset += padded(tensor.n_bytes)
        os.ftruncate(file, offset)


def _pieces(plan: Plan) -> Iterator[_Rows]:
    """All tensors in the order of the file, in pieces of whole rows."""
    for tensor in plan.tensors:
        n_rows = prod(tensor.shape[:-1])
        step = max(1, PIECE // tensor.shape[-1])
        whole = tensor.shape[-2] if len(tensor.shape) > 2 else n_rows
        for first in range(0, n_rows, whole):
            for start in range(first, first + whole, step):
                yield _Rows(tensor.name, start, min(start + step, first + whole))


def _piece(piece: _Rows, places: Sequence[_Place], checkpoint: Checkpoint) -> int:
    """Read some rows, and write what each output wants of them; returns the bytes written."""
    tensor = places[0].tensor
    length, source = tensor.shape[-1], blocks.Type.F32
    if tensor.source is None:
        raw: Bytes = np.array(rope_freqs(checkpoint.config), np.float32).view(np.uint8)
    else:
        source = SOURCE_TYPES[checkpoint.index[tensor.source].dtype]
        size = blocks.n_bytes(source, (length,))
        raw = checkpoint.read(tensor.source, piece.start * size, (piece.stop - piece.start) * size)
    try:
        magnitude = largest(raw, source)
        if np.isinf(magnitude):
            raise MtpError("it holds NaN or infinite values")
        values = None
        made: dict[Any, Bytes] = {(source, None): raw}
        written = 0
        for file, offset, each, imatrix in places:
            weights = _weights(imatrix, each, piece)
            key = (each.type, None if weights is None else id(imatrix))
            if key not in made:
                values = widen(raw, source).reshape(-1, length) if values is None else values
                made[key] = blocks_of(values, each.type, magnitude, weights)
            _write_all(file, made[key].data, offset + piece.start * blocks.n_bytes(each.type, (length,)))
            written += made[key].nbytes
    except MtpError as problem:
        raise MtpError(f"{checkpoint.folder}: tensor {tensor.source!r}: {problem}.") from None
    return written


def _weights(imatrix: Imatrix | None, tensor: Planned, piece: _Rows) -> Any:
    """The importance of the columns of a piece, [row length], or None."""
    if imatrix is None or tensor.type in blocks.UNQUANTIZED:
        return None
    found = imatrix.of(tensor.name, tensor.shape, tensor.name in EMBEDDINGS)
    return None if found is None else found[piece.start // tensor.shape[-2] if len(tensor.shape) > 2 else 0]


def _write_all(file: int, data: memoryview, offset: int) -> None:
    view = data.cast("B")
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
