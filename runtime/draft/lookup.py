"""Drafts from the text itself: what followed the last time the latest tokens stood there (prompt lookup).

The idea is Saxena's prompt-lookup-decoding, as in transformers' PromptLookupCandidateGenerator and llama.cpp's
common/ngram-cache.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile

import numpy as np
from gemma_mtp.runtime.draft.source import Draft, DraftSource, Proposal, Start
from gemma_mtp.runtime.target import Target

GRAM = 3  # tokens that must agree
TRIED = 8  # earlier places compared for the longest agreement
AGREEMENT = 32  # agreement beyond this says nothing more


class Lookup:
    """The tokens of a text, and where each run of three stood before.

    Ids below zero stand where an image or a sound is: they equal nothing, each other included, and are never proposed.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._earlier: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self.tokens.append(token)
            key = tuple(self.tokens[-GRAM:])
            self._earlier.append(self._latest.get(key, -1))
            if min(key) >= 0:
                self._latest[key] = len(self.tokens) - 1

    def find(self, length: int) -> tuple[list[int], int]:
        """What may follow.

        Args:
            length: tokens wanted.

        Returns:
            `length` tokens, or as many as stand before an image or a sound, and how many tokens before them agree with
            the end of the text; ([], 0) when fewer than three do. Where the earlier place overlaps the end, the text is
            taken to repeat itself.
        """
        if len(self.tokens) < GRAM:
            return [], 0
        place, best, matched = self._earlier[-1], -1, 0
        for _ in range(TRIED):
            if place < GRAM - 1:
                break
            if self.tokens[place + 1] >= 0 and (agreed := self._agreed(place)) > matched:
                best, matched = place, agreed
            place = self._earlier[place]
        if best < 0:
            return [], 0
        period = len(self.tokens) - 1 - best
        following = (self.tokens[best + 1 + i % period] for i in range(length))
        return list(takewhile(lambda token: token >= 0, following)), matched

    def _agreed(self, place: int) -> int:
        """How many tokens up to and including `place` equal the latest ones."""
        last, tokens = len(self.tokens) - 1, self.tokens
        for back in range(min(place + 1, AGREEMENT)):
            if tokens[place - back] != tokens[last - back] or tokens[last - back] < 0:
                return back
        return min(place + 1, AGREEMENT)


class FromText(DraftSource):
    """Proposes what followed before, as far as the grammar allows; not behind tokens that the grammar forced.

    Args:
        target: whose text it is.
    """

    NAME = "lookup"

    def __init__(self, target: Target) -> None:
        self._target, self._lookup, self._read = target, Lookup(), 0

    def propose(self, start: Start, draft: Draft, room: int) -> Proposal | None:
        """What stood after the latest tokens before; its acceptance is remembered by the length of the agreement."""
        if draft.tokens:
            return None
        self._lookup.extend(self._target.input_ids[self._read : self._target.n_tokens].tolist())
        self._lookup.extend([start.token])
        self._read = self._target.n_tokens + 1
        found, matched = self._lookup.find(room)
        if not found:
            return None

        def take(length: int) -> None:
            mask = start.sampler.mask
            for token in found[:length]:
                if mask is not None:
                    if not mask.allows(np.array([token], dtype=np.int32))[0]:
                        return
                    mask.accept(token)
                draft.add(token, self.NAME)

        return Proposal(f"{self.NAME} {matched_class(matched)}", len(found), take, free=True)


def matched_class(matched: int) -> int:
    """Length of an agreement, rounded down to a power of two: how far a copy can be trusted grows with it."""
    return 1 << int(math.log2(matched))
