"""Draft, verify, roll back. A round:

row = decode(tokens, draft)             one pass of the target over the last tokens and the draft
for i = 0, 1, ...:
    token = choose(logits[row + i])     the target's own, whatever was drafted
    stop?                               stopping criteria, before the token is seen
    yield token
    if token != draft[i]: break         or the draft is at its end: this was the token after it
roll back                               the KV cache forgets what was rejected
learn                                   what the pass took, how many were accepted
draft = make(token)                     by the sources of draft/proposals.py
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from time import perf_counter

from gemma_mtp.runtime.accept import walk
from gemma_mtp.runtime.draft.proposals import Proposals
from gemma_mtp.runtime.draft.source import Draft
from gemma_mtp.runtime.sampling import Choose
from gemma_mtp.runtime.stats import Stats
from gemma_mtp.runtime.target import Target


def generate(
    target: Target,
    tokens: list[int],
    choose: Choose,
    proposals: Proposals,
    stop: Callable[[int], bool],
    stats: Stats,
) -> Generator[int, Sequence[int] | None, None]:
    """Generate tokens, the target verifying what was guessed.

    When a token is yielded, `target.n_tokens` counts what stands before it, as in llama_cpp.Llama, whether it was
    drafted or not; the KV cache may be ahead, and is cut back on the next decode or when the generator is closed.

    Args:
        target: with the KV cache of what stands before `tokens`.
        tokens: what to decode before the first token, at least one.
        choose: the target's choice for a row of its logits.
        proposals: makes the drafts.
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
            row = target.decode(tokens, draft.tokens)
            target.logits(row)  # waits for a device that computes on its own
            pass_seconds = perf_counter() - begun
            if stats.tokens == 0:
                stats.prompt_tokens += len(tokens)
                stats.prompt_seconds += pass_seconds
            else:
                stats.passed(pass_seconds)
            past = target.n_tokens

            def choice(i: int, row: int = row, past: int = past) -> int:
                target.n_tokens = past + i
                return choose(target.logits(row + i), past + i)

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

            target.roll_back()
            if single and len(tokens) == 1:
                proposals.learn(draft, hits, i + 1, pass_seconds)
            draft = Draft()
            if len(tokens) == 1:
                draft = proposals.make(tokens[0], row + target.n_tokens - past)
                stats.drafted_round(draft.sources, draft.seconds)
    finally:
        target.roll_back()
