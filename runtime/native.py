"""The native calls that llama_cpp's own wrappers do not make, and what the loaded libllama can do."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import chat_native
from llama_cpp import llama_cpp as lib
from llama_cpp import llama_cpp_ext as ext

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


def patched() -> bool:
    """Whether libllama carries our series: its first patch exports the functions used here under their C names."""
    try:
        return hasattr(lib._lib, "llama_get_ctx_other")
    except AttributeError:
        return False


def missing_feature() -> str | None:
    """An instruction set that libggml was built with and this CPU lacks, None where it can run."""
    ask = getattr(lib._lib, "ggml_cpu_missing", None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    missing = ask()
    return missing.decode() if missing else None


def check_cpu() -> None:
    """Refuse a library that would end in an illegal instruction.

    Raises:
        RuntimeError: it was built for another CPU.
    """
    if missing := missing_feature():
        raise RuntimeError(
            f"llama-cpp-python was built for a CPU with {missing}, which this one lacks or a hypervisor hides; build "
            "it here: gemma-mtp build (docs/threads.md)."
        )


def load_backends() -> None:
    """Have ggml load the backends of a portable build, if nobody did before.

    Until a `Llama` says how much is to be logged all of it is, which here is a line on stderr.
    """
    logger = logging.getLogger("llama-cpp-python")
    kept = logger.level
    logger.setLevel(kept or logging.ERROR)
    lib.llama_backend_init()
    logger.setLevel(kept)


class DlInfo(ctypes.Structure):
    """What dladdr tells of an address (dlfcn.h)."""

    _fields_ = (("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p),
                ("address", ctypes.c_void_p))  # fmt: skip


@functools.cache
def cpu_library() -> str | None:
    """Path of the library whose kernels the CPU runs: of a portable build the variant that was chosen.

    None on Windows, and where no CPU backend could be loaded.
    """
    load_backends()
    by_name = getattr(lib._lib, "ggml_backend_reg_by_name", None)
    dladdr = None if os.name == "nt" else ctypes.CDLL(None).dladdr
    if by_name is None or dladdr is None:
        return None
    by_name.restype, by_name.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
    dladdr.argtypes = ctypes.c_void_p, ctypes.POINTER(DlInfo)
    found, told = by_name(b"CPU"), DlInfo()
    return os.fsdecode(told.file) if found and dladdr(found, ctypes.byref(told)) else None


GPU, IGPU = 1, 2  # of enum ggml_backend_dev_type (ggml-backend.h)


@functools.cache
def has_gpu() -> bool:
    """Whether there is a device that layers can go to: a build for GPUs on a machine without one has none.

    llama.cpp's own answer also counts the ability to use another machine's devices (RPC), which are none of this one.
    """
    load_backends()
    if not lib.llama_supports_gpu_offload():
        return False
    of_type = getattr(lib._lib, "ggml_backend_dev_by_type", None)
    if of_type is None:
        return True
    of_type.restype, of_type.argtypes = ctypes.c_void_p, (ctypes.c_int,)
    return any(of_type(kind) for kind in (GPU, IGPU))


@functools.cache
def notice_unpatched() -> None:
    """Say, once per process, that the loaded libllama is not ours, or an older one of ours."""
    if not patched():
        warnings.warn(
            "this llama-cpp-python lacks gemma-mtp's patches: MTP works, with one decode per draft token, the "
            "drafter's dense head and drafts of a fixed length. `gemma-mtp build` installs the patched build.",
            stacklevel=2,
        )
    elif choices() is None:
        warnings.warn(
            "this llama-cpp-python has an older series of gemma-mtp's patches, and drafts are of a fixed length. "
            "`gemma-mtp build` installs the current one.",
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


class DraftParams(ctypes.Structure):
    """llama_mtp_draft_params of our include/llama-mtp.h, where the fields are explained."""

    _fields_ = (
        ("n_max", ctypes.c_int32),
        ("p_min", ctypes.c_float),
        ("temp", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("seed", ctypes.c_uint64),
    )


class DraftOffer(ctypes.Structure):
    """llama_mtp_offer of our include/llama-mtp.h."""

    _fields_ = (
        ("seq_id", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("n_max", ctypes.c_int32),
        ("free", ctypes.c_bool),
    )


_P, _I, _D = ctypes.c_void_p, ctypes.c_int32, ctypes.c_double
# What chooses drafts, in our include/llama-mtp.h: the results and the arguments.
CHOICES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_mtp_costs_init": (_P, (_I,)),
    "llama_mtp_costs_free": (None, (_P,)),
    "llama_mtp_costs_observe": (None, (_P, _I, _D)),
    "llama_mtp_costs_seen": (_I, (_P, _I)),
    "llama_mtp_costs_seconds": (_D, (_P, _I)),
    "llama_mtp_costs_get": (None, (_P, _P, _P, _P)),
    "llama_mtp_costs_set": (None, (_P, _P, _P, _D)),
    "llama_mtp_policy_init": (_P, (_P, _I, _I)),
    "llama_mtp_policy_free": (None, (_P,)),
    "llama_mtp_policy_choose": (None, (_P, _P, _I, _I, _I, _P)),
    "llama_mtp_policy_observe": (None, (_P, _I, _I, _I, _I, _I)),
    "llama_mtp_lookup_init": (_P, ()),
    "llama_mtp_lookup_free": (None, (_P,)),
    "llama_mtp_lookup_extend": (None, (_P, _P, _I)),
    "llama_mtp_lookup_find": (_I, (_P, _I, _P, _P)),
}
# How a pass over several sequences has their rows, enum llama_mtp_rows there.
ROWS_ANY, ROWS_EQUAL, ROWS_PADDED = range(3)
NO_CHOICES = "this libllama does not choose drafts: `gemma-mtp build` installs one that does"


@functools.cache
def choices() -> Any:
    """The loaded libllama, if it has what chooses drafts (`CHOICES`), ready to be called; None without."""
    if not all(hasattr(lib._lib, name) for name in CHOICES):
        return None
    for name, (result, arguments) in CHOICES.items():
        function = getattr(lib._lib, name)
        function.restype, function.argtypes = result, arguments
    return lib._lib


@functools.cache
def _llama_mtp_draft() -> Any:
    """The function of our include/llama-mtp.h that drafts a round; None where libllama lacks it."""
    function = getattr(lib._lib, "llama_mtp_draft", None)
    if function is not None:
        function.restype, function.argtypes = _I, (_P, DraftParams, _I, _I, _P, _I, _P, _P)
    return function


def drafts_rounds() -> bool:
    """Whether libllama has `llama_mtp_draft`, which `draft_round` calls."""
    return _llama_mtp_draft() is not None


def draft_round(ctx: Any, params: DraftParams, token: int, hidden: Floats, position: int, sequence: int = 0) -> Ids:
    """Draft up to `params.n_max` tokens of a sequence in one call; the other arguments are those of Drafter.draft.

    Returns:
        The token ids, shape [drafted].

    Raises:
        RuntimeError: llama_decode refused.
    """
    tokens = np.empty(params.n_max, np.int32)
    row = np.ascontiguousarray(hidden, np.float32)
    count = _llama_mtp_draft()(ctx, params, sequence, token, row.ctypes.data, position, tokens.ctypes.data, None)
    if count < 0:
        raise RuntimeError(f"llama_decode of the drafter returned {count}")
    return tokens[:count]


@functools.cache
def _mtp(name: str, restype: Any, *argtypes: Any) -> Any:
    """Another function of our include/llama-mtp.h; None where libllama lacks it."""
    function = getattr(lib._lib, name, None)
    if function is not None:
        function.restype, function.argtypes = restype, argtypes
    return function


def noise_stage(seed: int) -> Any:
    """A llama_sampler that draws with our noise, to be added to a chain; None where libllama lacks it."""
    function = _mtp("llama_mtp_sampler_init_noise", lib.llama_sampler_p_ctypes, ctypes.c_uint64)
    return None if function is None else function(seed)


def set_noise_position(chain: Any, position: int) -> bool:
    """Tell a chain where the token to be drawn stands; False for one without a `noise_stage`."""
    function = _mtp("llama_mtp_sampler_set_pos", ctypes.c_bool, _P, _I)
    return function is not None and bool(function(chain, position))


def _of_grammars(name: str, restype: Any, *argtypes: Any) -> Iterator[Any]:
    """A question to a sampler of a grammar: as llama.cpp has these, and as libllama-common has those of chats."""
    if (function := _mtp(f"llama_mtp_grammar_{name}", restype, *argtypes)) is not None:
        yield function
    if (known := chat_native.functions()) is not None:
        yield known[f"grammar_{name}"]


def grammar_allows(sampler: Any, n_vocab: int) -> npt.NDArray[np.bool_] | None:
    """Whether a grammar's sampler allows each token next, shape [n_vocab]; None where libllama cannot tell at once."""
    words = np.zeros((n_vocab + 63) // 64, np.uint64)
    if not any(function(sampler, words.ctypes.data) for function in _of_grammars("allowed", ctypes.c_bool, _P, _P)):
        return None
    return np.unpackbits(words.view(np.uint8), count=n_vocab, bitorder="little").view(np.bool_)


def grammar_forces(sampler: Any) -> int | None:
    """The only token that it allows next, not counting those that spell a byte, if libllama can tell."""
    tokens = (int(function(sampler)) for function in _of_grammars("forced", _I, _P))
    return next((token for token in tokens if token != lib.LLAMA_TOKEN_NULL), None)


def allow_drafts(ctx: Any, sequence: int, legal: npt.NDArray[np.bool_] | None) -> None:
    """Have a drafter's ordered head read only clusters that hold a legal token, None for all, until told otherwise.

    Args:
        ctx: the drafter's context; one with a dense head reads all tokens anyway.
        sequence: whose drafts.
        legal: whether each token may come next, shape [n_vocab].
    """
    function = _mtp("llama_mtp_set_allowed", None, _P, _I, _P)
    if function is None:
        return
    words = None if legal is None else np.packbits(np.pad(legal, (0, -len(legal) % 64)), bitorder="little")
    function(ctx, sequence, None if words is None else words.ctypes.data)


class DraftBatch:
    """A llama_batch of one entry with a token and a hidden row, which llama_batch_init cannot make.

    Args:
        width: length of the hidden row, the target's embedding length.
        sequence: whose token it is.
    """

    def __init__(self, width: int, sequence: int = 0) -> None:
        self.hidden = np.zeros(width, dtype=np.float32)
        self._token = (lib.llama_token * 1)()
        self._position = (lib.llama_pos * 1)()
        self._sequences = (lib.llama_seq_id * 1)(sequence)
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
