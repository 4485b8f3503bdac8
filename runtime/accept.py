"""Which draft tokens the target accepts, and what it emits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def walk(draft: Sequence[int], choose: Callable[[int], int]) -> Iterator[tuple[int, bool]]:
    """Walk along a draft, yielding the target's own choices until one differs from the draft.

    The tokens yielded are always the target's, so they do not depend on what was drafted: a draft token only saves the
    pass that would have computed the next choice. With an argmax as the choice this is greedy speculative decoding;
    with an argmax over logits plus noise that is fixed by (seed, position, token) it samples the target's distribution
    exactly (Gumbel-max coupling; Daliri et al., arXiv 2408.07978).

    Args:
        draft: the proposed tokens, possibly none.
        choose: gives the target's token after the first `i` draft tokens; called for i = 0, 1, ... in order, and only
            while all earlier draft tokens were accepted.

    Yields:
        (token, accepted): the target's choice, and whether it equals the draft token in its place. The last pair has
        accepted False: a correction, or the token after a draft that was accepted whole.
    """
    for i in range(len(draft) + 1):
        token = choose(i)
        accepted = i < len(draft) and token == draft[i]
        yield token, accepted
        if not accepted:
            return
