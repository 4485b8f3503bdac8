"""The ggml types that a file can hold: their numbers, and how many values and bytes a block of each has.

ggml/include/ggml.h and ggml/src/ggml-common.h of the pinned llama.cpp; the gguf package lags behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import prod


class Type(IntEnum):
    """A ggml type, by its number in a GGUF file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    Q1_0 = 41
    Q2_0 = 42


# Values and bytes of a block.
BLOCKS: dict[Type, tuple[int, int]] = {
    Type.F32: (1, 4), Type.F16: (1, 2), Type.BF16: (1, 2),
    Type.Q4_0: (32, 18), Type.Q4_1: (32, 20), Type.Q5_0: (32, 22), Type.Q5_1: (32, 24), Type.Q8_0: (32, 34),
    Type.Q2_K: (256, 84), Type.Q3_K: (256, 110), Type.Q4_K: (256, 144), Type.Q5_K: (256, 176), Type.Q6_K: (256, 210),
    Type.IQ1_S: (256, 50), Type.IQ1_M: (256, 56), Type.IQ2_XXS: (256, 66), Type.IQ2_XS: (256, 74),
    Type.IQ2_S: (256, 82), Type.IQ3_XXS: (256, 98), Type.IQ3_S: (256, 110), Type.IQ4_XS: (256, 136),
    Type.IQ4_NL: (32, 18), Type.TQ1_0: (256, 54), Type.TQ2_0: (256, 66), Type.MXFP4: (32, 17),
    Type.Q1_0: (128, 18), Type.Q2_0: (64, 18),
}  # fmt: skip
UNQUANTIZED = (Type.F32, Type.F16, Type.BF16)


def fits(kind: Type, row: int) -> bool:
    """Whether blocks of a type cover a row of that many values without rest."""
    return row % BLOCKS[kind][0] == 0


def n_bytes(kind: Type, shape: Sequence[int]) -> int:
    """Size of a tensor in bytes; its rows, the last dimension, must fit."""
    values, size = BLOCKS[kind]
    return prod(shape) // values * size
