"""What libllama says a grammar allows of the whole vocabulary is what it says of each token by itself."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime.grammar import CANDIDATE
from llama_cpp import llama_cpp as lib
from mtp_library import allowed, forced

STRING = r"""char ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
"""
ALTERNATIVES = " | ".join(f'"{word}"' for word in [*(f"{n:02d}" for n in range(0, 100, 7)), *"abcdefgh", "import", "é"])
GRAMMARS = {
    "any value": r"""root ::= value
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" char* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
    + STRING,
    "bounded strings": 'root ::= "{\\"name\\":\\"" char{2,9} "\\",\\"lines\\":[" char{0,3} "]}"\n' + STRING,
    "classes": "root ::= ([a-z]+ [ \\n] | [A-Z] [a-z_.]{1,5} | [^a-zA-Z \\n] | [\\u03B1-\\u03C9é] .)+",
    "many ways": f"root ::= word (word word)*\nword ::= {ALTERNATIVES}",
    "beyond ASCII": 'root ::= ("é" | "ü" [\\x80-\\U0010FFFF]{1,3} | [一-龥]+ "." | "z")+',
    "the end": 'root ::= "import" " os"?',
}  # fmt: skip


@pytest.fixture(scope="module")
def vocab(demo: Pair) -> Iterator[Any]:
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(demo.target).encode(), params)
    yield lib.llama_model_get_vocab(model)
    lib.llama_model_free(model)


@contextmanager
def sampler(vocab: Any, grammar: str) -> Iterator[Any]:
    made = lib.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    assert made
    yield made
    lib.llama_sampler_free(made)


def one_by_one(made: Any, n_vocab: int) -> Any:
    """Asked about so few at a time that no mask is made."""
    row = np.zeros(n_vocab, dtype=CANDIDATE)
    row["id"] = np.arange(n_vocab)
    for first in range(0, n_vocab, 16):
        few = row[first : first + 16]
        array = lib.llama_token_data_array(few.ctypes.data_as(lib.llama_token_data_p), len(few), -1, False)
        lib.llama_sampler_apply(made, ctypes.byref(array))
    return row["logit"] > -np.inf


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_masks(grammar: str, vocab: Any) -> None:
    """Along texts chosen at random, byte tokens among them, so that masks are asked for within characters too."""
    n_vocab, some = lib.llama_vocab_n_tokens(vocab), random.Random(3)
    bytes_ = {token for token in range(n_vocab) if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_BYTE}
    within = 0
    for walk in range(4):
        with sampler(vocab, grammar) as made:
            for _ in range(12):
                mask = allowed(made, n_vocab)
                assert (mask == one_by_one(made, n_vocab)).all()
                every = np.flatnonzero(mask).tolist()
                spelled = [token for token in every if token in bytes_]
                text = [token for token in every if token not in bytes_]
                only = text if len(text) == 1 else every if len(every) == 1 else [lib.LLAMA_TOKEN_NULL]
                assert forced(made) == only[0]
                open_ = [token for token in every if not lib.llama_vocab_is_eog(vocab, token)]
                if not open_:
                    break
                within += not text
                among = spelled if walk % 2 and spelled else open_
                lib.llama_sampler_accept(made, some.choice(among))
    assert within or grammar != GRAMMARS["beyond ASCII"]


def test_a_copy_goes_its_own_way(vocab: Any) -> None:
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    with sampler(vocab, 'root ::= "a" "b" | "c" "d"') as made:
        first = allowed(made, n_vocab)
        other = lib.llama_sampler_clone(made)
        token = int(np.flatnonzero(first)[0])
        lib.llama_sampler_accept(other, token)
        assert (allowed(made, n_vocab) == first).all()
        assert (allowed(other, n_vocab) != first).any()
        assert (allowed(other, n_vocab) == one_by_one(other, n_vocab)).all()
        lib.llama_sampler_free(other)


def test_tokens_by_their_names(vocab: Any) -> None:
    """A token that a grammar names is no part of another one's text; whatever is allowed can be gone on with."""
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    with sampler(vocab, 'root ::= ("import" <[7]> | !<[9]>) "z"+') as made:
        mask = allowed(made, n_vocab)
        assert (mask == one_by_one(made, n_vocab)).all()
        assert mask[7] and not mask[9]
        for token in np.flatnonzero(mask)[:200].tolist():
            other = lib.llama_sampler_clone(made)
            lib.llama_sampler_accept(other, token)
            lib.llama_sampler_free(other)
