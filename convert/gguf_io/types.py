"""The ggml types that a file can hold: their numbers, and what a block of each is made of.

ggml/include/ggml.h and ggml/src/ggml-common.h of the pinned llama.cpp; the gguf package lags behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import prod
from typing import NamedTuple

# Bytes of which every tensor begins at a multiple, unless a file says otherwise (general.alignment).
ALIGNMENT = 32

# The largest number that a float32 holds.
F32_MAX = 3.4028235e38


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
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


class Block(NamedTuple):
    """A block: its values, its bytes, and at which of these its scales of 16 bits lie, where they lie in one piece."""

    values: int
    size: int
    scales: tuple[int, ...] = ()


# Q8_1 and Q8_K are never stored.
BLOCKS: dict[Type, Block] = {
    Type.F32: Block(1, 4), Type.F16: Block(1, 2), Type.BF16: Block(1, 2), Type.F64: Block(1, 8),
    Type.I8: Block(1, 1), Type.I16: Block(1, 2), Type.I32: Block(1, 4), Type.I64: Block(1, 8),
    Type.Q1_0: Block(128, 18, (0,)), Type.Q2_0: Block(64, 18, (0,)),
    Type.Q4_0: Block(32, 18, (0,)), Type.Q4_1: Block(32, 20, (0, 2)),
    Type.Q5_0: Block(32, 22, (0,)), Type.Q5_1: Block(32, 24, (0, 2)), Type.Q8_0: Block(32, 34, (0,)),
    Type.Q2_K: Block(256, 84, (80, 82)), Type.Q3_K: Block(256, 110, (108,)), Type.Q4_K: Block(256, 144, (0, 2)),
    Type.Q5_K: Block(256, 176, (0, 2)), Type.Q6_K: Block(256, 210, (208,)),
    Type.IQ1_S: Block(256, 50, (0,)), Type.IQ1_M: Block(256, 56), Type.IQ2_XXS: Block(256, 66, (0,)),
    Type.IQ2_XS: Block(256, 74, (0,)), Type.IQ2_S: Block(256, 82, (0,)), Type.IQ3_XXS: Block(256, 98, (0,)),
    Type.IQ3_S: Block(256, 110, (0,)), Type.IQ4_NL: Block(32, 18, (0,)), Type.IQ4_XS: Block(256, 136, (0,)),
    Type.TQ1_0: Block(256, 54, (52,)), Type.TQ2_0: Block(256, 66, (64,)),
    Type.MXFP4: Block(32, 17), Type.NVFP4: Block(64, 36),
}  # fmt: skip
UNQUANTIZED = (Type.F32, Type.F16, Type.BF16)
# What files of others may hold; no tensor is made of these here.
READ_ONLY = (Type.I8, Type.I16, Type.I32, Type.I64, Type.F64, Type.NVFP4)


def fits(kind: Type, row: int) -> bool:
    """Whether blocks of a type cover a row of that many values without rest."""
    return row % BLOCKS[kind].values == 0


def n_bytes(kind: Type, shape: Sequence[int]) -> int:
    """Size of a tensor in bytes; its rows, of one dimension, must fit."""
    block = BLOCKS[kind]
    return prod(shape) // block.values * block.size


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """A size in bytes, rounded up to the alignment."""
    return -(-size // alignment) * alignment
