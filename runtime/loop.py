"""Draft, verify, roll back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from gemma_mtp.runtime.accept import walk
from gemma_mtp.runtime.draft.proposals import Draft, Drafts
from gemma_mtp.runtime.sampling import Choose
from gemma_mtp.runtime.stats import Stats

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama


def generate(
    llm: Llama,
    tokens: list[int],
    choose: Choose,
    drafts: Drafts,
    stop: Callable[[int], bool],
    stats: Stats,
) -> Generator[int, Sequence[int] | None, None]:
    """Generate tokens, the target verifying what was guessed.

    When a token is yielded, `llm.n_tokens` counts what stands before it, as in llama_cpp.Llama, whether it was drafted
    or not; the KV cache may be ahead, and is cut back on the next decode or when the generator is closed.

    Args:
        llm: the target, with or without a drafter.
        tokens: what to decode before the first token, at least one.
        choose: the target's choice for a row of its logits.
        drafts: makes the drafts.
        stop: asked with the batch row of the choice just made; True ends the generation before it is yielded.
        stats: counts what happens.

    Yields:
        Token ids. Tokens sent in are appended after the one yielded.

    Raises:
        RuntimeError: llama.cpp could not decode, or no token is allowed; the state is as before the failed batch.
    """
    draft = Draft()
    clock = perf_counter()
    try:
        while True:
            begun, single = perf_counter(), len(tokens) == 1 and stats.tokens > 0
            row = llm.decode(tokens, draft.tokens)
            llm.logits(row)  # waits for a device that computes on its own
            pass_seconds = perf_counter() - begun
            if stats.tokens == 0:
                stats.prompt_tokens, stats.prompt_seconds = len(tokens), pass_seconds
            else:
                stats.passed(pass_seconds)
            past = llm.n_tokens

            def choice(i: int, row: int = row, past: int = past) -> int:
                llm.n_tokens = past + i
                return choose(llm.logits(row + i), past + i)

            tokens = []
            hits = 0
            for i, (token, accepted) in enumerate(walk(draft.tokens, choice)):
                if accepted:
                    hits += 1
                    stats.accepted_at(i, draft.sources[i])
                if stop(row + i):
                    return
                if stats.tokens:
                    stats.loop_seconds += perf_counter() - clock
                stats.token()
                sent = yield token
                clock = perf_counter()
                tokens = [token, *(sent or ())]
                if sent:
                    break

            llm.roll_back()
            if single and len(tokens) == 1:
                drafts.learn(draft, hits, i + 1, pass_seconds)
            draft = Draft()
            if len(tokens) == 1:
                draft = drafts.make(tokens[0], row + llm.n_tokens - past)
                stats.drafted_round(draft.sources, draft.seconds)
    finally:
        llm.roll_back()
