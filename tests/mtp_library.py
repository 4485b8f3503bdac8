"""Functions of include/llama-mtp.h that no program of ours calls, for what the tests ask of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import Costs
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


class Company:
    """`llama_mtp_policy` for several sequences that are decoded together, as llama-server has it.

    Args:
        costs: what passes and draft steps take.
        sequences: how many there are.
        most: longest draft of one.
    """

    def __init__(self, costs: Costs, sequences: int, most: int) -> None:
        self.costs, self._lib = costs, native.choices()
        self._lib.llama_mtp_policy_floor.restype = ctypes.c_double
        self._lib.llama_mtp_policy_floor.argtypes = (ctypes.c_void_p,)
        self._policy = self._lib.llama_mtp_policy_init(costs.handle, sequences, most)

    def choose(self, offers: Sequence[tuple[int, int, int, bool]], n_pass: int, equal: bool = False) -> list[int]:
        """A length for each offer: sequence, kind, longest draft, whether it is free."""
        made = (native.DraftOffer * len(offers))(*(native.DraftOffer(*offer) for offer in offers))
        lengths, rows = (ctypes.c_int32 * len(offers))(), native.ROWS_EQUAL if equal else native.ROWS_ANY
        self._lib.llama_mtp_policy_choose(self._policy, made, len(offers), n_pass, rows, lengths)
        return [*lengths]

    def floor(self) -> float:
        """The chance below which one more row does not pay."""
        return float(self._lib.llama_mtp_policy_floor(self._policy))

    def observe(self, sequence: int, kind: int, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        self._lib.llama_mtp_policy_observe(self._policy, sequence, kind, drafted, accepted, accepted + 1)

    def close(self) -> None:
        """Free it."""
        self._lib.llama_mtp_policy_free(self._policy)
