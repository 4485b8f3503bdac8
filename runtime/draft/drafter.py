"""The drafter beside its target: loading it over the target's KV cache, and one round of drafting."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
from gemma_mtp.convert.link import DRAFTER_ARCH
from gemma_mtp.runtime import devices, native
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.draft.source import Draft, DraftSource, Proposal, Start
from gemma_mtp.runtime.grammar import Mask
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import MASK, Choose, NoTokenLeft, Sampler, with_noise
from gemma_mtp.runtime.target import Target
from llama_cpp import _internals as internals
from llama_cpp import llama_cpp as lib
from llama_cpp._utils import suppress_stdout_stderr


@dataclass(frozen=True)
class DraftSettings:
    """How the drafter chooses, for `Drafter.draft`: with these a round is one native call where our patches are.

    A `Choose` in itself, which makes the same choices in Python.

    Attributes:
        temp: 0 for the most likely token; else logits are truncated, divided by it, and given the noise of `seed`.
        top_k: tokens kept, 0 for all.
        top_p: probability mass kept, 1 for all.
        min_p: tokens kept by their probability relative to the highest, 0 for all.
        seed: of the noise, the target's own.
    """

    temp: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, request: Mapping[str, Any], seed: int) -> DraftSettings | None:
        """The settings for a request's sampling arguments, named as in llama_cpp; None if it has others that matter."""
        if request["typical_p"] != 1.0 or request["mirostat_mode"] != 0:
            return None
        if request["temp"] < 0.0:  # llama_cpp draws from all tokens then, at temperature 1
            return cls(temp=1.0, seed=seed)
        return cls(request["temp"], max(request["top_k"], 0), request["top_p"], request["min_p"], seed)

    def __call__(self, logits: Floats, position: int) -> int:
        """The same choice in Python, for a libllama without `llama_mtp_draft`."""
        return _choice(self, len(logits))(logits, position)

    def params(self, length: int) -> native.DraftParams:
        """As libllama takes them, for a round of `length` tokens."""
        return native.DraftParams(length, 0.0, self.temp, self.top_k, self.top_p, self.min_p, self.seed & MASK)


@functools.lru_cache(maxsize=4)
def _choice(settings: DraftSettings, n_vocab: int) -> Choose:
    chain = internals.LlamaSampler()
    chain.add_top_k(settings.top_k)
    chain.add_top_p(settings.top_p, 1)
    chain.add_min_p(settings.min_p, 1)
    chain.add_temp(settings.temp)
    if settings.temp == 0.0:
        return Sampler(chain, n_vocab, seed=None, keep=1)
    with_noise(chain, settings.seed)
    return Sampler(chain, n_vocab, settings.seed, keep=settings.top_k if 0 < settings.top_k < n_vocab else None)


class Drafter:
    """A drafter context that reads the KV cache of its target's context.

    Args:
        ctx: the drafter's llama_context, made with `ctx_other` set to the target's.
        n_vocab: vocabulary size of both.
        width: the target's embedding length, that of the hidden rows.
        sequence: which of the target's it drafts for.
    """

    def __init__(self, ctx: Any, n_vocab: int, width: int, sequence: int = 0) -> None:
        self.ctx = ctx
        self.n_vocab = n_vocab
        self.width = width
        self.sequence = sequence
        self._batch = native.DraftBatch(width, sequence)

    def allow(self, mask: Mask | None) -> None:
        """Let an ordered head pass over clusters without a token that a grammar allows now; None to read any again."""
        native.allow_drafts(self.ctx, self.sequence, None if mask is None else mask.legal())

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
            choose: `DraftSettings`, or whatever picks a token from the drafter's logits [n_vocab] for the position the
                token will stand at. The logits of an ordered head are -inf but for its candidates.

        Returns:
            Token ids, `length` of them.

        Raises:
            RuntimeError: llama.cpp refused to decode.
        """
        if isinstance(choose, DraftSettings) and native.drafts_rounds():
            params = choose.params(length)
            made: list[int] = native.draft_round(self.ctx, params, token, hidden, position, self.sequence).tolist()
            return made
        made = []
        for step in range(1, length + 1):
            self._batch.decode(self.ctx, token, hidden, position)
            token = choose(native.logits_row(self.ctx, 0, self.n_vocab), position + step)
            hidden = native.hidden_row(self.ctx, 0, self.width)
            made.append(token)
        return made


class Drafting(Protocol):
    """What `FromDrafter` asks of a drafter."""

    def allow(self, mask: Mask | None) -> None:
        """As `Drafter.allow`."""

    def draft(self, token: int, hidden: Floats, position: int, length: int, choose: Choose) -> list[int]:
        """As `Drafter.draft`."""


class EndOfDraft(Exception):
    """Raised by a choice in mid-draft: there is no use in drafting on."""


class FromDrafter(DraftSource):
    """Asks the drafter, which reads what the grammar forced before it goes on from there.

    Args:
        target: whose hidden row the round starts from.
        drafter: its drafter.
        costs: where draft steps are noted.
        settings: how the request chooses, if that is a matter of logits and position alone: a round is one call then.
    """

    NAME = "mtp"

    def __init__(self, target: Target, drafter: Drafting, costs: Costs, settings: DraftSettings | None) -> None:
        self.drafter = drafter
        self._target, self._costs, self._settings = target, costs, settings

    def propose(self, start: Start, draft: Draft, room: int) -> Proposal:
        """As many tokens as there is room for."""
        return Proposal(self.NAME, room, partial(self._take, start, draft))

    def learn(self, draft: Draft, accepted: int) -> None:
        """Note what a step took."""
        del accepted
        if draft.steps:
            self._costs.observe(STEP, draft.seconds / draft.steps)

    def _take(self, start: Start, draft: Draft, length: int) -> None:
        forced, hidden, position = list(draft.tokens), self._target.hidden(start.row), self._target.n_tokens
        mask = start.sampler.mask

        def choose(logits: Floats, position: int) -> int:
            draft.steps += 1
            if draft.steps <= len(forced):
                return forced[draft.steps - 1]
            try:
                made = start.sampler(logits, position)
            except NoTokenLeft:
                raise EndOfDraft from None
            draft.add(made, self.NAME)
            if self._target.ends(made):
                raise EndOfDraft
            if mask is not None and draft.steps < len(forced) + length:
                self.drafter.allow(mask)
            return made

        if self._settings is not None and not forced:
            for made in self.drafter.draft(start.token, hidden, position, length, self._settings):
                draft.steps += 1
                draft.add(made, self.NAME)
            return
        if mask is not None:
            self.drafter.allow(mask)
        try:
            with suppress(EndOfDraft):
                self.drafter.draft(start.token, hidden, position, len(forced) + length, choose)
        finally:
            if mask is not None:
                self.drafter.allow(None)


@contextmanager
def attached(target: llama_cpp.Llama, path: Path) -> Iterator[Drafter]:
    """Load a drafter over a loaded target and have the target keep hidden rows; frees context, then model.

    Raises:
        RuntimeError: llama.cpp cannot load the file or make the context.
    """
    with closing(load_model(target, path)) as model:
        params = copied(target.context_params)
        params.n_ctx, params.embeddings = target.n_ctx(), False
        with context(model.model, params, target.ctx, target.verbose) as ctx:
            yield Drafter(ctx, target.n_vocab(), target.n_embd())


def copied(params: Any) -> Any:
    """A copy of llama_context_params."""
    made = lib.llama_context_params()
    ctypes.memmove(ctypes.byref(made), ctypes.byref(params), ctypes.sizeof(made))
    return made


@contextmanager
def context(model: Any, params: Any, target: Any, verbose: bool) -> Iterator[Any]:
    """A drafter's context over a target's, for a block; both keep hidden rows.

    Args:
        model: the drafter's llama_model.
        params: llama_context_params that the target's context was made with.
        target: its llama_context.
        verbose: whether llama.cpp may say what it says.

    Raises:
        RuntimeError: llama.cpp cannot make it.
    """
    params = copied(params)
    params.ctx_type, params.ctx_other = lib.LLAMA_CONTEXT_TYPE_MTP, target
    # One token a step: the compute buffer would otherwise hold n_ubatch rows of vocabulary size. llama.cpp asserts one
    # for each sequence that the target's context allows.
    params.n_batch = params.n_ubatch = max(1, params.n_seq_max)
    params.n_outputs_max = 0
    with suppress_stdout_stderr(disable=verbose):
        ctx = lib.llama_init_from_model(model, params)
    if not ctx:
        raise RuntimeError("llama.cpp could not make a context for the drafter; verbose=True shows why")
    try:
        native.expose_hidden_rows(target, every_token=True)
        native.expose_hidden_rows(ctx, every_token=False)
        yield ctx
    finally:
        lib.llama_free(ctx)


def metadata(target: llama_cpp.Llama) -> dict[str, int | str]:
    """What is read in place of a drafter's own metadata.

    The target does the tokenizing: a second vocabulary would take longer to load than the drafter, and more memory.
    """
    return {"tokenizer.ggml.model": "none", f"{DRAFTER_ARCH}.vocab_size": target.n_vocab()}


def load_model(target: llama_cpp.Llama, path: Path) -> Any:
    """The drafter's model, without its vocabulary: beside the KV cache that it reads, mapped as its target is."""
    params = lib.llama_model_default_params()
    for name in ("n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "load_mode"):
        setattr(params, name, getattr(target.model_params, name))
    beside = devices.drafter_devices(target.model) if params.split_mode == lib.LLAMA_SPLIT_MODE_LAYER else None
    params.devices = target.model_params.devices if beside is None else ctypes.addressof(beside)
    keys = metadata(target)
    overrides = (lib.llama_model_kv_override * (len(keys) + 1))()
    for override, (key, value) in zip(overrides, keys.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            override.tag, override.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    params.kv_overrides = overrides
    try:
        return internals.LlamaModel(path_model=str(path), params=params, verbose=target.verbose)
    except ValueError as problem:
        raise RuntimeError(f"llama.cpp could not load the drafter {path}; verbose=True shows why") from problem
