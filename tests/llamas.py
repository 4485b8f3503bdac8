"""What is done to a `Llama` in tests, and what it is told."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.draft.policy import Policy
from gemma_mtp.runtime.request import MOST
from llama_cpp import Llama as Stock
from llama_cpp import llama_cpp as lib
from prompts import held_out

# One thread: with two, a loaded machine makes every batch wait.
OPTIONS: dict[str, Any] = {
    "n_ctx": 512,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
    "flash_attn": True,
    "draft_length": 3,
}


TEXTS = ["import os", "<|turn>user\nhi<turn|>\n", "<|channel>thought\n<channel|>", "naïve 東京 \t\n\n  x", "<0x0A>\x7f",
         '<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>', " leading", "<bos><eos><pad>", ""]  # fmt: skip


def words_of(path: Path) -> list[Any]:
    """The vocabulary as llama.cpp has it, and how it cuts some texts."""
    llm = Stock(str(path), vocab_only=True, verbose=False)
    vocab = llm._model.vocab
    words: list[Any] = [
        (
            lib.llama_vocab_get_text(vocab, token),
            llm._model.detokenize([token], special=True),
            llm._model.detokenize([token], special=False),
            lib.llama_vocab_get_attr(vocab, token),
            lib.llama_vocab_is_eog(vocab, token),
        )
        for token in range(llm.n_vocab())
    ]
    words += [llm.tokenize(text.encode(), bos, special) for text in [*TEXTS, *held_out()]
              for bos in (True, False) for special in (True, False)]  # fmt: skip
    llm.close()
    return words


def logits_of(path: Path) -> Any:
    """Logits of 60 tokens, [60, n_vocab]."""
    llm = Stock(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    llm.eval(list(range(2, 62)))
    rows = llm.scores[:60].copy()
    llm.close()
    return rows


def see(llm: Llama, rows: int, seed: int = 0) -> None:
    """Put embeddings at the next positions, as llama.cpp's multimodal helper does for an image."""
    made = np.random.default_rng(seed).normal(0, 0.5, (rows, llm.n_embd())).astype(np.float32)
    batch = lib.llama_batch_init(rows, llm.n_embd(), 1)
    try:
        ctypes.memmove(batch.embd, made.ctypes.data, made.nbytes)
        batch.n_tokens = rows
        for i in range(rows):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = llm.n_tokens + i, 1, 0, False
        assert lib.llama_decode(llm.ctx, batch) == 0
    finally:
        lib.llama_batch_free(batch)
    llm.n_tokens += rows


def paying() -> Costs:
    """Costs under which drafting always pays, far more than on the bundled pair."""
    costs = Costs(MOST + 1)
    for _ in range(20):
        for n in range(1, MOST + 2):
            costs.observe(n, 1.0 + 0.01 * n)
        costs.observe(STEP, 0.01)
    costs.observe = lambda place, seconds: None  # type: ignore[method-assign]
    return costs


@contextmanager
def drafting(llm: Llama) -> Iterator[None]:
    """Within the block the draft length "auto" always drafts."""
    kept = llm._costs, llm._policy
    llm._costs = paying()
    llm._policy = Policy(llm._costs, MOST)
    try:
        yield
    finally:
        llm._costs, llm._policy = kept
