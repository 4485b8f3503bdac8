"""One vocabulary for a target and its drafter: the same tokens, or a drafter that takes those of its target.

A fine-tune may add tokens, name unused ones, or pad its embedding. Its drafter was trained before that and has no rows
for them. Their rows of the drafter's output matrix are made from the target's embedding by the linear map that fits the
tokens both have best (least squares). In an ordered head they belong to no cluster, and are never drafted; what is
generated is the target's own choice in any case.
"""

from __future__ import annotations

import filecmp
import re
import threading
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import names
from gemma_mtp.convert.checkpoint import Checkpoint, Source
from gemma_mtp.convert.config import DrafterConfig
from gemma_mtp.convert.errors import PairError, listed, warn
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.plan import other_target
from gemma_mtp.convert.quantize import Bytes, Floats, quantize, widen

# Names of tokens that stand for nothing.
UNUSED = re.compile(r"<unused\d+>|\[PAD\d+\]|\[multimodal\]")
# Tokens that the map is fitted to, for each column of the target's embedding, and at least.
SAMPLES, LEAST = 8, 1 << 15
# Share of the mean diagonal that is added to it, so that a matrix of a lower rank can be solved too.
RIDGE = 1e-6


def agree(target: Checkpoint, drafter: Checkpoint, extend: bool) -> None:
    """Check that both have the same tokens, or make it so.

    Args:
        target: a target.
        drafter: a drafter; takes the target's vocabulary if that has no more than rows without a token, or on request.
        extend: whether it takes tokens that only the target has, and its names of tokens that were unused.

    Raises:
        PairError: the vocabularies differ.
        MtpError: a tokenizer.json is missing or damaged.
    """
    one, other = (each.folder / "tokenizer.json" for each in (target, drafter))
    if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
        drafter.own_tokenizer = target.own_tokenizer  # it is read once
    rows, ours = drafter.config.vocab_size, target.tokenizer
    if target.config.vocab_size < rows:
        return  # another target's; said by who compares the sizes
    theirs = drafter.own_tokenizer.tokens[:rows]
    if ours.tokens[: len(theirs)] != theirs:
        for place, (left, right) in enumerate(zip(ours.tokens, theirs, strict=False)):
            if left != right and not (extend and UNUSED.fullmatch(right)):
                more = "" if extend or not UNUSED.fullmatch(right) else " (--drafter-vocab extend takes the target's)"
                raise other_target(f"token {place} is {left!r} in {target.folder}, {right!r} in {drafter.folder}{more}")
    elif target.config.vocab_size == rows:
        drafter.share_tokenizer(target)
        return
    new = list(ours.tokens[rows : ours.n_used])
    if new and not extend:
        raise PairError(
            f"{target.folder} has {len(new)} tokens that its drafter was not trained with: {listed(new)}; pass "
            "--drafter-vocab extend, with which it drafts none of them, or makes a guess."
        )
    if not new and target.config.vocab_size > rows:
        warn(f"{drafter.folder}: the drafter gets the {target.config.vocab_size - rows} rows that pad the target.")
    _extend(drafter, target)


def _extend(drafter: Checkpoint, target: Checkpoint) -> None:
    """Give a drafter the target's vocabulary, with the rows that it lacks."""
    config = drafter.config
    assert isinstance(config, DrafterConfig)
    name, rows, n_new = _embedding(drafter), config.vocab_size, target.config.vocab_size - config.vocab_size
    if n_new and name in drafter.index:  # where it lacks, its absence is told when tensors are placed
        old, lock = drafter.index[name], threading.Lock()

        @cache
        def made() -> Bytes:
            return quantize(_projected(target, drafter, name, rows, n_new), Type[old.dtype])

        def once() -> Bytes:
            with lock:
                return made()

        new = Source(old.file, (n_new, *old.shape[1:]), old.dtype, 0, n_new * old.row_size, made=once)
        shape = (old.shape[0] + n_new, *old.shape[1:])
        drafter.index[name] = Source(old.file, shape, old.dtype, 0, old.size + new.size, (old, new))
    drafter.config = replace(config, vocab_size=rows + n_new)
    drafter.share_tokenizer(target)


def _embedding(checkpoint: Checkpoint) -> str:
    """Name of the token embedding; it is there, or the checkpoint is refused when its tensors are placed."""
    at = {place.gguf: name for name in checkpoint.index if (place := names.place(name)) is not None}
    return at.get(names.EMBEDDING) or at.get(names.OUTPUT) or names.EMBEDDING


def _projected(target: Checkpoint, drafter: Checkpoint, name: str, rows: int, n_new: int) -> Floats:
    """Rows for new tokens, [n_new, drafter's width]: those of the target, mapped as the others are on the average."""
    source = _embedding(target)
    width = target.config.n_embd
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, max(LEAST, SAMPLES * width)), dtype=np.int64))
    squares, products = np.zeros((width, width)), np.zeros((width, drafter.config.n_embd))
    for piece in np.array_split(chosen, max(1, len(chosen) // 4096)):
        ours, theirs = (_rows(each, key, piece) for each, key in ((target, source), (drafter, name)))
        squares += ours.T @ ours
        products += ours.T @ theirs
    squares[np.diag_indices(width)] += RIDGE * np.trace(squares) / width
    fitted = np.linalg.solve(squares, products)
    return (_rows(target, source, np.arange(rows, rows + n_new)) @ fitted).astype(np.float32)


def _rows(checkpoint: Checkpoint, name: str, chosen: npt.NDArray[np.int64]) -> Floats:
    """Some rows of a matrix as float32, [rows, width]; neighbours are read together."""
    source = checkpoint.index[name]
    breaks = [0, *(np.flatnonzero(np.diff(chosen) != 1) + 1), len(chosen)]
    size = source.row_size
    raw = [checkpoint.read(name, int(chosen[a]) * size, int(b - a) * size) for a, b in pairwise(breaks)]
    return widen(np.concatenate(raw), source.dtype).reshape(len(chosen), -1)
