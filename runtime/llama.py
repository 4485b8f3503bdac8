"""llama_cpp.Llama with a drafter: the API, no algorithm."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Generator, Sequence
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import llama_cpp
from gemma_mtp.runtime import loop, native, sampling
from gemma_mtp.runtime.api import Api, exclusive_stream
from gemma_mtp.runtime.draft.costs import Costs, costs_path
from gemma_mtp.runtime.draft.drafter import DraftSettings, attached
from gemma_mtp.runtime.draft.length import Policy
from gemma_mtp.runtime.draft.proposals import Proposals, sources
from gemma_mtp.runtime.draft.source import Source
from gemma_mtp.runtime.faults import check_options, explain_decode, explaining_load
from gemma_mtp.runtime.grammar import Mask, Vocabulary
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.pair import Wanted, resolve
from gemma_mtp.runtime.request import MOST, DraftLength, Request, checked_length, chosen_seed
from gemma_mtp.runtime.sampling import Sampler, reading
from llama_cpp import llama_cpp as lib
from llama_cpp._utils import suppress_stdout_stderr


class Llama(Api):
    """Drop-in `llama_cpp.Llama` that generates with the drafter linked to its target.

    Tokens for a seed do not depend on whether, how far or with what was drafted (but for near-ties that floating point
    decides otherwise in batches of another size). They differ from stock llama_cpp.Llama's for the same seed at a
    temperature, as the random numbers are drawn otherwise; the distribution is the same.

    Args:
        model_path: GGUF file of the target.
        drafter: "auto" (the default) takes the linked drafter in the same folder, if there is one; a path names it;
            None turns multi-token prediction off.
        draft_length: tokens to draft in a round, 15 at most, or "auto" (the default) to go by what passes cost on this
            machine and by what is accepted: then drafts also come from the text itself, and there are none where they
            do not pay. It may be set later on.
        options: everything llama_cpp.Llama takes. flash_attn is True by default where no layer is on a GPU. Without a
            seed every request draws one, which its answer tells under "seed", and `stats`.

    Attributes:
        stats: counters of the latest request.
        total_stats: counters of all requests.

    Raises:
        gemma_mtp.convert.link.MtpError: a file is damaged, or the drafter is not the target's.
        RuntimeError: the library was built for another CPU, or llama.cpp cannot load the model.
        ValueError: as llama_cpp.Llama, for instance when model_path does not exist; or draft_length is neither a count
            nor "auto".
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        drafter: Wanted = "auto",
        draft_length: DraftLength = "auto",
        **options: Any,
    ) -> None:
        self.prepare()
        self.draft_length = draft_length
        self._wanted = drafter
        self._told: set[str] = set()
        check_options(options)
        native.check_cpu()
        if options.get("swa_full") is False:
            # A batch longer than n_ubatch may overwrite keys that its rollback needs.
            options["n_ubatch"] = max(options.get("n_ubatch", 512), MOST + 1)
        if native.patched() and not (options.get("n_gpu_layers") and native.has_gpu()):
            # On the CPU the series has attention of a few queries in this form only; stock's default is without.
            options.setdefault("flash_attn", True)
        path = resolve(model_path, drafter)
        # llama.cpp reports the sizes of its caches as warnings, which stock Llama shows even when told to be quiet.
        with suppress_stdout_stderr(disable=options.get("verbose", True)), explaining_load(options):
            super().__init__(fspath(model_path), **options)
            if self.lora_path and not self._lora_adapter:  # stock lets llama.cpp's null pointer pass
                raise RuntimeError(f"Failed to initialize LoRA adapter from lora path: {self.lora_path}")
        if options.get("seed") == 0:  # stock takes it for none
            self._seed = 0
        self.fit_arrays()
        if path is not None and (reason := self._cannot_draft()):
            self._tell(reason)
        elif path is not None:
            native.notice_unpatched()
            # Weakly, so that dropping the object frees it at once, as it does stock's.
            self.drafter = self._stack.enter_context(attached(weakref.proxy(self), path))

    def _cannot_draft(self) -> str | None:
        """Why a drafter cannot work with the arguments given, or None."""
        if self.draft_model is not None:
            return "draft_model was given: it drafts, and the MTP drafter is not loaded"
        if self.context_params.embeddings:
            return "embedding=True keeps embeddings instead of hidden rows: the MTP drafter is not loaded"
        if self.model_params.vocab_only:
            return "vocab_only=True: there are no weights, and the MTP drafter is not loaded"
        return None

    def _tell(self, reason: str) -> None:
        """Say once per object why a request runs without MTP."""
        if reason not in self._told:
            self._told.add(reason)
            print(f"gemma-mtp: {reason}.", file=sys.stderr)

    @property
    def draft_length(self) -> DraftLength:
        """Tokens to draft in a round, or "auto"; for requests that say nothing else.

        Raises:
            ValueError: on setting it to what is neither.
        """
        return self._draft_length

    @draft_length.setter
    def draft_length(self, value: Any) -> None:
        self._draft_length = checked_length(value)

    @exclusive_stream
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
        *,
        mtp: bool | None = None,
        draft_length: DraftLength | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens from a prompt; arguments and behaviour are llama_cpp.Llama.generate's, with two more.

        Args:
            tokens: the prompt; all further ones up to `grammar` as there.
            mtp: False generates without drafting.
            draft_length: tokens to draft in a round, or "auto".
        """
        request = self.request if mtp is None and draft_length is None else Request(mtp, draft_length)
        tokens = list(tokens)
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
        stopping_criteria = reading(stopping_criteria)
        kept = self.kept
        seed = chosen_seed(self._seed)
        with self.counted(seed) as stats:
            if kept is not None:
                kept.begin(self, tokens)
            if self.draft_model is not None or (mirostat_mode != 0 and temp > 0):
                if mirostat_mode != 0 and self.drafter is not None:
                    self._tell("mirostat draws its own random numbers: this request runs without MTP")
                if reset and not self._can_cut(self._shared_with(tokens)):
                    self.reset()
                source = super().generate(
                    tokens,
                    reset=reset,
                    stopping_criteria=stopping_criteria,
                    logits_processor=logits_processor,
                    grammar=grammar,
                    **settings,
                )
                yield from stats.counting(source if kept is None else kept.watching(self, source))
                return

            def stop(row: int) -> bool:
                return stopping_criteria is not None and bool(stopping_criteria(self._input_ids, self.logits(row)))

            sampler = self._choice(settings, logits_processor, grammar, seed)
            try:
                left = self._reuse_prefix(tokens, reset)
                length = request.length(self.draft_length)
                asked = self.sources(sampler, length, DraftSettings.of(settings, seed))
                proposals = Proposals(self, sampler, asked, length, self._policy, self._costs)
                choose = sampler if kept is None else kept.recording(sampler)
                yield from loop.generate(self, left, choose, proposals, stop, stats)
            finally:
                if self._costs.seen(1):
                    stats.plain_pass_seconds = max(stats.tokens - 1, 0) * self._costs.pass_seconds(1)
                self._costs.save(self._costs_path)

    def sources(self, sampler: Sampler, length: DraftLength, settings: DraftSettings | None) -> list[Source]:
        """What is asked for drafts, in this order; for a request.

        Args:
            sampler: chooses the target's tokens.
            length: tokens per draft, or "auto".
            settings: how `sampler` chooses, if arguments say it all; without processors and grammar a round of the
                drafter is then one native call.
        """
        if self.drafter is None or length == 0:
            return []
        native_round = settings if sampler.plain and native.drafts_rounds() else None
        return sources(self, self.drafter, self._costs, native_round, length)

    def _choice(self, settings: dict[str, Any], logits_processor: Any, grammar: Any, seed: int) -> Sampler:
        """What chooses tokens under these settings: llama.cpp's sampler chain, with our noise for its draw."""
        temp, top_k = settings["temp"], settings["top_k"]
        penalties = (settings["repeat_penalty"], settings["frequency_penalty"], settings["presence_penalty"])
        keep = 1 if temp == 0.0 else top_k if temp > 0.0 and 0 < top_k < self._n_vocab else None
        return Sampler(
            sampling.without_draw(self._init_sampler(**settings)),
            self._n_vocab,
            seed=None if temp == 0.0 else seed,
            keep=keep,
            penalized=0 if penalties == (1.0, 0.0, 0.0) else max(self.last_n_tokens_size, 0),
            mask=Mask.of(grammar, self._vocabulary) if grammar is not None else None,
            processors=logits_processor or (),
            input_ids=lambda: self._input_ids,
        )

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """Tokens by their first byte, for grammars."""
        return Vocabulary(self._model.vocab, self._n_vocab)

    @cached_property
    def _costs(self) -> Costs:
        """What passes and draft steps take here; from the cache, if this model has run on this machine before."""
        return Costs.load(self._costs_path, MOST + 1)

    @cached_property
    def _policy(self) -> Policy:
        return Policy(self._costs, MOST)

    @property
    def _costs_path(self) -> Path:
        settings = ("n_threads", "n_ubatch", "flash_attn_type", "type_k", "type_v", "offload_kqv")
        return costs_path(
            model=Path(self.model_path).name,
            size=self._model.size(),
            drafter=self.drafter is not None,
            layers=self.model_params.n_gpu_layers,
            libllama=(llama_cpp.__version__, native.patched()),
            **{name: str(getattr(self.context_params, name, None)) for name in settings},
        )

    def _reuse_prefix(self, tokens: list[int], reset: bool) -> list[int]:
        """Keep what the KV cache shares with a prompt; returns the tokens left to decode, at least one.

        Raises:
            ValueError: there is nothing to go on from, the prompt does not fit the context, or it holds an image that
                the KV cache does not.
        """
        keep = self.n_tokens
        if reset:
            keep = self._shared_with(tokens)
        else:
            tokens = [*self._input_ids.tolist(), *tokens]
        if not tokens:
            raise ValueError("the prompt is empty; pass at least one token, for instance the BOS token.")
        if len(tokens) > self._n_ctx:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {self._n_ctx}; raise n_ctx.")
        if tokens[-1] < 0:
            raise ValueError("the prompt ends with an image or a sound; put text after it.")
        # The last token is always decoded, for its logits and its hidden row.
        keep = min(keep, len(tokens) - 1)
        if keep and not self._can_cut(keep):
            keep = 0
        if min(tokens[keep:]) < 0:
            raise ValueError(
                "the image or the sound of this prompt is gone from the KV cache; ask through the chat handler again."
            )
        if keep == 0 or not self._ctx.kv_cache_seq_rm(-1, keep, -1):
            keep = 0
            self.reset()
        self.n_tokens = keep
        return tokens[keep:]

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

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
        return bool(lib.llama_vocab_is_eog(self._model.vocab, token))

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
