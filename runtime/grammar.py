"""Which tokens a grammar allows, for the target and for drafts."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.runtime import chat_native, native
from llama_cpp import llama_cpp as lib

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


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
        n_vocab: size of the vocabulary.
    """

    def __init__(self, sampler: Any, n_vocab: int) -> None:
        self._sampler, self._n_vocab = sampler, n_vocab
        weakref.finalize(self, lib.llama_sampler_free, sampler)
        self._legal: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, grammar: Any, model: Any, n_vocab: int) -> Mask:
        """The mask of a grammar (`grammar_sampler`) before the first token.

        Raises:
            ValueError: llama.cpp cannot parse the grammar.
        """
        return cls(grammar_sampler(model, grammar), n_vocab)

    def allows(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each of the ids may come next, shape of `ids`, each asked about by itself.

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

    def legal(self) -> npt.NDArray[np.bool_]:
        """Whether each token may come next, shape [n_vocab]; kept until the next `accept`."""
        if self._legal is None:
            known = native.grammar_allows(self._sampler, self._n_vocab)
            self._legal = self.allows(np.arange(self._n_vocab)) if known is None else known
        return self._legal

    def forced(self) -> int | None:
        """The next token, if only one may come; the tokens of single bytes, which can spell any text, do not count."""
        return native.grammar_forces(self._sampler)

    def accept(self, token: int) -> None:
        """Go on with a token, which must be allowed: llama.cpp ends the process otherwise."""
        lib.llama_sampler_accept(self._sampler, token)
        self._legal = None

    def fork(self) -> Mask:
        """A copy that goes its own way."""
        other = Mask(lib.llama_sampler_clone(self._sampler), self._n_vocab)
        other._legal = self._legal
        return other
