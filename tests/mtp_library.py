"""Functions of include/llama-mtp.h that no program of ours calls, for what the tests ask of them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from gemma_mtp.runtime.draft.drafter import Drafter, DraftSettings
from llama_cpp import llama_cpp as lib

_IDS, _REALS = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)


def candidates(ctx: Any, index: int) -> tuple[Any, Any] | None:
    """What an ordered head computed for batch entry `index` of the last decode; every other token counts as -inf.

    Returns:
        Views of token ids and logits, both [n_candidates], valid until the next decode; None for a dense head.
    """
    function = lib._lib.llama_mtp_get_candidates_ith
    function.restype = ctypes.c_int32
    function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(_IDS), ctypes.POINTER(_REALS)]
    ids, logits = _IDS(), _REALS()
    count = function(ctx, index, ctypes.byref(ids), ctypes.byref(logits))
    if not count:
        return None
    return np.ctypeslib.as_array(ids, shape=(count,)), np.ctypeslib.as_array(logits, shape=(count,))


def round_with_chances(
    drafter: Drafter, token: int, hidden: Any, position: int, length: int, settings: DraftSettings, p_min: float = 0.0
) -> tuple[list[int], list[float]]:
    """A native round of drafting, and the drafter's own probability of each token; it ends before one below `p_min`."""
    params = settings.params(length)
    params.p_min = p_min
    tokens, chances = np.empty(length, np.int32), np.empty(length, np.float32)
    row = np.ascontiguousarray(hidden, np.float32)
    places = [array.ctypes.data for array in (row, tokens, chances)]
    function = lib._lib.llama_mtp_draft
    function.restype = ctypes.c_int32
    function.argtypes = [
        ctypes.c_void_p, type(params), ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p,
        ctypes.c_void_p,
    ]  # fmt: skip
    count = function(drafter.ctx, params, 0, token, places[0], position, *places[1:])
    assert count >= 0
    return tokens[:count].tolist(), chances[:count].tolist()


def allowed(sampler: Any, n_vocab: int) -> Any:
    """Whether a grammar allows each token next, shape [n_vocab]."""
    words = np.zeros((n_vocab + 63) // 64, np.uint64)
    function = lib._lib.llama_mtp_grammar_allowed
    function.restype, function.argtypes = ctypes.c_bool, [ctypes.c_void_p, ctypes.c_void_p]
    assert function(sampler, words.ctypes.data)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:n_vocab].astype(bool)


def forced(sampler: Any) -> int:
    """The only token that a grammar allows next, or LLAMA_TOKEN_NULL."""
    function = lib._lib.llama_mtp_grammar_forced
    function.restype, function.argtypes = ctypes.c_int32, [ctypes.c_void_p]
    return int(function(sampler))
