"""Which tokens a grammar allows, for the target and for drafts, without asking about the whole vocabulary each time."""

from __future__ import annotations

import ctypes
import re
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import chat_native
from gemma_mtp.runtime.native import Ids
from llama_cpp import llama_cpp as lib

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
TEXT_BYTES = 4096  # of the longest text of a token
# What GBNF says of characters: in it "<" is one of them, elsewhere it begins a token.
OF_TEXT = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


class TokenIndex:
    """Token ids by the first byte of their text.

    Args:
        vocab: a llama_vocab.
        n_vocab: its size.
    """

    def __init__(self, vocab: Any, n_vocab: int) -> None:
        self.vocab = vocab
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        first = np.full(n_vocab, -1, dtype=np.int32)
        size = np.zeros(n_vocab, dtype=np.int32)
        self.spelled = np.zeros(n_vocab, dtype=np.bool_)
        for token in range(n_vocab):
            size[token] = lib.llama_token_to_piece(vocab, token, buffer, TEXT_BYTES, 0, True)
            # A grammar rejects tokens without text, or with text that begins with a zero byte.
            if size[token] > 0 and buffer[0] != b"\0":
                first[token] = buffer[0][0]
                self.spelled[token] = lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_BYTE
        ends = [token for token in range(n_vocab) if lib.llama_vocab_is_eog(vocab, token)]
        first[ends] = -1
        self.ends = np.array(ends, dtype=np.int32)
        order = np.argsort(first, kind="stable").astype(np.int32)
        edges = np.searchsorted(first[order], np.arange(257))
        self.by_byte = [order[edges[byte] : edges[byte + 1]] for byte in range(256)]
        # Tokens of one byte, to ask with: no token is allowed whose first byte alone is not.
        lone = [tokens[size[tokens] == 1][:1] for tokens in self.by_byte]
        self.probes = np.concatenate([*lone, self.ends]).astype(np.int32)
        self.unprobed = np.concatenate(
            [tokens for tokens, probe in zip(self.by_byte, lone, strict=True) if not len(probe)] or [self.ends[:0]]
        )
        self.probe_byte = first[self.probes]


def grammar_sampler(model: Any, grammar: Any) -> Any:
    """llama.cpp's sampler for a grammar, which the caller frees.

    Args:
        model: a llama_model.
        grammar: a llama_cpp.LlamaGrammar, or a `ChatGrammar`.

    Raises:
        ValueError: it is not GBNF, or has no root rule.
    """
    try:
        if not isinstance(grammar, chat_native.ChatGrammar):
            if chat_native.functions() is None or grammar._root != "root":
                return _stock_sampler(model, grammar)
            grammar = chat_native.ChatGrammar({"grammar": grammar._grammar})
        return grammar.sampler(model)
    except ValueError as problem:
        raise ValueError(
            f"llama.cpp cannot read this grammar ({problem}); check its syntax (GBNF), and that it has a rule "
            f"{grammar._root!r}."
        ) from problem


def _stock_sampler(model: Any, grammar: Any) -> Any:
    vocab = lib.llama_model_get_vocab(model)
    sampler = lib.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), grammar._root.encode())
    if not sampler:
        raise ValueError("it says where when told to be verbose")
    return sampler


class Mask:
    """A grammar at a point of a text.

    Args:
        sampler: a llama.cpp grammar sampler, owned from here on.
        index: of the model's tokens.
        by_byte: whether its rules speak of text alone, so that a first byte can rule out tokens.
    """

    def __init__(self, sampler: Any, index: TokenIndex, by_byte: bool = True) -> None:
        self._sampler = sampler
        weakref.finalize(self, lib.llama_sampler_free, sampler)
        self._index = index
        self._by_byte = by_byte
        self._legal: Ids | None = None

    @classmethod
    def of(cls, grammar: Any, model: Any, index: TokenIndex) -> Mask:
        """The mask of a grammar (`grammar_sampler`) before the first token.

        Raises:
            ValueError: llama.cpp cannot parse the grammar.
        """
        return cls(grammar_sampler(model, grammar), index, by_byte="<" not in OF_TEXT.sub("", grammar._grammar))

    def allows(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Whether each of the ids may come next, shape of `ids`.

        Raises:
            ValueError: the grammar has become too much for llama.cpp.
        """
        candidates = np.zeros(len(ids), dtype=CANDIDATE)
        candidates["id"] = ids
        data = candidates.ctypes.data_as(lib.llama_token_data_p)
        array = lib.llama_token_data_array(data=data, size=len(ids), selected=-1, sorted=False)
        lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        allowed: npt.NDArray[np.bool_] = candidates["logit"] > -np.inf
        if not allowed.any() and (error := chat_native.grammar_error(self._sampler)) is not None:
            raise ValueError(f"the grammar cannot be kept to any further: {error}; make it simpler.")
        return allowed

    def legal(self) -> Ids:
        """All ids that may come next, in ascending order; kept until the next `accept`."""
        if self._legal is None:
            known = self._index
            if self._by_byte:
                probed = self.allows(known.probes)
                bytes_ = known.probe_byte[probed]
                ids = np.concatenate(
                    [known.ends, known.unprobed, *(known.by_byte[byte] for byte in bytes_ if byte >= 0)]
                )
            else:
                ids = np.concatenate([known.ends, *known.by_byte])
            self._legal = np.sort(ids[self.allows(ids)])
        return self._legal

    def forced(self) -> int | None:
        """The next token, if only one may come; the tokens of single bytes, which can spell any text, do not count."""
        if self._legal is None and self._by_byte and self.allows(self._index.probes).sum() > 1:
            return None
        legal = self.legal()
        if len(legal) > 1:
            legal = legal[~self._index.spelled[legal]]
        return int(legal[0]) if len(legal) == 1 else None

    def accept(self, token: int) -> None:
        """Go on with a token, which must be allowed: llama.cpp ends the process otherwise."""
        lib.llama_sampler_accept(self._sampler, token)
        self._legal = None

    def fork(self) -> Mask:
        """A copy that goes its own way."""
        other = Mask(lib.llama_sampler_clone(self._sampler), self._index, self._by_byte)
        other._legal = self._legal
        return other
