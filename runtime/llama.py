"""llama_cpp.Llama with a drafter: the API, no algorithm."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from os import PathLike, fspath
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import loop, native, sampling
from gemma_mtp.runtime.drafter import Drafter, DraftSettings, attached
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.pair import Wanted, resolve
from gemma_mtp.runtime.stats import Stats
from llama_cpp._utils import suppress_stdout_stderr


class Llama(llama_cpp.Llama):
    """Drop-in `llama_cpp.Llama` that generates with the drafter linked to its target.

    Tokens for a seed do not depend on whether, how far or with what was drafted (but for near-ties that floating point
    decides otherwise in batches of another size). They differ from stock llama_cpp.Llama's for the same seed at a
    temperature, as the random numbers are drawn otherwise; the distribution is the same.

    Args:
        model_path: GGUF file of the target.
        drafter: "auto" (the default) takes the linked drafter in the same folder, if there is one; a path names it;
            None turns multi-token prediction off.
        draft_length: tokens to draft in a round.
        options: everything llama_cpp.Llama takes.

    Attributes:
        stats: counters of the latest request.
        total_stats: counters of all requests.

    Raises:
        gemma_mtp.convert.link.MtpError: a file is damaged, or the drafter is not the target's.
        ValueError: as llama_cpp.Llama, for instance when model_path does not exist; or draft_length is negative.
    """

    # Set by llama_cpp.Llama: how many tokens the KV cache holds, and which they are, [n_ctx].
    n_tokens: int
    input_ids: npt.NDArray[np.intc]

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        drafter: Wanted = "auto",
        draft_length: int = 3,
        **options: Any,
    ) -> None:
        self._stack = ExitStack()  # for close() and __del__, should what follows raise
        if draft_length < 0:
            raise ValueError(f"draft_length is {draft_length}; it counts tokens, 0 drafts none.")
        self.stats = Stats()
        self.total_stats = Stats()
        self.draft_length = draft_length
        self.drafter: Drafter | None = None
        self._wanted = drafter
        self._told: set[str] = set()
        path = resolve(model_path, drafter)
        # llama.cpp reports the sizes of its caches as warnings, which stock Llama shows even when told to be quiet.
        with suppress_stdout_stderr(disable=options.get("verbose", True)):
            super().__init__(fspath(model_path), **options)
        if len(self.input_ids) < self._n_ctx:
            # llama.cpp rounds n_ctx up, to 256 at least; stock Llama has no room for the tokens beyond the n_ctx given.
            self.input_ids = np.ndarray((self._n_ctx,), dtype=np.intc)
            if self._logits_all:
                self.scores = np.ndarray((self._n_ctx, self._n_vocab), dtype=np.single)
        if path is not None and (reason := self._cannot_draft()):
            self._tell(reason)
        elif path is not None:
            native.notice_unpatched()
            self.drafter = self._stack.enter_context(attached(self, path))
            self._stack.callback(self._forget_drafter)

    def _cannot_draft(self) -> str | None:
        """Why a drafter cannot work with the arguments given, or None."""
        if self.draft_model is not None:
            return "draft_model was given: it drafts, and the MTP drafter is not loaded"
        if self.context_params.embeddings:
            return "embedding=True: nothing is generated, so the MTP drafter is not loaded"
        if not self.context_params.swa_full:
            return "swa_full=False drops keys that a rejected draft needs again: the MTP drafter is not loaded"
        return None

    def _forget_drafter(self) -> None:
        self.drafter = None

    def _tell(self, reason: str) -> None:
        """Say once per object why a request runs without MTP."""
        if reason not in self._told:
            self._told.add(reason)
            print(f"gemma-mtp: {reason}.", file=sys.stderr)

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens from a prompt; arguments and behaviour are llama_cpp.Llama.generate's."""
        settings: dict[str, Any] = {
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "temp": temp,
            "repeat_penalty": repeat_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "penalize_nl": penalize_nl,
        }
        constraints = {"logits_processor": logits_processor, "grammar": grammar}
        if self.draft_model is not None or (mirostat_mode != 0 and temp > 0):
            if mirostat_mode != 0:
                self._tell("mirostat draws its own random numbers: this request runs without MTP")
            yield from super().generate(
                tokens, reset=reset, stopping_criteria=stopping_criteria, **settings, **constraints
            )
            return

        def stop(row: int) -> bool:
            return stopping_criteria is not None and bool(stopping_criteria(self._input_ids, self.logits(row)))

        self.stats = Stats()
        try:
            yield from loop.generate(
                self,
                self._reuse_prefix(list(tokens), reset),
                self._choice(settings, constraints),
                DraftSettings.of(settings, self._seed)
                or self._choice(
                    settings | {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}, {}
                ),
                self.draft_length,
                stop,
                self.stats,
            )
        finally:
            self.total_stats.add(self.stats)

    def _choice(self, settings: dict[str, Any], constraints: dict[str, Any]) -> sampling.Choose:
        """The token at a position under these settings: llama.cpp's sampler chain, with our noise for its draw."""
        penalties = (settings["repeat_penalty"], settings["frequency_penalty"], settings["presence_penalty"])
        free = penalties == (1.0, 0.0, 0.0) and not any(constraints.values())
        if settings["temp"] == 0.0 and free:
            return sampling.argmax
        chain = sampling.without_draw(self._init_sampler(**settings, **constraints))
        choice = sampling.ChainChoice(chain, self._n_vocab, None if settings["temp"] == 0.0 else self._seed)
        if free:
            return choice

        def accepting(logits: Floats, position: int) -> int:
            token = choice(logits, position)
            choice.accept(token)
            return token

        return accepting

    def _reuse_prefix(self, tokens: list[int], reset: bool) -> list[int]:
        """Keep what the KV cache shares with a prompt; returns the tokens left to decode, at least one.

        Raises:
            ValueError: there is nothing to go on from, or the prompt does not fit the context.
        """
        keep = self.n_tokens
        if reset:
            pairs = zip(self._input_ids.tolist(), tokens, strict=False)
            keep = next((i for i, (old, new) in enumerate(pairs) if old != new), min(self.n_tokens, len(tokens)))
        else:
            tokens = [*self._input_ids.tolist(), *tokens]
        if not tokens:
            raise ValueError("the prompt is empty; pass at least one token, for instance the BOS token.")
        if len(tokens) > self._n_ctx:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {self._n_ctx}; raise n_ctx.")
        # The last token is always decoded, for its logits and its hidden row.
        keep = min(keep, len(tokens) - 1)
        if keep and not self._ctx.kv_cache_seq_rm(-1, keep, -1):
            keep = 0
        if keep == 0:
            self.reset()
        self.n_tokens = keep
        return tokens[keep:]

    def decode(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        """Decode tokens and a draft after them; afterwards `n_tokens` counts the tokens, not the draft.

        Returns:
            The batch row of the last token; the rows of the draft follow it.

        Raises:
            RuntimeError: the context is full, or llama.cpp could not decode.
        """
        past = self.n_tokens
        if past + len(tokens) > self._n_ctx:
            raise RuntimeError(
                f"the context of {self._n_ctx} tokens is full; pass a larger n_ctx, or a shorter prompt or max_tokens."
            )
        if not draft:
            self.eval(tokens)
            return int((len(tokens) - 1) % self.n_batch)
        batch = [*tokens, *draft]
        self._ctx.kv_cache_seq_rm(-1, past, -1)
        self._batch.set_batch(batch=batch, n_past=past, logits_all=True)
        self._ctx.decode(self._batch)
        self.input_ids[past : past + len(batch)] = batch
        if self._logits_all:
            self.scores[past : past + len(batch)] = [self.logits(row) for row in range(len(batch))]
        self.n_tokens = past + len(tokens)
        return len(tokens) - 1

    def roll_back(self) -> None:
        """Cut the KV cache to `n_tokens`; what the last decode left is then no longer that of the last token."""
        self._requires_eval = True
        if self._ctx.ctx is not None:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)

    def logits(self, row: int) -> Floats:
        """Logits of a row of the last batch, shape [n_vocab]; a view, valid until the next decode."""
        return native.logits_row(self.ctx, row, self._n_vocab)

    def hidden(self, row: int) -> Floats:
        """The target's hidden state of a row of the last batch, shape [n_embd]; only with a drafter."""
        return native.hidden_row(self.ctx, row, self.n_embd())

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"drafter": self._wanted, "draft_length": self.draft_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
