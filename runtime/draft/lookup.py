"""Drafts from the text itself: what followed the last time the latest tokens stood there (prompt lookup).

The idea is Saxena's prompt-lookup-decoding, as in transformers' PromptLookupCandidateGenerator and llama.cpp's
common/ngram-cache.cpp.
"""

from __future__ import annotations

import ctypes
import math
import weakref

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import native
from gemma_mtp.runtime.draft.source import Draft, DraftSource, Proposal, Start
from gemma_mtp.runtime.target import Target


class Lookup:
    """The tokens of a text, and where each run of three stood before: `llama_mtp_lookup` of include/llama-mtp.h.

    Ids below zero stand where an image or a sound is: they equal nothing, each other included, and are never proposed.

    Raises:
        RuntimeError: libllama lacks it.
    """

    def __init__(self) -> None:
        self._lib = native.choices()
        if self._lib is None:
            raise RuntimeError(native.NO_CHOICES)
        self._lookup = self._lib.llama_mtp_lookup_init()
        weakref.finalize(self, self._lib.llama_mtp_lookup_free, self._lookup)

    def extend(self, tokens: npt.ArrayLike) -> None:
        """Append tokens to the text."""
        made = np.ascontiguousarray(tokens, np.int32)
        self._lib.llama_mtp_lookup_extend(self._lookup, made.ctypes.data, len(made))

    def find(self, length: int) -> tuple[list[int], int]:
        """What may follow.

        Args:
            length: tokens wanted.

        Returns:
            `length` tokens, or as many as stand before an image or a sound, and how many tokens before them agree with
            the end of the text; ([], 0) when fewer than three do. Where the earlier place overlaps the end, the text is
            taken to repeat itself.
        """
        made, matched = (ctypes.c_int32 * max(length, 0))(), ctypes.c_int32()
        count = self._lib.llama_mtp_lookup_find(self._lookup, length, made, ctypes.byref(matched))
        return made[:count], matched.value


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
        self._lookup.extend(self._target.input_ids[self._read : self._target.n_tokens])
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
