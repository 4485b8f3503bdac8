"""The token at a position: llama.cpp's sampler chain, and noise fixed by (seed, position, token id) for its draw.

`argmax(log p + g)` with independent Gumbel noise `g` is a sample of p (Gumbel 1954; Maddison et al., arXiv 1411.0030).
As the noise is a function of seed, position and token id alone, the target's choice is the same whether the position is
decoded alone or among drafted tokens, and a drafter that uses the same noise proposes it more often than its own argmax
would (Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import native
from gemma_mtp.runtime.grammar import CANDIDATE, Mask
from gemma_mtp.runtime.native import Floats, Ids
from llama_cpp import llama_cpp as lib

Doubles = npt.NDArray[np.float64]

MASK = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# What a drafter looks at when the chain has no top_k: rarer tokens are not worth a pass over the whole vocabulary.
DRAFT_KEEP = 256


class Choose(Protocol):
    """Gives the token for a row of logits [n_vocab] that stands at a position of the sequence."""

    def __call__(self, logits: Floats, position: int) -> int: ...


class NoTokenLeft(RuntimeError):
    """Grammar, processors and biases together leave no token to choose."""


def readable(ids: npt.NDArray[np.intc]) -> npt.NDArray[np.intc]:
    """Token ids that processors and criteria may use: padding, token 0, stands where an image or a sound has none."""
    made: npt.NDArray[np.intc] = np.maximum(ids, 0)
    return made


def reading(criteria: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Stopping criteria, shown `readable` ids."""
    return None if criteria is None else lambda ids, logits: criteria(readable(ids), logits)


def mix(word: int) -> int:
    """SplitMix64's finalizer on one 64-bit word (Steele, Lea and Flood, OOPSLA 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def gumbel(seed: int, position: int, ids: Ids) -> Doubles:
    """Standard Gumbel noise for token ids at a position, shape of `ids`; a pure function of its arguments."""
    key = mix((mix((seed + GOLDEN_GAMMA) & MASK) + position * GOLDEN_GAMMA) & MASK)
    words = ids.astype(np.uint64)
    words += np.uint64(1)
    words *= np.uint64(GOLDEN_GAMMA)
    words += np.uint64(key)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    # 52 bits and a half: strictly between 0 and 1, so that both logarithms are finite.
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: Doubles = -np.log(-np.log(uniform))
    return noise


def likeliest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.intp]:
    """Indices of at least the `count` largest values, ties with the last of them included, in ascending order.

    The count-th largest of the maxima of groups is a lower bound of the count-th largest value, and takes one pass over
    the values where a partition takes many. A group is every so-many-th value: maxima of neighbors take longer.
    """
    width = int(len(values) ** 0.5)
    groups = len(values) // width if width else 0
    if count * 2 > groups:
        if count >= len(values):
            return np.arange(len(values))
        bound = np.partition(values, len(values) - count)[len(values) - count]
    else:
        tops = values[: groups * width].reshape(width, groups).max(axis=0)
        bound = np.partition(tops, groups - count)[groups - count]
    return np.flatnonzero(values >= bound)


def lowest_best(ids: Ids, scores: Doubles) -> int:
    """The id with the highest score; the lowest id among equals, as llama.cpp's greedy sampler has it."""
    return int(ids[scores == scores.max()].min())


class Sampler:
    """Chooses tokens: processors, grammar, llama.cpp's chain, and the draw.

    Only candidates that can survive top_k are handed to the chain, which changes nothing in the result.

    Args:
        chain: llama_cpp's LlamaSampler of penalties, top_k and what follows. A `with_noise` draws itself; with another,
            which must have no stage that draws, the same is done here.
        n_vocab: length of a logits row.
        seed: of the noise, or None to take the most likely candidate.
        keep: how many candidates the chain keeps at most, or None when it has no top_k.
        penalized: over how many of the latest tokens the chain's penalties go; 0 for none.
        mask: the grammar, if there is one.
        processors: llama-cpp-python's logits processors.
        input_ids: gives the tokens so far, for the processors.
    """

    def __init__(
        self,
        chain: Any,
        n_vocab: int,
        seed: int | None,
        keep: int | None = None,
        penalized: int = 0,
        mask: Mask | None = None,
        processors: Sequence[Callable[[Any, Any], Any]] = (),
        input_ids: Callable[[], Any] | None = None,
    ) -> None:
        self.n_vocab, self.seed, self.mask = n_vocab, seed, mask
        self._chain = chain
        self._keep = keep
        self._recent: deque[int] = deque(maxlen=penalized)
        self._processors, self._input_ids = processors, input_ids
        self._bias: tuple[npt.NDArray[np.intp], Floats] | None = None
        self._all = np.arange(n_vocab if keep is None else 0, dtype=np.int32)

    @property
    def plain(self) -> bool:
        """Whether a choice is a function of logits and position alone."""
        return self.mask is None and self._bias is None and not self._processors and not self._recent.maxlen

    def __call__(self, logits: Floats, position: int) -> int:
        """The token for a row of logits at a position; told to penalties and grammar.

        Raises:
            NoTokenLeft: no token is allowed.
        """
        logits = self._processed(logits)
        if self.plain and self.seed is None:
            return int(logits.argmax())
        token = self._chosen(self._candidates(logits), logits, position)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Tell penalties and grammar which token the sequence goes on with; the grammar must allow it."""
        if self._recent.maxlen:
            lib.llama_sampler_accept(self._chain.sampler, token)
            self._recent.append(token)
        if self.mask is not None:
            self.mask.accept(token)

    def fork(self) -> Sampler:
        """A sampler for drafting from the present state: what it accepts leaves this one as it is.

        Processors are not asked about drafts: they may keep a state of their own. What they changed in the target's
        latest row is changed in the drafter's rows instead, which is the same for a bias.
        """
        if self.plain and self._keep is not None:
            return self
        chain = self._chain.clone() if self._recent.maxlen else self._chain
        mask = self.mask.fork() if self.mask is not None else None
        other = Sampler(chain, self.n_vocab, self.seed, self._keep or DRAFT_KEEP, self._recent.maxlen or 0, mask)
        other._recent.extend(self._recent)
        other._bias = self._bias
        return other

    def _processed(self, logits: Floats) -> Floats:
        """A row after the processors, or with the change they last made."""
        if not self._processors:
            if self._bias is None:
                return logits
            changed, by = self._bias
            made = logits.copy()
            made[changed] += by
            return made
        made = logits.copy()
        ids = readable(self._input_ids()) if self._input_ids else None
        for processor in self._processors:
            made[:] = processor(ids, made)
        changed = np.flatnonzero(made != logits)
        # A processor that changes nearly everything says nothing about another row.
        self._bias = (changed, made[changed] - logits[changed]) if len(changed) <= self.n_vocab // 8 else None
        return made

    def _candidates(self, logits: Floats) -> Ids:
        """Ids among which are all that penalties, grammar and top_k can leave."""
        ids = self._all if self.mask is None else np.flatnonzero(self.mask.legal()).astype(np.int32)
        if self._keep is None:
            return ids
        found = likeliest(logits if self.mask is None else logits[ids], self._keep + len(self._recent))
        likely = found.astype(np.int32) if self.mask is None else ids[found]
        if self._recent:
            recent = np.array(self._recent, dtype=np.int32)
            likely = np.union1d(likely, recent if self.mask is None else recent[self.mask.legal()[recent]])
        return likely

    def _chosen(self, ids: Ids, logits: Floats, position: int) -> int:
        """The token among candidates."""
        logits = logits if len(ids) == self.n_vocab else logits[ids]
        ids, logits = ids[logits > -np.inf], logits[logits > -np.inf]
        candidates = np.zeros(len(ids), dtype=CANDIDATE)
        candidates["id"], candidates["logit"] = ids, logits
        data = candidates.ctypes.data_as(lib.llama_token_data_p)
        array = lib.llama_token_data_array(data=data, size=len(ids), selected=-1, sorted=False)
        draws = native.set_noise_position(self._chain.sampler, position)
        if len(ids):
            lib.llama_sampler_apply(self._chain.sampler, ctypes.byref(array))
        if not array.size or (draws and array.selected < 0):
            raise NoTokenLeft(
                "grammar, logits_processor and logit_bias together leave no token to choose; relax one of them."
            )
        if draws:
            return int(array.data[array.selected].id)
        # A stage may leave the result in memory of its own, so the array is read where it points now.
        buffer = (ctypes.c_char * (array.size * CANDIDATE.itemsize)).from_address(ctypes.addressof(array.data.contents))
        left = np.frombuffer(buffer, dtype=CANDIDATE)
        scores = left["logit"].astype(np.float64)
        return lowest_best(
            left["id"], scores if self.seed is None else scores + gumbel(self.seed, position, left["id"])
        )


def without_draw(chain: Any) -> Any:
    """Take the stage that draws (dist or greedy, always the last) off a chain that Llama._init_sampler built."""
    last = lib.llama_sampler_chain_n(chain.sampler) - 1
    lib.llama_sampler_free(lib.llama_sampler_chain_remove(chain.sampler, last))
    return chain


def with_noise(chain: Any, seed: int | None) -> Any:
    """Have a chain draw with our noise, if there is a seed and libllama has a stage for it."""
    stage = None if seed is None else native.noise_stage(seed & MASK)
    if stage:
        lib.llama_sampler_chain_add(chain.sampler, stage)
    return chain
