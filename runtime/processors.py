"""Logits processors of a request: the caller's, looked at; a bias; and what keeps an answer from ending early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama import MinTokensLogitsProcessor

Processor = Callable[[Any, Any], Any]


class Looked:
    """A processor whose result is looked at: with what is no number in it every choice would be one of nothing.

    Args:
        processor: takes token ids and a row of logits, shape [n_vocab], and gives a row.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def __call__(self, ids: Any, scores: Any) -> Any:
        made = self._processor(ids, scores)
        if np.shape(made) != scores.shape:
            raise ValueError(
                f"a logits processor gave what has shape {np.shape(made)} instead of {scores.shape}; it must return "
                "the scores."
            )
        if np.isnan(made).any():
            raise ValueError("a logits processor gave nan; give -inf for a token that must not come.")
        return made


class MinTokens:
    """Keeps an answer of less than so many tokens from ending, by any of the tokens that end one.

    (llama_cpp's MinTokensLogitsProcessor knows a single one, of the three that Gemma 4 has.)

    Args:
        count: tokens of the answer before one may end it.
        ends: tokens that do.
    """

    def __init__(self, count: int, ends: Sequence[int]) -> None:
        self._count, self._ends = count, list(ends)
        self._prompt: int | None = None

    def __call__(self, ids: Any, scores: Any) -> Any:
        if self._prompt is None:
            self._prompt = len(ids)
        if len(ids) - self._prompt < self._count:
            scores[self._ends] = -np.inf
        return scores


def with_bias(processors: Iterable[Processor], bias: Mapping[int, float]) -> list[Processor]:
    """Logits processors with a bias after them."""
    ids = np.array(list(bias), dtype=np.intp)
    added = np.array(list(bias.values()), dtype=np.single)

    def add_bias(input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        del input_ids
        scores[ids] += added
        return scores

    return [*processors, add_bias]


def processors_of(
    given: Iterable[Processor] | None, min_tokens: int, ends: Callable[[], Sequence[int]]
) -> list[Processor] | None:
    """The processors of one request; None for none.

    Args:
        given: by the caller.
        min_tokens: tokens before which none may end the answer.
        ends: gives the tokens that do.
    """
    made: list[Processor] = []
    for processor in given or ():
        if isinstance(processor, MinTokensLogitsProcessor):
            made.append(MinTokens(processor.min_tokens, ends()))
        else:
            made.append(Looked(processor))
    if min_tokens:
        made.append(MinTokens(min_tokens, ends()))
    return made or None
