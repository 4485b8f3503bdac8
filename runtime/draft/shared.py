"""How far to draft where several sequences share a pass: the lengths that together make most tokens a second.

A pass gives every sequence equally many rows (runtime/many/slots.py), so the sequences have one number of rows in
common, and what a row costs is that of one row in each. The believed acceptance is each sequence's own. libllama
chooses, as for one sequence (runtime/draft/policy.py) and for llama-server's slots.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from typing import Protocol

from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import Costs
from gemma_mtp.runtime.draft.length import Fixed

# For each source the longest draft it can give now, and whether its tokens are free.
Offers = Mapping[str, tuple[int, bool]]


class ChoosesForAll(Protocol):
    """What chooses sources of drafts and lengths for several sequences, and learns what became of them."""

    most: int

    def choose(self, offers: Mapping[int, Offers], n_pass: int) -> dict[int, tuple[str, int]]:
        """As `SharedPolicy.choose`."""

    def observe(self, number: int, kind: str, drafted: int, accepted: int, tokens: int) -> None:
        """As `SharedPolicy.observe`."""


class SharedPolicy:
    """Chooses sources of drafts and lengths for every round of several sequences.

    Args:
        costs: what passes, by the rows of all sequences, and draft steps take.
        count: sequences at most.
        most: longest draft of one of them.

    Raises:
        RuntimeError: libllama does not choose.
    """

    def __init__(self, costs: Costs, count: int, most: int) -> None:
        self._lib = native.choices()
        if self._lib is None or costs.handle is None:
            raise RuntimeError(native.NO_CHOICES)
        self.costs, self.most = costs, most
        self._kinds: dict[str, int] = {}
        self._policy = self._lib.llama_mtp_policy_init(costs.handle, count, most)
        weakref.finalize(self, self._lib.llama_mtp_policy_free, self._policy)

    def choose(self, offers: Mapping[int, Offers], n_pass: int) -> dict[int, tuple[str, int]]:
        """Sources and lengths for a round.

        Args:
            offers: of the sequences for which lengths are to be chosen.
            n_pass: sequences that the pass decodes, each with one row beside its draft.

        Returns:
            For each sequence of `offers` a source and how many tokens, 0 for none.
        """
        chosen = dict.fromkeys(offers, ("", 0))
        asked = [(number, kind, *offer) for number, each in offers.items() for kind, offer in each.items()]
        made = (native.DraftOffer * len(asked))(
            *(native.DraftOffer(number, self._kind(kind), most, free) for number, kind, most, free in asked)
        )
        lengths = (ctypes.c_int32 * len(asked))()
        self._lib.llama_mtp_policy_choose(self._policy, made, len(asked), n_pass, native.ROWS_PADDED, lengths)
        for (number, kind, *_), length in zip(asked, lengths, strict=True):
            if length:
                chosen[number] = kind, length
        return chosen

    def observe(self, number: int, kind: str, drafted: int, accepted: int, tokens: int) -> None:
        """A round gave a sequence `tokens` tokens, `accepted` of its `drafted` ones among them."""
        known = self._kind(kind) if drafted else 0
        self._lib.llama_mtp_policy_observe(self._policy, number, known, drafted, accepted, tokens)

    def _kind(self, kind: str) -> int:
        return self._kinds.setdefault(kind, len(self._kinds))


class AllFixed:
    """The same length for all, for a libllama without ours.

    Args:
        most: longest draft.
    """

    def __init__(self, most: int) -> None:
        self._each = Fixed(most)
        self.most = self._each.most

    def choose(self, offers: Mapping[int, Offers], n_pass: int) -> dict[int, tuple[str, int]]:
        """As `SharedPolicy.choose`."""
        return {number: self._each.choose(each) for number, each in offers.items()}

    def observe(self, number: int, kind: str, drafted: int, accepted: int, tokens: int) -> None:
        """As `SharedPolicy.observe`; nothing is learned."""


def shared_policy(costs: Costs, count: int, most: int) -> ChoosesForAll:
    """What chooses with the loaded libllama; the arguments are those of `SharedPolicy`."""
    return SharedPolicy(costs, count, most) if native.choices() is not None else AllFixed(most)


class OfOne:
    """What `Proposals` asks of a policy, for one of the sequences.

    Args:
        shared: the policy of all.
        number: of this one.
    """

    def __init__(self, shared: ChoosesForAll, number: int) -> None:
        self._shared, self._number, self.most = shared, number, shared.most

    def choose(self, offers: Offers) -> tuple[str, int]:
        """For a pass over this sequence alone."""
        return self._shared.choose({self._number: offers}, 1)[self._number]

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """As `SharedPolicy.observe`."""
        self._shared.observe(self._number, source, drafted, accepted, tokens)
