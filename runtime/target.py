"""What the loop, the drafts and the log-probabilities ask of a target: a model with its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gemma_mtp.runtime.native import Floats


class Target(Protocol):
    """A sequence of tokens, the KV cache of its beginning, and the rows of the latest batch.

    Attributes:
        n_tokens: tokens of the sequence. The KV cache may be ahead of it, by a draft; it is cut on the next decode.
        n_batch: most tokens of one batch.
        input_ids: the tokens, shape [n_ctx]; those past `n_tokens` mean nothing.
    """

    n_tokens: int
    n_batch: int
    input_ids: Any

    def n_ctx(self) -> int:
        """Cells of the KV cache."""

    def decode(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        """Decode tokens and a draft after them; afterwards `n_tokens` counts the tokens, not the draft.

        Returns:
            The batch row of the last token; the rows of the draft follow it.

        Raises:
            RuntimeError: the context is full, or llama.cpp could not decode.
        """

    def roll_back(self) -> None:
        """Cut the KV cache to `n_tokens`."""

    def reset(self) -> None:
        """Forget all tokens."""

    def logits(self, row: int) -> Floats:
        """The logits of a row of the latest batch, shape [n_vocab]."""

    def hidden(self, row: int) -> Floats:
        """The hidden row that the drafter reads, shape [width]."""

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
