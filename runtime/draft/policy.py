"""Which source drafts next, and how far: what makes most tokens a second, by costs and acceptance. libllama chooses.

`llama_mtp_policy` of include/llama-mtp.h, which llama-server asks as well; src/llama-mtp-length.cpp says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.costs import Costs
from gemma_mtp.runtime.draft.length import Fixed
from gemma_mtp.runtime.draft.shared import OfOne, SharedPolicy


class Chooses(Protocol):
    """What chooses a source of drafts and a length for every round, and learns what became of them."""

    most: int

    def choose(self, offers: Mapping[str, tuple[int, bool]]) -> tuple[str, int]:
        """The source and length that make most tokens a second.

        Args:
            offers: for each source the longest draft it can give now, and whether its tokens are free.

        Returns:
            Source and length; length 0 for a round without a draft.
        """

    def observe(self, source: str, drafted: int, accepted: int, tokens: int) -> None:
        """A round made `tokens` tokens, `accepted` of the `drafted` ones among them."""


class Policy(OfOne):
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
        super().__init__(SharedPolicy(costs, 1, most), 0)


def policy_for(costs: Costs, most: int) -> Chooses:
    """What chooses with the loaded libllama.

    Args:
        costs: what passes and draft steps take.
        most: longest draft.
    """
    return Policy(costs, most) if native.choices() is not None else Fixed(most)
