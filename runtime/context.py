"""The target's KV cache: decoded into, rolled back, cut, reused for the next prompt, saved and restored."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import native
from gemma_mtp.runtime.faults import CLOSED, FORKED, explain_decode
from gemma_mtp.runtime.guard import Guard, exclusive
from gemma_mtp.runtime.interrupt import aborting, interruptible
from gemma_mtp.runtime.native import Floats
from llama_cpp import llama_cpp as lib

Stock = llama_cpp.Llama
LONG = 32  # tokens from which on a decode can be interrupted in its middle


class Seen(Protocol):
    """An image or a sound within a prompt.

    Attributes:
        length: positions it takes.
    """

    @property
    def length(self) -> int: ...

    def decode(self, ctx: Any, past: int, n_batch: int) -> None:
        """Put it into the KV cache of a llama_context behind `past` positions.

        Raises:
            RuntimeError: llama.cpp could not.
        """


class Context(llama_cpp.Llama):
    """llama_cpp.Llama with a KV cache that may run ahead of its tokens, by a draft: a `Target`.

    What the cache holds stands in stock's own attributes and nowhere else, for stock's methods read and write them too.

    Attributes:
        n_tokens: tokens of the sequence.
        input_ids: which they are, shape [n_ctx]; ids below zero stand for an image or a sound.
        scores: all their logits with logits_all, shape [n_ctx, n_vocab]; else a single row that nobody reads.
        guard: lets one thread in at a time; `guard.patience` is how many seconds others wait.
        pid: of the process that loaded it.
    """

    n_tokens: int
    n_batch: int
    input_ids: npt.NDArray[np.intc]
    scores: npt.NDArray[np.single]
    guard: Guard
    pid: int
    _ctx: Any
    _media: Mapping[int, Seen] = {}  # of the prompt that runs, by their first positions

    def fit_arrays(self) -> None:
        """Arrays as long as the context that llama.cpp made, in place of stock's.

        llama.cpp rounds n_ctx up, to 256 at least, and stock has no room for the tokens beyond the n_ctx given. Without
        logits_all stock keeps n_batch rows of scores and never writes them; a single one serves the same callers (512
        rows are 512 MiB for Gemma 4, in every saved state).
        """
        self.input_ids = np.full(self._n_ctx, -1, dtype=np.intc)
        rows = self._n_ctx if self._logits_all else 1
        self.scores = np.zeros((rows, self._n_vocab), dtype=np.single)

    def check_open(self) -> None:
        """Raise RuntimeError if there is nothing to run.

        The model was freed, or shall be by a `close` in another thread; or it was loaded without weights, or before a
        fork, after which the threads that compute are missing.
        """
        if self.guard.ending or self._ctx.ctx is None:
            raise RuntimeError(CLOSED)
        if os.getpid() != self.pid:
            raise RuntimeError(FORKED)
        if self._ctx.memory is None:
            raise RuntimeError("this Llama was loaded with vocab_only=True and has no weights; load it without.")

    def decode(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        """As `Target.decode`."""
        self.check_open()
        past = self.n_tokens
        if not draft:
            self.eval(tokens)
            text = next((i for i, token in enumerate(reversed(tokens)) if token < 0), len(tokens))
            return int((text - 1) % self.n_batch)
        self._check_room(len(tokens))
        batch = [*tokens, *draft]
        self._ctx.kv_cache_seq_rm(-1, past, -1)
        self._batch.set_batch(batch=batch, n_past=past, logits_all=True)
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as problem:
            self.roll_back()
            raise explain_decode(problem) from problem
        self.input_ids[past : past + len(batch)] = batch
        if self._logits_all:
            self.scores[past : past + len(batch)] = [self.logits(row) for row in range(len(batch))]
        self.n_tokens = past + len(tokens)
        return len(tokens) - 1

    @exclusive
    def eval(self, tokens: Any) -> None:
        """Decode tokens, and images and sounds of the prompt where ids are below zero; if it fails, nothing changes.

        Raises:
            RuntimeError: they do not fit the context, or llama.cpp could not decode them.
        """
        before = self.n_tokens
        self._check_room(len(tokens))
        try:
            if len(tokens) < LONG:
                self._eval(tokens)
            else:
                with interruptible(lambda: self.guard.ending) as ended, aborting(self.ctx, ended):
                    self._eval(tokens)
        except BaseException as problem:
            self.n_tokens = before
            self.roll_back()
            if isinstance(problem, RuntimeError):
                raise RuntimeError(CLOSED) if self.guard.ending else explain_decode(problem) from problem
            raise

    def _eval(self, tokens: Any) -> None:
        """As stock's `eval`, which knows text alone."""
        begin, end = self.n_tokens, self.n_tokens + len(tokens)
        for place in sorted(place for place in self._media if begin <= place < end):
            super().eval(tokens[self.n_tokens - begin : place - begin])
            length = self._media[place].length
            self._media[place].decode(self.ctx, place, self.n_batch)
            self.input_ids[place : place + length] = tokens[place - begin :][:length]
            self.n_tokens += length
        super().eval(tokens[self.n_tokens - begin :])

    def read(self, tokens: list[int]) -> None:
        """Decode a prompt, all of it; what the KV cache shares with it is kept.

        Raises:
            ValueError: as `reuse_prefix`.
            RuntimeError: as `eval`.
        """
        self.eval(self.reuse_prefix(tokens))

    def _check_room(self, count: int) -> None:
        if self.n_tokens + count > self._n_ctx:
            raise RuntimeError(
                f"the context of {self._n_ctx} tokens is full; pass a larger n_ctx, or a shorter prompt or max_tokens."
            )

    def roll_back(self) -> None:
        """As `Target.roll_back`; what the last decode left is then no longer that of the last token."""
        self._requires_eval = True
        if self._ctx.ctx is not None:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)

    def logits(self, row: int) -> Floats:
        """As `Target.logits`; a view, valid until the next decode."""
        return native.logits_row(self.ctx, row, self._n_vocab)

    def hidden(self, row: int) -> Floats:
        """As `Target.hidden`; only with a drafter."""
        return native.hidden_row(self.ctx, row, self.n_embd())

    def ends(self, token: int) -> bool:
        """As `Target.ends`."""
        return bool(lib.llama_vocab_is_eog(self._model.vocab, token))

    def chosen_from(self, position: int) -> Floats:
        """The logits from which stock's own loop has just chosen the token at a position, shape [n_vocab]."""
        # With a draft_model, which sets logits_all, that row is not always the last of the batch.
        return self.scores[position - 1] if self._logits_all else self.logits(-1)

    @exclusive
    def reset(self) -> None:
        """Forget all tokens.

        An id that no token has, and no other prompt, marks the positions then: an image puts embeddings there, and what
        an earlier prompt left would make a later one believe that it shares them.
        """
        super().reset()
        self.input_ids[:] = -1 - secrets.randbelow(2**31 - 1)

    def reuse_prefix(self, tokens: list[int]) -> list[int]:
        """Cut the KV cache to what it shares with a prompt; returns the tokens left to decode, at least one.

        Raises:
            ValueError: the prompt is empty, does not fit the context, or holds an image that the KV cache does not.
        """
        if not tokens:
            raise ValueError("the prompt is empty; pass at least one token, for instance the BOS token.")
        if len(tokens) > self._n_ctx:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {self._n_ctx}; raise n_ctx.")
        if tokens[-1] < 0:
            raise ValueError("the prompt ends with an image or a sound; put text after it.")
        # The last token is always decoded, for its logits and its hidden row.
        keep = min(self._shared_with(tokens), len(tokens) - 1)
        # An image is there as a whole, or not at all.
        keep = next((at for at, each in self._media.items() if at < keep < at + each.length), keep)
        if not self._can_cut(keep):
            keep = 0
        if not self._media and min(tokens[keep:]) < 0:
            raise ValueError(
                "the image or the sound of this prompt is gone from the KV cache; ask through the chat handler again."
            )
        if keep == 0 or not self._ctx.kv_cache_seq_rm(-1, keep, -1):
            keep = 0
            self.reset()
        self.n_tokens = keep
        return tokens[keep:]

    def can_reuse(self, tokens: list[int]) -> bool:
        """Whether what the KV cache shares with a prompt is all there; stock takes that for granted."""
        return self._can_cut(self._shared_with(tokens))

    def _shared_with(self, tokens: list[int]) -> int:
        """How many tokens of a prompt the KV cache begins with."""
        pairs = zip(self._input_ids.tolist(), tokens, strict=False)
        return next((i for i, (old, new) in enumerate(pairs) if old != new), min(self.n_tokens, len(tokens)))

    def _can_cut(self, keep: int) -> bool:
        """Whether the KV cache can go on after `keep` tokens: with swa_full=False it forgets keys out of the window."""
        if self.context_params.swa_full or keep == 0:
            return True
        first = lib.llama_memory_seq_pos_min(self._ctx.memory, 0)
        return bool(0 <= first <= max(0, keep - lib.llama_model_n_swa(self._model.model)))

    save_state = exclusive(Stock.save_state)

    @exclusive
    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Go on from a saved state, of this class or of stock's.

        Raises:
            ValueError: it holds more tokens than this context.
            RuntimeError: llama.cpp refuses it; the object is empty then.
        """
        if state.n_tokens > self._n_ctx:
            raise ValueError(f"the state holds {state.n_tokens} tokens, the context {self._n_ctx}; raise n_ctx.")
        fitted = copy.copy(state)
        rows = min(state.n_tokens, len(self.scores))
        fits = len(state.scores) == rows
        fitted.scores = state.scores if fits else np.zeros((rows, self._n_vocab), dtype=np.single)
        fitted.input_ids = self.input_ids.copy()
        fitted.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        try:
            super().load_state(fitted)
        except RuntimeError as problem:
            self._ctx.kv_cache_clear()
            self.reset()
            raise RuntimeError(f"{problem}: it is of another model, or of other context settings.") from problem
