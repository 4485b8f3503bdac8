"""Whether GGUF files hold what they promise: every tensor's hash and blocks, and the link of a pair."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.files import write_all
from gemma_mtp.convert.gguf_io.read import Header, Strings, Tensor
from gemma_mtp.convert.gguf_io.split import KEY_COUNT, KEY_PLACE
from gemma_mtp.convert.gguf_io.types import BLOCKS, Type
from gemma_mtp.convert.gguf_io.write import HASH, Array

# Bytes looked at in one go, a little less so that whole blocks fit.
READ_AT_ONCE = 1 << 24
# The bits of an exponent: all set in infinity and NaN.
EXPONENT = {
    Type.F16: ("<u2", 0x7C00), Type.BF16: ("<u2", 0x7F80),
    Type.F32: ("<u4", 0x7F800000), Type.F64: ("<u8", 0x7FF << 52),
}  # fmt: skip


def first_bad_block(data: npt.NDArray[np.uint8], kind: Type) -> int | None:
    """The first block, or value, that is NaN or infinite or has such a scale; None if all are sound.

    The rules are those of ggml_validate_row_data (ggml/src/ggml-quants.c).

    Args:
        data: whole blocks as a file holds them, [bytes].
        kind: their ggml type.
    """
    _, size, scales = BLOCKS[kind]
    blocks = data.reshape(-1, size)
    if kind in EXPONENT:
        dtype, mask = EXPONENT[kind]
        bad = (data.view(dtype) & mask) == mask
    elif scales:
        bad = np.zeros(len(blocks), bool)
        for at in scales:
            bad |= (blocks[:, at + 1] & 0x7C) == 0x7C
    elif kind is Type.IQ1_M:  # the scale is spread over the high bits of four
        bad = ((blocks[:, 55] >> 4) & 7) == 7
        bad &= (blocks[:, 53] >> 4) & 0xC == 0xC
    elif kind is Type.MXFP4:
        bad = blocks[:, 0] == 0xFF
    else:  # integers, and scales of which every value is a number
        return None
    return int(np.argmax(bad)) if bool(bad.any()) else None


def verify_files(out: Path, progress: Any = lambda done, total: None, drafter: Path | None = None) -> dict[str, Any]:
    """Read a folder's GGUF files, or one file and its drafter, from end to end, with all files of a split.

    Args:
        out: a folder, or one GGUF file.
        progress: called with bytes read and bytes in all.
        drafter: that of a model of Ollama; the linked one beside each target unless given.

    Returns:
        "files": for each its path, number of tensors, bytes, and how many tensors had a hash to compare with;
        "pairs": target to drafter.

    Raises:
        MtpError: naming the first file that is damaged, unlinked or not its target's, or that is missing of a split.
    """
    paths = link.gguf_files(out) if out.is_dir() else [out]
    if not paths:
        raise MtpError(f"{out} holds no GGUF file; name the folder that gemma-mtp convert wrote.")
    headers = _with_parts({path: link.read_header(path) for path in paths})
    pairs = {}
    for path, header in list(headers.items()):
        if header.arch == link.TARGET_ARCH:
            found = drafter or link.find_drafter(path, header)
            if found is None:
                raise link.PairError(f"{link.why_no_drafter(path, header)}.")
            if found not in headers:
                headers |= _with_parts({found: link.read_header(found)})
            link.check(header, headers[found])
            pairs[str(path)] = str(found)
    done, total = 0, sum(t.size for header in headers.values() for t in header.tensors.values())
    files = []
    for path, header in headers.items():
        hashed = 0
        for size, known in check_tensors(header):
            done, hashed = done + size, hashed + known
            progress(done, total)
        files.append(
            {"file": str(path), "tensors": len(header.tensors), "bytes": path.stat().st_size, "hashed": hashed}
        )
    return {"files": files, "pairs": pairs}


def _with_parts(headers: Mapping[Path, Header]) -> dict[Path, Header]:
    """These files, and all others of those that are split.

    Raises:
        MtpError: a part is missing, renamed, damaged, or of another conversion.
    """
    first = [header for header in headers.values() if header.metadata.get(KEY_PLACE, 0) == 0]
    found = {part.path: part for header in first for part in link.read_parts(header)}
    for path in sorted(headers.keys() - found.keys()):
        link.read_parts(headers[path])  # tells which file must be there, or be named instead
    return {**headers, **found}


def check_tensors(header: Header) -> Iterator[tuple[int, bool]]:
    """Read every tensor: its bytes, and whether there was a hash to compare it with.

    A file that others joined of the parts of a split, as Ollama does, has the hashes of its first part.

    Raises:
        MtpError: naming file and tensor of the first with NaN or infinite values or with other bytes than were written.
    """
    wanted = header.metadata.get(link.KEY_HASHES)
    hashes = wanted if isinstance(wanted, Strings) else ()
    joined = link.KEY_SPLIT in header.metadata and header.metadata.get(KEY_COUNT, 0) in (0, 1)
    fits = len(hashes) <= len(header.tensors) if joined else len(hashes) == len(header.tensors)
    if wanted is not None and not (isinstance(wanted, Strings) and fits):
        raise MtpError(f"{header.path}: {link.KEY_HASHES} is not a hash for each tensor; convert it again.")
    names = list(header.tensors)
    for place, got in enumerate(_looked_at(header, hashing=wanted is not None)):
        known = place < len(hashes)
        if known and got != hashes[place]:
            raise MtpError(
                f"{header.path}: tensor {names[place]!r} has the SHA-256 {got[:16]}, wanted {hashes[place][:16]}; "
                "the file is damaged: copy or convert it again."
            )
        yield header.tensors[names[place]].size, known


def _looked_at(header: Header, hashing: bool) -> Iterator[str]:
    """The hash of each tensor in the order of the file ("" unless `hashing`), its blocks checked, on all cores."""
    with header.path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last array that looks into it
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(lambda entry: _look(header.path, data, *entry, hashing=hashing), header.tensors.items())
    finally:
        pool.shutdown(cancel_futures=True)


def _look(path: Path, data: mmap.mmap, name: str, tensor: Tensor, *, hashing: bool) -> str:
    total = hashlib.sha256()
    size = BLOCKS[tensor.type].size
    step = READ_AT_ONCE // size * size
    for start in range(0, tensor.size, step):
        piece = np.frombuffer(data, np.uint8, min(step, tensor.size - start), tensor.offset + start)
        if hashing:
            total.update(piece.data)
        bad = first_bad_block(piece, tensor.type)
        if bad is not None:
            unit = "value" if BLOCKS[tensor.type].values == 1 else "block"
            raise MtpError(
                f"{path}: tensor {name!r} is damaged, {unit} {start // size + bad} is no number; convert it again."
            )
    return total.hexdigest() if hashing else ""


def seal(path: Path) -> Header:
    """Put the hash of every tensor into the place that the header has for it under mtp.tensor.sha256.

    Args:
        path: a finished file, with as many hashes in its header as it has tensors; it is read.

    Returns:
        The header, with the hashes that it had before.

    Raises:
        MtpError: a tensor holds NaN or infinite values.
    """
    header = link.read_header(path)
    hashes = list(_looked_at(header, hashing=True))
    with path.open("r+b") as file:
        put_hashes(file.fileno(), header.spans[link.KEY_HASHES][1] - len(hashes) * HASH, hashes)
    return header


def put_hashes(file: int, place: int, hashes: Sequence[str]) -> None:
    """Put hashes into an open file, at the place that its header has for them; then all of it is on the disk."""
    write_all(file, Array.of(hashes).raw, place)
    os.fsync(file)
