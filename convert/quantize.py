"""Rows of numbers to ggml blocks, through libggml's own quantizer (ggml/src/ggml.c, `ggml_quantize_chunk`)."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch
from gemma_mtp.convert import recipe
from gemma_mtp.convert.link import MtpError
from gguf import GGMLQuantizationType
from llama_cpp import llama_cpp as lib

_quantize = lib._lib.ggml_quantize_chunk
_quantize.restype = ctypes.c_size_t
_quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

F16_MAX = 65504.0


def quantize(rows: torch.Tensor, kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Quantize rows; ctypes lets go of the interpreter lock meanwhile, so threads may share the work.

    Args:
        rows: [n, row length] or [row length], of any floating type, finite; the type's block divides the row length.
        kind: ggml type to write.

    Returns:
        The blocks, row after row, [bytes].

    Raises:
        MtpError: a value is NaN or infinite, or does not fit into 16 bits when `kind` is F16.
    """
    values = rows.to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise MtpError("it holds NaN or infinite values")
    if kind is GGMLQuantizationType.F16 and float(values.abs().max()) > F16_MAX:
        raise MtpError(f"it holds {float(values.abs().max()):g}, more than F16 can; convert to BF16")
    length = values.shape[-1]
    blocks = np.empty(recipe.n_bytes(kind, values.shape), np.uint8)
    written = _quantize(int(kind), values.data_ptr(), blocks.ctypes.data, 0, values.numel() // length, length, None)
    if written != blocks.nbytes:
        raise RuntimeError(f"libggml wrote {written} bytes of {kind.name}, {blocks.nbytes} were wanted")
    return blocks
