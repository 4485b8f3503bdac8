"""Draft, verify, roll back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from gemma_mtp.runtime.draft_length import fitting
from gemma_mtp.runtime.sampling import Choose
from gemma_mtp.runtime.stats import Stats
from gemma_mtp.runtime.verify import verify

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama


def generate(
    llm: Llama,
    tokens: list[int],
    choose: Choose,
    draft_choose: Choose,
    draft_length: int,
    stop: Callable[[int], bool],
    stats: Stats,
) -> Generator[int, Sequence[int] | None, None]:
    """Generate tokens, the target verifying what its drafter guessed.

    When a token is yielded, `llm.n_tokens` counts what stands before it, as in llama_cpp.Llama, whether it was drafted
    or not; the KV cache may be ahead, and is cut back on the next decode or when the generator is closed.

    Args:
        llm: the target, with or without a drafter.
        tokens: what to decode before the first token, at least one.
        choose: the target's choice for a row of its logits.
        draft_choose: the drafter's.
        draft_length: tokens to draft in a round; 0 for none.
        stop: asked with the batch row of the choice just made; True ends the generation before it is yielded.
        stats: counts what happens; `seconds` leaves out what the caller does between tokens.

    Yields:
        Token ids. Tokens sent in are appended after the one yielded.

    Raises:
        RuntimeError: llama.cpp could not decode; the state is as before the failed batch.
    """
    draft: list[int] = []
    clock = perf_counter()
    try:
        while True:
            row = llm.decode(tokens, draft)
            if stats.tokens == 0:
                stats.prompt_tokens, stats.prompt_seconds = len(tokens), perf_counter() - clock
                clock = perf_counter()
            else:
                stats.target_passes += 1
            past = llm.n_tokens

            def choice(i: int, row: int = row, past: int = past) -> int:
                llm.n_tokens = past + i
                return choose(llm.logits(row + i), past + i)

            tokens = []
            for i, (token, accepted) in enumerate(verify(draft, choice)):
                if accepted:
                    stats.accepted_at(i)
                if stop(row + i):
                    return
                stats.tokens += 1
                stats.seconds += perf_counter() - clock
                sent = yield token
                clock = perf_counter()
                tokens = [token, *(sent or ())]
                if sent:
                    break

            llm.roll_back()
            draft = []
            if llm.drafter and len(tokens) == 1:
                length = fitting(draft_length, llm.n_tokens, llm.n_ctx(), llm.n_batch)
                if length:
                    hidden = llm.hidden(row + llm.n_tokens - past)
                    draft = llm.drafter.draft(tokens[0], hidden, llm.n_tokens, length, draft_choose)
                    stats.drafted_round(length)
    finally:
        llm.roll_back()
