"""Which source drafts next, and how far: what makes most tokens a second, by costs and acceptance. libllama chooses.

`llama_mtp_policy` of include/llama-mtp.h, which llama-server asks as well; src/llama-mtp-length.cpp says how.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from typing import Protocol

from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import Costs
from gemma_mtp.runtime.draft.length import Fixed


class Chooses(Protocol):
    """What chooses a source of drafts and a length for every round, and learns what became of them."""

    most: int

    def choose(self, offers: Mapping[str, tuple[int, bool]]) -> tuple[str, int]:
        """As `Policy.choose`."""

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """As `Policy.observe`."""


class Policy:
    """The library's choice, for one sequence.

    Drafts are not ended early by the drafter's probabilities. A rule that compared neighbouring batch sizes was tried
    on the bundled pair: drawn tokens are accepted as often at 0.1 as at 0.7, and greedy ones gained 0.4 % at most.

    Args:
        costs: what passes and draft steps take.
        most: longest draft.

    Raises:
        RuntimeError: libllama does not choose.
    """

    def __init__(self, costs: Costs, most: int) -> None:
        self._lib = native.choices()
        if self._lib is None or costs.handle is None:
            raise RuntimeError(native.NO_CHOICES)
        self.costs, self.most = costs, most
        self._kinds: dict[str, int] = {}
        self._policy = self._lib.llama_mtp_policy_init(costs.handle, 1, most)
        weakref.finalize(self, self._lib.llama_mtp_policy_free, self._policy)

    def choose(self, offers: Mapping[str, tuple[int, bool]]) -> tuple[str, int]:
        """The source and length that make most tokens a second.

        Args:
            offers: for each source the longest draft it can give now, and whether its tokens are free.

        Returns:
            Source and length; length 0 for a round without a draft.
        """
        made = (native.DraftOffer * len(offers))()
        for place, (source, (most, free)) in zip(made, offers.items(), strict=True):
            place.kind, place.n_max, place.free = self._kind(source), most, free
        lengths = (ctypes.c_int32 * len(offers))()
        self._lib.llama_mtp_policy_choose(self._policy, made, len(offers), 1, False, lengths)
        return next(((source, length) for source, length in zip(offers, lengths, strict=True) if length), ("", 0))

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """A round made `tokens` tokens, `accepted` of the `drafted` ones among them."""
        kind = self._kind(source) if drafted else 0
        self._lib.llama_mtp_policy_observe(self._policy, 0, kind, drafted, accepted, tokens)

    def _kind(self, source: str) -> int:
        return self._kinds.setdefault(source, len(self._kinds))


def policy_for(costs: Costs, most: int) -> Chooses:
    """What chooses with the loaded libllama.

    Args:
        costs: what passes and draft steps take.
        most: longest draft.
    """
    return Policy(costs, most) if native.choices() is not None else Fixed(most)
