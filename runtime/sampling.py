"""The token at a position: argmax, or Gumbel-max with noise fixed by (seed, position, token id).

`argmax(log p + g)` with independent Gumbel noise `g` is a sample of p (Gumbel 1954; Maddison et al., arXiv 1411.0030).
As the noise is a function of seed, position and token id alone, the target's choice is the same whether the position is
decoded alone or among drafted tokens, and a drafter that uses the same noise proposes it more often than its own argmax
would (Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime.native import Floats
from llama_cpp import llama_cpp as lib

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


class Choose(Protocol):
    """Gives the token for a row of logits [n_vocab] that stands at a position of the sequence."""

    def __call__(self, logits: Floats, position: int) -> int: ...


def mix(word: int) -> int:
    """SplitMix64's finalizer on one 64-bit word (Steele, Lea and Flood, OOPSLA 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def gumbel(seed: int, position: int, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for token ids at a position, shape of `ids`; a pure function of its arguments."""
    key = mix((mix((seed + GOLDEN) & MASK) + position * GOLDEN) & MASK)
    words = np.uint64(key) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    # 52 bits and a half: strictly between 0 and 1, so that both logarithms are finite.
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def argmax(logits: Floats, position: int) -> int:
    """Greedy choice; the lowest id among equals, as llama.cpp's greedy sampler has it."""
    del position
    return int(logits.argmax())


class ChainChoice:
    """A choice after a llama.cpp sampler chain whose last stage, the one that draws, has been taken off.

    Args:
        chain: llama_cpp's LlamaSampler; kept alive here, its state advances with `accept`.
        n_vocab: length of a logits row.
        seed: of the noise, or None to take the most likely candidate.
    """

    def __init__(self, chain: Any, n_vocab: int, seed: int | None) -> None:
        self._chain = chain
        self._seed = seed
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.zeros(n_vocab, dtype=CANDIDATE)

    def __call__(self, logits: Floats, position: int) -> int:
        self._candidates["id"], self._candidates["logit"], self._candidates["p"] = self._ids, logits, 0.0
        data = self._candidates.ctypes.data_as(lib.llama_token_data_p)
        array = lib.llama_token_data_array(data=data, size=len(self._ids), selected=-1, sorted=False)
        lib.llama_sampler_apply(self._chain.sampler, ctypes.byref(array))
        # A stage may leave the result in memory of its own, so the array is read where it points now.
        buffer = (ctypes.c_char * (array.size * CANDIDATE.itemsize)).from_address(ctypes.addressof(array.data.contents))
        left = np.frombuffer(buffer, dtype=CANDIDATE)
        scores = left["logit"].astype(np.float64)
        if self._seed is not None:
            scores += gumbel(self._seed, position, left["id"])
        best = np.flatnonzero(scores == scores.max())
        return int(left["id"][best].min())

    def accept(self, token: int) -> None:
        """Tell penalties and grammar which token the sequence goes on with."""
        lib.llama_sampler_accept(self._chain.sampler, token)


def without_draw(chain: Any) -> Any:
    """Take the stage that draws (dist or greedy, always the last) off a chain that Llama._init_sampler built."""
    last = lib.llama_sampler_chain_n(chain.sampler) - 1
    lib.llama_sampler_free(lib.llama_sampler_chain_remove(chain.sampler, last))
    return chain
