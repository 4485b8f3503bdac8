"""Which ggml type each tensor gets: the rules of llama.cpp's quantizer, as data and pure functions.

Source: src/llama-quant.cpp of the pinned llama.cpp (`tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`); for the unquantized formats conversion/base.py (`prepare_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

T = GGMLQuantizationType


class Quant(NamedTuple):
    """A file format: the type most tensors get, and its number in general.file_type."""

    base: GGMLQuantizationType
    file_type: LlamaFileType
    quantized: bool


QUANTS: Mapping[str, Quant] = {
    "F32": Quant(T.F32, LlamaFileType.ALL_F32, False),
    "F16": Quant(T.F16, LlamaFileType.MOSTLY_F16, False),
    "BF16": Quant(T.BF16, LlamaFileType.MOSTLY_BF16, False),
    "Q8_0": Quant(T.Q8_0, LlamaFileType.MOSTLY_Q8_0, True),
    "Q4_0": Quant(T.Q4_0, LlamaFileType.MOSTLY_Q4_0, True),
    "Q4_K_M": Quant(T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, True),
}

# Matrices that the quantizer leaves in the type of the file it reads.
KEPT = ("_norm.weight", "per_layer_model_proj")
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# When a row is no multiple of a type's block: the type with blocks of 32 that takes its place.
SMALLER_BLOCKS = {T.Q4_K: T.Q5_0, T.Q6_K: T.Q8_0}


class Shape(NamedTuple):
    """What the rules look at: GGUF name, shape as torch has it (row length last), type of the source."""

    name: str
    shape: tuple[int, ...]
    source: GGMLQuantizationType


def more_bits(index: int, count: int) -> bool:
    """Whether Q4_K_M gives the tensor `index` of `count` of its kind six bits: first and last eighth, every third."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def fitting(wanted: GGMLQuantizationType, row: int) -> GGMLQuantizationType:
    """`wanted` if its blocks divide a row of that many elements, else what llama.cpp puts in its place."""
    if row % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    smaller = SMALLER_BLOCKS.get(wanted, wanted)
    return smaller if row % GGML_QUANT_SIZES[smaller][0] == 0 else T.F16


def choose(tensors: Sequence[Shape], quant: Quant, n_layer: int) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor of one file.

    Args:
        tensors: in the order of the layers, which the alternation of Q4_K_M counts along.
        quant: an entry of `QUANTS`.
        n_layer: layers of the model.

    Returns:
        GGUF name to ggml type.
    """
    n_attn_v = sum(tensor.name.endswith("attn_v.weight") for tensor in tensors)
    seen = {"attn_v.weight": 0, "ffn_down.weight": 0}
    counts = {"attn_v.weight": n_attn_v, "ffn_down.weight": n_layer}
    chosen = {}
    for name, shape, source in tensors:
        if len(shape) < 2 or name.endswith("_norm.weight"):
            chosen[name] = T.F32
        elif not quant.quantized:
            chosen[name] = quant.base
        elif any(kept in name for kept in KEPT):
            chosen[name] = source
        else:
            kind = name.split(".", 2)[-1]
            wanted = quant.base
            # With tied embeddings a token embedding gets the type that an output matrix would get.
            if name in EMBEDDINGS:
                uneven = shape[-1] % GGML_QUANT_SIZES[quant.base][0] != 0
                wanted = T.Q8_0 if uneven or quant.base is T.Q8_0 else T.Q6_K
            elif kind in seen and quant.file_type is LlamaFileType.MOSTLY_Q4_K_M:
                wanted = T.Q6_K if more_bits(seen[kind], counts[kind]) else wanted
                seen[kind] += 1
            chosen[name] = fitting(wanted, shape[-1])
    return chosen


def n_bytes(kind: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Size of a tensor in bytes."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(prod(shape) // block * size)
