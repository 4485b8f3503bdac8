"""Which ggml type each tensor gets: the rules of llama.cpp's quantizer, as data and pure functions.

Source: src/llama-quant.cpp of the pinned llama.cpp (`tensor_allows_quantization`, `llama_tensor_get_type`,
`llama_tensor_get_type_impl`, `tensor_type_fallback`, `tensor_requires_imatrix`); for the unquantized formats
conversion/base.py (`prepare_tensors`). `tests/convert/test_formats.py` compares every format with llama-quantize.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.types import BLOCKS, READ_ONLY, UNQUANTIZED, Type, fits

T = Type


class Quant(NamedTuple):
    """A file format: the type most tensors get, and its number in general.file_type (llama.h, `llama_ftype`)."""

    base: Type
    file_type: int

    @property
    def quantized(self) -> bool:
        return self.base not in UNQUANTIZED


QUANTS: Mapping[str, Quant] = {
    "F32": Quant(T.F32, 0), "F16": Quant(T.F16, 1), "BF16": Quant(T.BF16, 32),
    "Q8_0": Quant(T.Q8_0, 7), "Q6_K": Quant(T.Q6_K, 18),
    "Q5_K_M": Quant(T.Q5_K, 17), "Q5_K_S": Quant(T.Q5_K, 16), "Q5_1": Quant(T.Q5_1, 9), "Q5_0": Quant(T.Q5_0, 8),
    "Q4_K_M": Quant(T.Q4_K, 15), "Q4_K_S": Quant(T.Q4_K, 14), "Q4_1": Quant(T.Q4_1, 3), "Q4_0": Quant(T.Q4_0, 2),
    "IQ4_NL": Quant(T.IQ4_NL, 25), "IQ4_XS": Quant(T.IQ4_XS, 30), "MXFP4_MOE": Quant(T.MXFP4, 38),
    "Q3_K_L": Quant(T.Q3_K, 13), "Q3_K_M": Quant(T.Q3_K, 12), "Q3_K_S": Quant(T.Q3_K, 11),
    "IQ3_M": Quant(T.IQ3_S, 27), "IQ3_S": Quant(T.IQ3_S, 26), "IQ3_XS": Quant(T.IQ3_S, 22),
    "IQ3_XXS": Quant(T.IQ3_XXS, 23),
    "Q2_K": Quant(T.Q2_K, 10), "Q2_K_S": Quant(T.Q2_K, 21),
    "IQ2_M": Quant(T.IQ2_S, 29), "IQ2_S": Quant(T.IQ2_XS, 28), "IQ2_XS": Quant(T.IQ2_XS, 20),
    "IQ2_XXS": Quant(T.IQ2_XXS, 19), "IQ1_M": Quant(T.IQ1_M, 31), "IQ1_S": Quant(T.IQ1_S, 24),
    "TQ2_0": Quant(T.TQ2_0, 37), "TQ1_0": Quant(T.TQ1_0, 36), "Q2_0": Quant(T.Q2_0, 41), "Q1_0": Quant(T.Q1_0, 40),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

PROJECTOR_QUANTS = ("F16", "BF16", "F32", "Q8_0")

# Formats of target and drafter together, and why.
# cpu: a Q4_0 drafter drafts in 2.3 ms where a Q8_0 one takes 5.5 (E2B's shape, 2 threads, AVX512-VNNI), and what is
#      repacked for the matrix kernels of the verify pass is Q4_0 as well.
# gpu: the drafter's time matters less, so it stays near the original; its effect on a GPU was not measured.
# qat: the "q4_0-unquantized" checkpoints were trained to be rounded to Q4_0; any other type gives up that training, and
#      so does another scale than theirs (see qat.py).
RECIPES: Mapping[str, tuple[str, str]] = {"cpu": ("Q4_0", "Q4_0"), "gpu": ("Q4_K_M", "Q8_0"), "qat": ("Q4_0", "Q4_0")}
QAT_NAME = "qat-q4_0"


def recipe_of(name: str) -> str:
    """The recipe for a target by the name of its repository or folder, where the user asks for none."""
    return "qat" if QAT_NAME in name.lower() else "gpu"


EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# Matrices that the quantizer leaves in the type of the file it reads.
KEPT = ("_norm.weight", "per_layer_model_proj", "ffn_gate_inp.weight")
# When a row is no multiple of a type's block: the type with smaller blocks that takes its place.
SMALLER_BLOCKS = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    **dict.fromkeys((T.Q2_0, T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0,
}  # fmt: skip
# Types that are garbage without an importance matrix, and those that libggml cannot even compute without one.
WANT_IMATRIX = {T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S}
NEED_IMATRIX = {T.IQ2_XXS, T.IQ2_XS, T.IQ1_S}

VERY_LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")


class Row(NamedTuple):
    """What the rules look at: GGUF name, shape as torch has it (row length last), type of the source."""

    name: str
    shape: tuple[int, ...]
    source: Type


class Traits(NamedTuple):
    """What the rules ask about a model: its layers, query heads per KV head of the first layer, experts."""

    n_layer: int
    n_gqa: int
    n_expert: int


@dataclass(frozen=True)
class Options:
    """llama-quantize's options of the same names; `tensor_types` holds (regular expression, type), the first wins.

    With `qat`, Q4_0 blocks keep the grid that the weights were trained for, the drafter's too.
    """

    tensor_types: tuple[tuple[str, Type], ...] = ()
    token_embedding: Type | None = None
    output_tensor: Type | None = None
    pure: bool = False
    imatrix: bool = False
    qat: bool = False

    def named(self, name: str) -> Type | None:
        return next((kind for pattern, kind in self.tensor_types if re.search(pattern, name)), None)


def parse_type(name: str) -> Type:
    """A ggml type by its name, in any case."""
    known = {kind.name: kind for kind in Type if kind not in READ_ONLY}
    if name.upper() not in known:
        raise MtpError(f"unknown type {name!r}; choose one of {', '.join(known)}.")
    return known[name.upper()]


def parse_tensor_type(text: str) -> tuple[str, Type]:
    """PATTERN=TYPE as llama-quantize reads it: the pattern is a regular expression in lower case."""
    pattern, equals, kind = text.partition("=")
    if not (pattern and equals and kind):
        raise MtpError(f"{text!r} is not PATTERN=TYPE; write for instance ffn_down=q6_k.")
    try:
        re.compile(pattern.lower())
    except re.error as problem:
        raise MtpError(f"{pattern!r} is not a regular expression ({problem}).") from None
    return pattern.lower(), parse_type(kind)


def find_quant(name: str) -> str:
    """The key of `QUANTS` that a user means, in any case and with llama-quantize's aliases."""
    upper = name.upper()
    found = ALIASES.get(upper, upper)
    if found not in QUANTS:
        raise MtpError(f"unknown format {name!r}; choose one of {', '.join(QUANTS)}.")
    return found


DEFAULT = Options()


def choose(tensors: Sequence[Row], quant: str, traits: Traits, options: Options = DEFAULT) -> dict[str, Type]:
    """The type of every tensor of one file.

    Args:
        tensors: in the order of the layers, along which the mixtures count.
        quant: a key of `QUANTS`.
        traits: what the rules ask about the model.
        options: what the user wants otherwise.

    Returns:
        GGUF name to ggml type.

    Raises:
        MtpError: blocks do not fit a tensor, and llama.cpp has no type to put in their place.
    """
    names = [tensor.name for tensor in tensors]
    n_attn_v = sum("attn_v.weight" in name for name in names)
    mixture = _Mixture(quant, traits, options, n_attn_v, "output.weight" not in names)
    return {tensor.name: _type(tensor, QUANTS[quant], options, mixture) for tensor in tensors}


def unquantized(tensor: Row, base: Type) -> Type:
    """The type that upstream's converter gives a tensor in a file of F32, F16 or BF16."""
    vector = len(tensor.shape) < 2 or tensor.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    return T.F32 if vector or not tensor.name.endswith(".weight") else base


def _quantizable(tensor: Row) -> bool:
    matrix = len(tensor.shape) > 1 and prod(tensor.shape[:-1]) > 1
    return matrix and tensor.name.endswith("weight") and not any(kept in tensor.name for kept in KEPT)


def _type(tensor: Row, quant: Quant, options: Options, mixture: _Mixture) -> Type:
    name = tensor.name
    if not _quantizable(tensor):
        return unquantized(tensor, tensor.source if quant.quantized else quant.base)
    named = options.named(name)
    if options.token_embedding is not None and name in EMBEDDINGS and not (name == EMBEDDINGS[1] and named is not None):
        return _must_fit(tensor, options.token_embedding)
    if options.output_tensor is not None and name == "output.weight":
        return _must_fit(tensor, options.output_tensor)
    if not quant.quantized:
        return quant.base
    if named is not None:
        return fitting_type(named, tensor)
    return fitting_type(quant.base if options.pure else mixture.type(tensor), tensor)


def _must_fit(tensor: Row, kind: Type) -> Type:
    if not fits(kind, tensor.shape[-1]):
        raise MtpError(f"{tensor.name} has rows of {tensor.shape[-1]}, which {kind.name} does not fit; choose another.")
    return kind


def fitting_type(wanted: Type, tensor: Row) -> Type:
    """`wanted` if its blocks divide the rows of a tensor, else what llama.cpp puts in its place."""
    row = tensor.shape[-1]
    if fits(wanted, row):
        return wanted
    if wanted not in SMALLER_BLOCKS and BLOCKS[wanted].values > 32:
        raise MtpError(
            f"{tensor.name} has rows of {row}, which blocks of {wanted.name} do not fit, and llama.cpp has no type "
            "to put in its place; choose another format."
        )
    smaller = SMALLER_BLOCKS.get(wanted, wanted)
    return smaller if fits(smaller, row) else T.F16


def needs_imatrix(name: str, kind: Type, quant: str) -> bool:
    """Whether a tensor of this type must not be written without an importance matrix."""
    if name in EMBEDDINGS or name == "output.weight":
        return kind in NEED_IMATRIX
    return kind in WANT_IMATRIX or (quant == "Q2_K_S" and kind is T.Q2_K)


def _category(name: str) -> str:
    if name in EMBEDDINGS:
        return "embedding"
    if name == "output.weight":
        return "output"
    parts = ("attn_v.weight", "attn_k.weight", "attn_q.weight", "attn_output.weight", "ffn_up", "ffn_gate", "ffn_down")
    return next((part.removesuffix(".weight") for part in parts if part in name), "other")


@dataclass
class _Mixture:
    """llama.cpp's mixtures: the types that a format gives to a tensor by its role and its place among its kind."""

    quant: str
    traits: Traits
    options: Options
    n_attn_v: int
    tied: bool
    seen: Counter[str] = field(default_factory=Counter)

    def type(self, tensor: Row) -> Type:
        base, q = QUANTS[self.quant].base, self.quant
        role = _category(tensor.name)
        if role == "output" or (role == "embedding" and self.tied):
            return self._output(base, tensor.shape[-1])
        if q == "MXFP4_MOE":
            return T.MXFP4 if len(tensor.shape) > 2 and tensor.shape[0] > 1 else T.Q8_0
        if role == "embedding":
            return EMBEDDING_TYPES.get(q, base)
        index, count = self.seen[role], self.n_attn_v if role == "attn_v" else self.traits.n_layer
        self.seen[role] += 1
        if q in VERY_LOW:
            return self._very_low(role, base, index, count)
        if role != "attn_v" and self.traits.n_expert > 1 and tensor.name.startswith("blk."):
            index = int(tensor.name.split(".")[1])  # a layer has several tensors of a kind
        if role == "attn_v":
            return self._attn_v(base, index, count)
        if role == "ffn_down":
            return self._ffn_down(base, index, count)
        if role in ("ffn_up", "ffn_gate") and q == "IQ3_XS" and count // 8 <= index < 7 * count // 8:
            return T.IQ3_XXS
        if role == "attn_output" and self.traits.n_expert == 8:
            return T.Q5_K if q in EIGHT_EXPERTS_OUTPUT else base
        if role == "attn_k" and self.traits.n_expert == 8:
            return T.Q8_0
        return BY_ROLE.get(role, {}).get(q, base)

    def _output(self, base: Type, row: int) -> Type:
        if self.options.output_tensor is not None:
            return self.options.output_tensor
        if self.quant == "MXFP4_MOE" or not fits(base, row) or base is T.Q8_0:
            return T.Q8_0
        low = self.quant in (*VERY_LOW, "IQ3_XXS")
        return T.Q5_K if low else T.Q6_K

    def _very_low(self, role: str, base: Type, index: int, count: int) -> Type:
        q, n_expert = self.quant, self.traits.n_expert
        better = T.IQ3_S if q in ("IQ2_S", "IQ2_M") else T.Q2_K
        if role == "attn_v":
            return T.Q4_K if self.traits.n_gqa >= 4 or n_expert >= 4 else better
        if role == "attn_k" and n_expert == 8:
            return T.Q4_K
        if role == "ffn_down":
            return better if index < count // 8 else base
        if role == "attn_output":
            if n_expert == 8:
                return T.Q5_K
            return {"IQ1_S": T.IQ2_XXS, "IQ1_M": T.IQ2_XXS, "IQ2_S": T.IQ3_S, "IQ2_M": T.IQ3_S}.get(q, base)
        return base

    def _attn_v(self, base: Type, index: int, count: int) -> Type:
        q, shared = self.quant, self.traits.n_gqa >= 4
        if self.traits.n_expert == 8:
            return T.Q8_0
        if q == "Q2_K":
            return T.Q4_K if shared else T.Q3_K
        if q == "IQ3_XXS":
            return T.Q4_K if shared else T.IQ3_XXS if self.options.imatrix else T.IQ3_S
        if q in ("Q2_K_S", "IQ3_XS", "IQ3_S"):
            return T.Q4_K if shared else base
        if q in ("IQ4_NL", "IQ4_XS"):
            return T.Q5_K if shared else base
        if q == "Q3_K_M":
            return T.Q5_K if index < 2 else T.Q4_K
        if q in ("Q4_K_M", "Q5_K_M"):
            return T.Q6_K if more_bits(index, count) else base
        if q == "Q4_K_S":
            return T.Q5_K if index < 4 else base
        return {"IQ3_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(q, base)

    def _ffn_down(self, base: Type, index: int, count: int) -> Type:
        q, first, imatrix = self.quant, index < count // 8, self.options.imatrix
        if q == "IQ3_XXS" and not imatrix:
            return T.Q4_K if first else T.Q3_K
        if q == "Q3_K_M":
            return T.Q5_K if index < count // 16 else T.Q4_K
        if q in ("Q4_K_M", "Q5_K_M"):
            return T.Q6_K if more_bits(index, count) else base
        if q == "IQ3_M" and self.traits.n_expert == 8 and more_bits(index, count):
            return T.Q4_K
        if q in ("Q2_K", "Q3_K_L"):
            return T.Q3_K if q == "Q2_K" else T.Q5_K
        at_first = {"Q2_K_S": T.Q4_K, "IQ3_M": T.Q4_K, "Q4_K_S": T.Q5_K}
        # Q4_1 and Q5_1 go wrong in these layers without an importance matrix, Q4_0 and Q5_0 with one.
        at_first |= {"Q4_0": T.Q4_1, "Q5_0": T.Q5_1} if imatrix else {"IQ4_NL": T.Q5_K, "IQ4_XS": T.Q5_K}
        return at_first.get(q, base) if first else base


# Token embeddings of a model with an output matrix of its own.
EMBEDDING_TYPES = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), T.Q2_K),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), T.IQ3_S),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), T.Q4_K),
}
BY_ROLE: Mapping[str, Mapping[str, Type]] = {
    "attn_k": {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S},
    "attn_q": {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S},
    "attn_output": {"Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_M": T.Q4_K},
}
EIGHT_EXPERTS_OUTPUT = {
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
}  # fmt: skip


def more_bits(index: int, count: int) -> bool:
    """Whether a mixture spends more on tensor `index` of `count`: first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
