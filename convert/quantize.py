"""Rows of numbers to ggml blocks, through libggml's own quantizer (ggml/src/ggml.c, `ggml_quantize_chunk`).

ctypes lets go of the interpreter lock during a call, so threads share the work.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.blocks import Type, n_bytes
from gemma_mtp.convert.errors import MtpError
from llama_cpp import llama_cpp as lib

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_P, _N = ctypes.c_void_p, ctypes.c_int64


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(lib._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


_quantize = _function("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, _P, _P, _N, _N, _N, _P)
_validate = _function("ggml_validate_row_data", ctypes.c_bool, ctypes.c_int, _P, ctypes.c_size_t)
_from_f16 = _function("ggml_fp16_to_fp32_row", None, _P, _P, _N)
_from_bf16 = _function("ggml_bf16_to_fp32_row", None, _P, _P, _N)

F16_MAX = 65504.0


def widen(raw: Bytes, kind: Type) -> Floats:
    """Values of type F32, F16 or BF16, [bytes], as float32, [values]."""
    if kind is Type.F32:
        return raw.view(np.float32)
    values = np.empty(raw.nbytes // 2, np.float32)
    (_from_f16 if kind is Type.F16 else _from_bf16)(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def largest(raw: Bytes, kind: Type) -> float:
    """The largest magnitude among values of type F32, F16 or BF16, [bytes]; infinite if one is, or is NaN.

    Without the sign, the bits of floating-point numbers order like the numbers, with infinity and NaN at the top.
    """
    if kind is Type.F32:
        top = (raw.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(keepdims=True).view(np.uint8)
    else:
        top = (raw.view(np.uint16) & np.uint16(0x7FFF)).max(keepdims=True).view(np.uint8)
    magnitude = float(widen(top, kind)[0])
    return magnitude if np.isfinite(magnitude) else np.inf


def quantize(rows: npt.ArrayLike, kind: Type, imatrix: Floats | None = None) -> Bytes:
    """Quantize rows.

    Args:
        rows: [n, row length] or [row length], finite, taken as float32; the type's block divides the row length.
        kind: ggml type to write.
        imatrix: importance of each column, [row length].

    Returns:
        The blocks, row after row, [bytes].

    Raises:
        MtpError: a value is NaN, infinite, or too large for the 16 bits that `kind` has for it.
    """
    values = np.ascontiguousarray(rows, np.float32)
    magnitude = largest(values.reshape(-1).view(np.uint8), Type.F32)
    if np.isinf(magnitude):
        raise MtpError("it holds NaN or infinite values")
    return blocks_of(values, kind, magnitude, imatrix)


def blocks_of(values: Floats, kind: Type, magnitude: float, imatrix: Floats | None = None) -> Bytes:
    """As `quantize`, for values whose largest magnitude is known to be finite."""
    length = values.shape[-1]
    blocks = np.empty(n_bytes(kind, values.shape), np.uint8)
    weights = None if imatrix is None else imatrix.ctypes.data
    written = _quantize(
        int(kind), values.ctypes.data, blocks.ctypes.data, 0, values.size // length, length, weights
    )  # fmt: skip
    if written != blocks.nbytes:
        raise RuntimeError(f"libggml wrote {written} bytes of {Type(kind).name}, {blocks.nbytes} were wanted")
    fits = magnitude <= F16_MAX or kind in (Type.F32, Type.BF16)
    if not fits and (kind is Type.F16 or not valid(blocks, kind)):
        raise MtpError(f"it holds {magnitude:g}, more than {Type(kind).name} can; convert to BF16")
    return blocks


def valid(blocks: Bytes, kind: Type) -> bool:
    """Whether blocks as read from a file, [bytes], hold no NaN and no infinity; libggml prints where it finds one."""
    return bool(_validate(int(kind), blocks.ctypes.data, blocks.nbytes))
