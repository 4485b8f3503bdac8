"""The drafter beside its target: loading it over the target's KV cache, and one round of drafting."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from gemma_mtp.runtime import native
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import Choose
from llama_cpp import _internals as internals
from llama_cpp import llama_cpp as lib
from llama_cpp._utils import suppress_stdout_stderr


class Drafter:
    """A drafter context that reads the KV cache of its target's context.

    Args:
        ctx: the drafter's llama_context, made with `ctx_other` set to the target's.
        n_vocab: vocabulary size of both.
        width: the target's embedding length, that of the hidden rows.
    """

    def __init__(self, ctx: Any, n_vocab: int, width: int) -> None:
        self.ctx = ctx
        self.n_vocab = n_vocab
        self.width = width
        self._batch = native.DraftBatch(width)

    def draft(self, token: int, hidden: Floats, position: int, length: int, choose: Choose) -> list[int]:
        """Guess the tokens that follow `token`.

        Each step reads the last token and a hidden row, first the target's, then the drafter's own. The position is
        that of `token`, the first one not in the KV cache, and stays the same for the whole round, as in transformers'
        SinglePositionMultiTokenCandidateGenerator and in llama.cpp's common/speculative.cpp.

        Args:
            token: the last token of the sequence, not decoded by the target yet.
            hidden: the target's hidden row of the token before it, shape [width].
            position: the position of `token`.
            length: how many tokens to draft.
            choose: picks a token from the drafter's logits [n_vocab] for the position the token will stand at.

        Returns:
            `length` token ids.

        Raises:
            RuntimeError: llama.cpp refused to decode.
        """
        drafted: list[int] = []
        for step in range(1, length + 1):
            self._batch.decode(self.ctx, token, hidden, position)
            token = choose(native.logits_row(self.ctx, 0, self.n_vocab), position + step)
            hidden = native.hidden_row(self.ctx, 0, self.width)
            drafted.append(token)
        return drafted


@contextmanager
def attached(target: llama_cpp.Llama, path: Path) -> Iterator[Drafter]:
    """Load a drafter over a loaded target and have the target keep hidden rows; frees context, then model.

    Raises:
        RuntimeError: llama.cpp cannot load the file or make the context.
    """
    with closing(load_model(target, path)) as model:
        params = lib.llama_context_params()
        ctypes.memmove(ctypes.byref(params), ctypes.byref(target.context_params), ctypes.sizeof(params))
        params.ctx_type, params.ctx_other = lib.LLAMA_CONTEXT_TYPE_MTP, target.ctx
        params.n_ctx, params.embeddings = target.n_ctx(), False
        # One token a step: the compute buffer would otherwise hold n_ubatch rows of vocabulary size. llama.cpp asserts
        # one for each sequence that the target's context allows.
        params.n_batch = params.n_ubatch = max(1, params.n_seq_max)
        with suppress_stdout_stderr(disable=target.verbose):
            ctx = lib.llama_init_from_model(model.model, params)
        if not ctx:
            raise RuntimeError(f"llama.cpp could not make a drafter context for {path}; verbose=True shows why")
        try:
            native.expose_hidden_rows(target.ctx, every_token=True)
            native.expose_hidden_rows(ctx, every_token=False)
            yield Drafter(ctx, target.n_vocab(), target.n_embd())
        finally:
            lib.llama_free(ctx)


def load_model(target: llama_cpp.Llama, path: Path) -> Any:
    """The drafter's model, on the devices and with the memory mapping its target was given."""
    params = lib.llama_model_default_params()
    for name in ("n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "load_mode"):
        setattr(params, name, getattr(target.model_params, name))
    try:
        return internals.LlamaModel(path_model=str(path), params=params, verbose=target.verbose)
    except ValueError as problem:
        raise RuntimeError(f"llama.cpp could not load the drafter {path}; verbose=True shows why") from problem
