"""Q4_0 blocks of weights that were trained to lie on a grid of Q4_0, as those of the QAT checkpoints do.

There a block of 32 weights is a scale times integers of -8 to 7, rounded to bf16. libggml chooses the scale that makes
the weight of largest magnitude -8, which is another one wherever the grid was not used to its end.

No published weights were at hand. What is said of them: 25 % of the bytes of libggml's Q4_0 are those of the training
and with better scales 99.96 % (an Unsloth developer, without naming the size); the change of token probabilities falls
from 5.8 % to 0.8 % (llama.cpp's pull request 24603). Others say that the weights lie on no grid: such ones keep the
blocks of libggml, so nothing is lost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.quantize import Bytes, Floats

# What the weight of largest magnitude may be on the grid, likely ones first.
GRID_ENDS = (-8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1)
# How far a weight may be from its place on the grid, of its own magnitude: bf16 rounds by 2^-8 at most, and the scale
# is known from rounded weights.
NEAR = 1.5 * 2.0**-8
# Blocks looked at together: their arrays stay in the cache.
CHUNK = 1 << 13

Bools = npt.NDArray[np.bool_]


def regrid(values: Floats, blocks: Bytes) -> None:
    """Replace Q4_0 blocks by those of the grid that the weights lie on, where that is closer; others stay as they are.

    Args:
        values: the weights, any shape, of whole blocks.
        blocks: as libggml quantized them, [bytes]; changed in place.
    """
    weights, made = values.reshape(-1, 32), blocks.reshape(-1, 18)
    with np.errstate(over="ignore", invalid="ignore"):  # of scales too small or too large, which are no better then
        for start in range(0, len(made), CHUNK):
            _regrid(weights[start : start + CHUNK], made[start : start + CHUNK])


def _regrid(weights: Floats, made: Bytes) -> None:
    places = _unpack(made)
    error = np.square(weights - places).sum(1)
    left = np.flatnonzero(~_exact(weights, places))
    for end in GRID_ENDS:
        values = weights[left]
        peaks = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)
        steps = np.rint(values * (end / peaks)).clip(-8, 7)
        best = (values * steps).sum(1, keepdims=True) / np.maximum(np.square(steps).sum(1, keepdims=True), 1)
        near = (np.abs(values - best * steps) <= NEAR * np.abs(values)).all(1)
        rows, values, steps = left[near], values[near], steps[near]
        found = np.zeros(len(rows), bool)
        for scale in _scales(best[near]):
            places = scale * steps
            errors, exact = np.square(values - places).sum(1), _exact(values, places)
            better = ~found & (exact | (errors < error[rows]))
            made[rows[better]] = _pack(scale[better], steps[better])
            error[rows[better]] = errors[better]
            found |= exact
        left = np.setdiff1d(left, rows[found], assume_unique=True)


def _scales(best: Floats) -> list[Floats]:
    """Scales worth a try, all of float16: that of least squares, [n, 1], as bf16 and as float16, and its neighbours."""
    half = best.astype(np.float16)
    tried = _bf16(best), half, np.nextafter(half, np.float16(np.inf)), np.nextafter(half, np.float16(-np.inf))
    return [each.astype(np.float16).astype(np.float32) for each in tried]


def _exact(values: Floats, places: Floats) -> Bools:
    """Which blocks, [n, 32], are what was rounded to bf16 to make the weights."""
    found: Bools = (_bf16(places) == values).all(1)
    return found


def _bf16(values: Floats) -> Floats:
    """Rounded to bf16, to the nearest and ties to even; finite."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)


def _unpack(blocks: Bytes) -> Floats:
    """What Q4_0 blocks, [n, 18], stand for, [n, 32] (ggml/src/ggml-quants.c, `dequantize_row_q4_0`)."""
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return scale * (np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8)


def _pack(scale: Floats, steps: Floats) -> Bytes:
    """Q4_0 blocks, [n, 18], of scales, [n, 1], and integers of -8 to 7, [n, 32]."""
    nibbles = (steps + 8).astype(np.uint8)
    return np.concatenate([scale.astype("<f2").view(np.uint8), nibbles[:, :16] | (nibbles[:, 16:] << 4)], 1)
