"""Several sequences in one context, each with a KV cache of its own: what one reads does not depend on the others.

llama.cpp calls such a part of the cache a stream (`kv_unified` false). A pass is then over as many rows of every
sequence, and over sequences whose numbers follow one upon the other; anything else takes it further passes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import native
from gemma_mtp.runtime.context import LONG, Context
from gemma_mtp.runtime.draft.drafter import Drafter, context, copied
from gemma_mtp.runtime.faults import explain_decode
from gemma_mtp.runtime.interrupt import aborting, interruptible
from gemma_mtp.runtime.logprobs import PROMPT_ROWS
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.request import MOST
from llama_cpp import _internals as internals
from llama_cpp import llama_cpp as lib
from llama_cpp._utils import suppress_stdout_stderr

# Copying a KV cache costs what decoding a few tokens does.
WORTH_A_COPY = 16


class Slots:
    """A context over a loaded model with room for several sequences, and for each a drafter.

    Args:
        llm: whose model it is, and whose settings; its own context is left alone.
        count: how many sequences, each with as many cells as that one.
        drafter: whose model drafts; None for none.

    Attributes:
        decoded: tokens decoded so far, without those of drafts.

    Raises:
        RuntimeError: llama.cpp cannot make the context.
    """

    def __init__(self, llm: Context, count: int, drafter: Drafter | None) -> None:
        self.llm, self.n_ctx, self.n_batch = llm, int(llm.n_ctx()), llm.n_batch
        self.n_vocab, self.width = llm.n_vocab(), llm.n_embd()
        self.decoded = 0
        self._swa_full, self._window = bool(llm.context_params.swa_full), lib.llama_model_n_swa(llm.model)
        params = copied(llm.context_params)
        rows = count * (MOST + 1)
        params.n_ctx, params.n_seq_max, params.kv_unified = self.n_ctx * count, count, False
        params.n_batch, params.n_ubatch = max(llm.n_batch, rows), max(params.n_ubatch, rows)
        params.n_outputs_max, params.embeddings = min(max(rows, PROMPT_ROWS), params.n_batch), False
        with ExitStack() as stack:
            self._ctx = stack.enter_context(closing(self._context(params)))
            self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
            stack.callback(lib.llama_batch_free, self._batch)
            drafts = None
            if drafter is not None:
                model = lib.llama_get_model(drafter.ctx)
                drafts = stack.enter_context(context(model, params, self._ctx.ctx, llm.verbose))
            self._stack = stack.pop_all()
        self.all = [Slot(self, number) for number in range(count)]
        self.drafters = [Drafter(drafts, self.n_vocab, self.width, each.number) for each in self.all if drafts]

    def _context(self, params: Any) -> Any:
        llm, count = self.llm, params.n_seq_max
        try:
            with suppress_stdout_stderr(disable=llm.verbose):
                made = internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose)
        except ValueError as problem:
            raise RuntimeError(
                f"llama.cpp could not make a context for {count} sequences of {self.n_ctx} tokens; lower n_parallel, "
                "or the n_ctx of the object, or n_batch."
            ) from problem
        if llm._lora_adapter:
            adapters = (lib.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)
            lib.llama_set_adapters_lora(made.ctx, adapters, 1, (ctypes.c_float * 1)(llm.lora_scale))
        return made

    def close(self) -> None:
        """Free context and drafters."""
        self._stack.close()

    def decode(self, tokens: Mapping[int, tuple[int, Sequence[int]]], every: bool = True) -> None:
        """One batch.

        Args:
            tokens: for each sequence, in ascending order, where its KV cache ends, and the tokens there; equally many
                make one pass.
            every: logits of all of them, not of each sequence's last alone.

        Raises:
            RuntimeError: llama.cpp refuses.
        """
        batch, row = self._batch, 0
        for number, (past, ids) in tokens.items():
            for place, token in enumerate(ids):
                batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, past + place, 1
                batch.seq_id[row][0], batch.logits[row] = number, every or place == len(ids) - 1
                row += 1
        batch.n_tokens = row
        if status := lib.llama_decode(self._ctx.ctx, batch):
            raise explain_decode(RuntimeError(f"llama_decode returned {status}"))

    @contextmanager
    def patient(self, count: int) -> Iterator[None]:
        """A block that decodes so many tokens; if these are many, Ctrl-C and `close` end it in the middle."""
        if count < LONG:
            yield
            return
        with interruptible(lambda: self.llm.guard.ending) as ended, aborting(self._ctx.ctx, ended):
            yield

    def cut(self, number: int, keep: int) -> None:
        """Forget what a sequence has from a position on."""
        self._ctx.kv_cache_seq_rm(number, keep, -1)

    def copy(self, source: Slot, to: Slot) -> None:
        """Make a sequence what another one is."""
        self.cut(to.number, 0)
        # Between streams llama.cpp copies all or nothing; it does with the next batch.
        self._ctx.kv_cache_seq_cp(source.number, to.number, -1, -1)
        to.n_tokens = source.n_tokens
        to.input_ids[:] = source.input_ids
        to.kept = source.kept

    def begin(self, tokens: list[int], free: Sequence[Slot]) -> Slot:
        """A slot for a prompt, cut to what it shares with it; what another one shares is copied, if that is more.

        The prompt's last token is always left to be decoded.
        """
        shared = {slot: slot.shared_with(tokens) for slot in self.all}
        chosen = max(free, key=lambda slot: (shared[slot], -slot.n_tokens, -slot.number))
        best = max(self.all, key=lambda slot: shared[slot])
        if shared[best] >= shared[chosen] + WORTH_A_COPY:
            chosen = min(free, key=lambda slot: (slot.n_tokens, slot.number))
            self.copy(best, chosen)
            shared[chosen] = shared[best]
        chosen.n_tokens = shared[chosen]
        chosen.roll_back()
        return chosen

    def can_cut(self, number: int, keep: int) -> bool:
        """Whether a sequence can go on after `keep` tokens: with swa_full=False it forgets keys out of the window."""
        if self._swa_full or keep == 0:
            return True
        first = lib.llama_memory_seq_pos_min(self._ctx.memory, number)
        return bool(0 <= first <= max(0, keep - self._window))

    def logits(self, row: int) -> Floats:
        """The logits of a row of the latest batch; a view, valid until the next."""
        return native.logits_row(self._ctx.ctx, row, self.n_vocab)

    def hidden(self, row: int) -> Floats:
        """The hidden row that the drafter reads."""
        return native.hidden_row(self._ctx.ctx, row, self.width)


class Slot:
    """One of the sequences: a `Target`.

    Args:
        slots: all of them.
        number: of this one.

    Attributes:
        n_tokens: tokens of the sequence, as in `Target`.
        input_ids: which they are, shape [n_ctx].
        kept: the hidden row after the last of them, as other sequences' batches come before it is drafted from.
    """

    def __init__(self, slots: Slots, number: int) -> None:
        self._slots, self.number, self.n_batch = slots, number, slots.n_batch
        self.n_tokens = 0
        self.input_ids: npt.NDArray[np.intc] = np.full(slots.n_ctx, -1, dtype=np.intc)
        self.kept: Floats | None = None

    def n_ctx(self) -> int:
        """As `Target.n_ctx`."""
        return self._slots.n_ctx

    @property
    def ids(self) -> npt.NDArray[np.intc]:
        """The tokens so far."""
        return self.input_ids[: self.n_tokens]

    def note(self, tokens: Sequence[int]) -> None:
        """Put tokens behind those so far, without counting them."""
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens

    def decode(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        """As `Target.decode`, for this sequence alone."""
        batch = [*tokens, *draft]
        slots, row = self._slots, 0
        with slots.patient(len(batch)):
            for start in range(0, len(batch), self.n_batch):
                chunk = batch[start : start + self.n_batch]
                slots.llm.check_open()
                slots.decode({self.number: (self.n_tokens + start, chunk)}, every=bool(draft))
                row = len(chunk) - 1 - len(draft)
        slots.decoded += len(tokens)
        self.note(batch)
        self.n_tokens += len(tokens)
        return row

    def roll_back(self) -> None:
        """As `Target.roll_back`."""
        self._slots.cut(self.number, self.n_tokens)

    def reset(self) -> None:
        """As `Target.reset`."""
        self.n_tokens = 0
        self.roll_back()

    def shared_with(self, tokens: list[int]) -> int:
        """How many tokens of a prompt, but for its last, the sequence begins with and can go on after."""
        most = min(self.n_tokens, len(tokens) - 1)
        differing = np.flatnonzero(self.input_ids[:most] != np.asarray(tokens[:most], dtype=np.intc))
        keep = int(differing[0]) if len(differing) else max(most, 0)
        return keep if self._slots.can_cut(self.number, keep) else 0

    def keep(self, row: int) -> None:
        """Keep a hidden row of the latest batch, which belongs to the last of the tokens so far."""
        if self._slots.drafters:
            self.kept = self._slots.hidden(row)

    def logits(self, row: int) -> Floats:
        """As `Target.logits`."""
        return self._slots.logits(row)

    def hidden(self, row: int) -> Floats:
        """The row that was kept; what is asked for is always the latest."""
        del row
        assert self.kept is not None
        return self.kept

    def ends(self, token: int) -> bool:
        """As `Target.ends`."""
        return self._slots.llm.ends(token)
