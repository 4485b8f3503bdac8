"""Strings under a pattern: valid JSON that the pattern matches, or an error that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, chat_native
from llamas import OPTIONS

pytestmark = pytest.mark.skipif(chat_native.functions() is None, reason="needs libllama-common with our series")
DRAWN = {"max_tokens": 96, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        yield llm


def asked(pattern: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "of", "schema": {"type": "string", "pattern": pattern}}}


@pytest.mark.parametrize(
    "pattern",
    [
        "^[a-z]{1,8}$", "^.{1,8}$", "^[ -~]{1,8}$", "^[^a]{1,8}$", '^["x]{3}$', '^"$', r"^\\$", r"^a\nb$",
        r"^[\n\t]{2}$", "^a\x01b$", r"^\d{4}$", r"^\w+\s\w{2,3}$", r"^[\d.,]{1,5}$", r"^\D\W\S$", r"^ab\.{2,3}$",
        r"^(?:\(\d\)|x\-y)$", "^[a-]{2}$", "^[x[]{2}$", "^é{2}[à-ü]$", r"^\u00e9[^\u0000-\u00ff]?$", r"^a\/b$", "^$",
    ],
)  # fmt: skip
def test_a_string_is_json_and_matches_its_pattern(pattern: str, mtp: Llama) -> None:
    for seed in range(6):
        answer = mtp.create_completion("import os", **DRAWN, seed=seed, response_format=asked(pattern))["choices"][0]
        if answer["finish_reason"] == "stop":
            assert re.fullmatch(pattern, json.loads(answer["text"])), answer["text"]
        else:
            assert answer["text"].startswith('"')


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a", "between \\^ and \\$"), (r"^a\b$", r"unsupported escape: \\b"), (r"^\p{L}$", "unsupported escape"),
        (r"^(a)\1$", "unsupported escape"), ("^(?=a)$", "group"), ("^[z-a]$", "ends before it begins"),
        ("^a{x}$", "invalid number"), ("^a{2$", "unterminated"), ("^(a$", "unbalanced"), ("^a)$", "unbalanced"),
        ("^*$", "nothing to repeat"), ("^[a$", "unterminated"), ("^a$b$", "anchor"), (r"^[\D]$", "escape"),
        (r"^[a-\d]$", "range"), ("^[]$", "without a character"), ("^a\\$", "trailing"),
    ],
)  # fmt: skip
def test_what_no_grammar_says_is_refused(pattern: str, why: str, mtp: Llama) -> None:
    with pytest.raises(ValueError, match=rf"#/pattern .*{why}"):
        mtp.create_completion("import os", max_tokens=4, response_format=asked(pattern))
