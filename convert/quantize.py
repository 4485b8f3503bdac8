"""Numbers as checkpoints store them to rows of float32, and those to ggml blocks, through libggml's own quantizer.

The quantizer is `ggml_quantize_chunk` (ggml/src/ggml.c). ctypes and numpy let go of the interpreter lock while they
work, so threads share it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.types import Type, n_bytes

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

F16_MAX = 65504.0
# Types of safetensors, and what numpy reads them as. It knows neither bf16 nor floating point of 8 bits: those are read
# as integers, and widened by moving their bits.
STORED_AS = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "F8_E5M2": "u1", "F8_E4M3": "u1",
    "F8_E8M0": "u1",
}  # fmt: skip


@functools.cache
def _ggml() -> ctypes.CDLL:
    """The library with the quantizer, of the installed llama-cpp-python; importing that would load libllama as well.

    Raises:
        MtpError: llama-cpp-python is not installed.
    """
    package = PathFinder.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise MtpError("quantizing needs llama-cpp-python; run: gemma-mtp build")
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(package.origin).parent / "lib")
    if found := sorted(folder.glob("*ggml-base.*")):
        library = ctypes.CDLL(str(found[0]))
    else:  # built in one piece
        from llama_cpp import llama_cpp

        library = llama_cpp._lib
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize, validate = library.ggml_quantize_chunk, library.ggml_validate_row_data
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = ctypes.c_int, pointer, pointer, count, count, count, pointer
    validate.restype, validate.argtypes = ctypes.c_bool, (ctypes.c_int, pointer, ctypes.c_size_t)
    return library


def widen(raw: Bytes, kind: str) -> Floats:
    """Numbers of a type of safetensors as float32.

    Args:
        raw: as a file holds them, [bytes].
        kind: a key of STORED_AS.

    Returns:
        [values]; what float32 has no room for is infinite.
    """
    stored = raw.view(STORED_AS[kind])
    if kind == "BF16":  # the upper half of a float32
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if kind == "F8_E5M2":  # the upper half of a float16
        return (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if kind == "F8_E4M3":  # sign, exponent and fraction moved to their places in a float16, whose exponent is 8 more
        bits = stored.astype(np.uint16)
        values = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(np.float16).astype(np.float32) * np.float32(256)
        return np.where(stored & 0x7F == 0x7F, np.float32(np.nan), values)
    with np.errstate(over="ignore", invalid="ignore"):  # for whoever looks at the values to judge
        if kind == "F8_E8M0":  # nothing but an exponent
            return np.where(stored == 0xFF, np.float32(np.nan), np.ldexp(np.float32(1), stored.astype(np.int32) - 127))
        return stored.astype(np.float32, copy=False)


def largest_magnitude(raw: Bytes, kind: Type) -> float:
    """The largest magnitude among values of type F32, F16 or BF16, [bytes].

    Without the sign, the bits of floating-point numbers order like the numbers, with infinity and NaN at the top.

    Raises:
        MtpError: a value is NaN or infinite.
    """
    if kind is Type.F32:
        top = (raw.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(keepdims=True).view(np.uint8)
    else:
        top = (raw.view(np.uint16) & np.uint16(0x7FFF)).max(keepdims=True).view(np.uint8)
    magnitude = float(widen(top, kind.name)[0])
    if not np.isfinite(magnitude):
        raise MtpError("it holds NaN or infinite values")
    return magnitude


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
    magnitude = largest_magnitude(values.reshape(-1).view(np.uint8), Type.F32)
    return blocks_of(values, kind, magnitude, imatrix)


def blocks_of(values: Floats, kind: Type, magnitude: float, imatrix: Floats | None = None) -> Bytes:
    """As `quantize`, for values whose largest magnitude is known to be finite."""
    length = values.shape[-1]
    blocks = np.empty(n_bytes(kind, values.shape), np.uint8)
    weights = None if imatrix is None else imatrix.ctypes.data
    written = _ggml().ggml_quantize_chunk(
        int(kind), values.ctypes.data, blocks.ctypes.data, 0, values.size // length, length, weights
    )
    if written != blocks.nbytes:
        raise RuntimeError(f"libggml wrote {written} bytes of {Type(kind).name}, {blocks.nbytes} were wanted")
    fits = magnitude <= F16_MAX or kind in (Type.F32, Type.BF16)
    if not fits and (kind is Type.F16 or not valid(blocks, kind)):
        raise MtpError(f"it holds {magnitude:g}, more than {Type(kind).name} can; convert to BF16")
    return blocks


def valid(blocks: Bytes, kind: Type) -> bool:
    """Whether blocks as read from a file, [bytes], hold no NaN and no infinity; libggml prints where it finds one."""
    return bool(_ggml().ggml_validate_row_data(int(kind), blocks.ctypes.data, blocks.nbytes))
