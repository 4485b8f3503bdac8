"""The native calls that llama_cpp's own wrappers do not make, and what the loaded libllama can do."""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as lib
from llama_cpp import llama_cpp_ext as ext

Floats = npt.NDArray[np.float32]


def patched() -> bool:
    """Whether libllama carries our series: its first patch exports the functions used here under their C names."""
    try:
        return hasattr(lib._lib, "llama_get_ctx_other")
    except AttributeError:
        return False


@functools.cache
def notice_unpatched() -> None:
    """Say, once per process, that the loaded libllama is not ours."""
    if not patched():
        warnings.warn(
            "this llama-cpp-python lacks gemma-mtp's patches: MTP works, with one decode per draft token and the "
            "drafter's dense head. `make native` in a checkout of gemma-mtp installs the patched build.",
            stacklevel=2,
        )


def expose_hidden_rows(ctx: Any, *, every_token: bool) -> None:
    """Have a context keep hidden rows: of every token decoded (target), or of those with logits (drafter)."""
    ext.llama_set_embeddings_nextn(ctx, True, not every_token)


def hidden_row(ctx: Any, index: int, width: int) -> Floats:
    """Copy of the hidden row of batch entry `index` of the last decode, shape [width].

    For the target that is its last hidden state after the final norm, for the drafter the state projected back to the
    target's width (`h_nextn` in llama.cpp's src/models/gemma4*.cpp).

    Raises:
        RuntimeError: the last decode did not keep that row.
    """
    pointer = ext.llama_get_embeddings_nextn_ith(ctx, index)
    if not pointer:
        raise RuntimeError(f"libllama kept no hidden row {index}; was the context decoded by somebody else meanwhile?")
    return np.ctypeslib.as_array(pointer, shape=(width,)).copy()


def logits_row(ctx: Any, index: int, n_vocab: int) -> Floats:
    """View of the logits of batch entry `index` of the last decode, shape [n_vocab]; valid until the next decode.

    Raises:
        RuntimeError: the last decode made no logits for that entry.
    """
    pointer = lib.llama_get_logits_ith(ctx, index)
    if not pointer:
        raise RuntimeError(f"libllama made no logits for row {index} of the last batch")
    return np.ctypeslib.as_array(pointer, shape=(n_vocab,))


class DraftBatch:
    """A llama_batch of one entry with a token and a hidden row, which llama_batch_init cannot make.

    Args:
        width: length of the hidden row, the target's embedding length.
    """

    def __init__(self, width: int) -> None:
        self.hidden = np.zeros(width, dtype=np.float32)
        self._token = (lib.llama_token * 1)()
        self._position = (lib.llama_pos * 1)()
        self._sequences = (lib.llama_seq_id * 1)(0)
        self._batch = lib.llama_batch(
            n_tokens=1,
            token=self._token,
            embd=self.hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=self._position,
            n_seq_id=(ctypes.c_int32 * 1)(1),
            seq_id=(ctypes.POINTER(lib.llama_seq_id) * 1)(self._sequences),
            logits=(ctypes.c_int8 * 1)(1),
        )

    def decode(self, ctx: Any, token: int, hidden: Floats, position: int) -> None:
        """One drafter pass.

        Raises:
            RuntimeError: llama_decode refused.
        """
        self._token[0], self._position[0] = token, position
        self.hidden[:] = hidden
        if (status := lib.llama_decode(ctx, self._batch)) != 0:
            raise RuntimeError(f"llama_decode of the drafter returned {status}")
