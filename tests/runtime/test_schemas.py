"""Schemas: what a grammar allows is valid, keyword beside keyword, or an error names the keyword by its path."""

from __future__ import annotations

import datetime
import ipaddress
import json
import random
import re
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from chats import USER, by_schema, tool
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, chat_native
from gemma_mtp.runtime.chat import format_grammar
from gemma_mtp.runtime.grammar import Mask, grammar_sampler
from llama_cpp import llama_cpp as lib
from llamas import OPTIONS

pytestmark = pytest.mark.skipif(chat_native.functions() is None, reason="needs libllama-common with our series")


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        yield llm


def mask(schema: Any, llm: Llama) -> Mask:
    """The grammar of a schema, before the first token."""
    model = llm._model.model
    return Mask(grammar_sampler(model, format_grammar(by_schema(schema))), llm.n_vocab())


def takes(schema: Any, value: Any, llm: Llama) -> bool:
    """Whether a value is an answer that the grammar of a schema allows."""
    at = mask(schema, llm)
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for token in [*llm.tokenize(text.encode(), add_bos=False), llm.token_eos()]:
        if not at.allows(np.array([token]))[0]:
            return False
        at.accept(token)
    return True


def walk(schema: Any, llm: Llama, some: random.Random, longest: int = 600, spelled: bool = False) -> Any:
    """A value at the end of a random way through the grammar of a schema; None where that is too far.

    Args:
        spelled: by tokens of single bytes where there are any.
    """
    at, tokens = mask(schema, llm), list[int]()
    vocab = lib.llama_model_get_vocab(llm._model.model)
    while len(tokens) < longest:
        allowed = np.flatnonzero(at.legal()).tolist()
        open_ = [token for token in allowed if not lib.llama_vocab_is_eog(vocab, token)]
        if not open_ or (len(open_) < len(allowed) and some.random() < 0.3):
            return json.loads(llm.detokenize(tokens).decode())
        bytes_ = [token for token in open_ if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_BYTE]
        tokens.append(some.choice((spelled and bytes_) or open_))
        at.accept(tokens[-1])
    return None


STRING: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer"}
PAIR: list[Any] = [STRING, WHOLE]


def thing(kind: str, required: tuple[str, ...] = ("kind",), **more: Any) -> dict[str, Any]:
    """An object that says what kind it is."""
    return {"type": "object", "properties": {"kind": {"const": kind}, **more}, "required": list(required)}


# A schema, values that it has and its grammar takes, and values that it has not.
KEPT: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "the narrower of two bounds": (
        WHOLE | {"minimum": 2, "exclusiveMinimum": 4, "maximum": 9, "exclusiveMaximum": 9}, [5, 8], [2, 4, 9, 11]),
    "a bound below nought": (WHOLE | {"maximum": -5}, [-5, -50], [-4, 5]),
    "bounds of a whole number that may be null": ({"type": ["integer", "null"], "minimum": 3}, [3, None], [2, "x"]),
    "values of a type": ({"type": "string", "enum": ["a", 1, None]}, ["a"], [1, None]),
    "values of types": ({"type": ["string", "null"], "enum": ["a", 1, None]}, ["a", None], [1]),
    "values within bounds": (WHOLE | {"enum": [1, 5, 9], "minimum": 2, "exclusiveMaximum": 9}, [5], [1, 9]),
    "values of a length": (STRING | {"enum": ["a", "éé", "long"], "minLength": 2, "maxLength": 3}, ["éé"], ["a"]),
    "a value of a type": (STRING | {"const": "a"}, ["a"], ["b"]),
    "keywords of other types": (WHOLE | {"minLength": 3, "pattern": "a", "format": "int32", "items": {}}, [1], ["a"]),
    "items one by one, and how many": (
        {"type": "array", "prefixItems": PAIR, "items": False, "minItems": 2, "maxItems": 2}, [["a", 1]], [["a"], [1]]),
    "items one by one, of a draft before": (
        {"type": "array", "items": PAIR, "additionalItems": False, "minItems": 1}, [["a", 1]], [["a", 1, 2]]),
    "items one by one, and some more": ({"prefixItems": PAIR, "items": WHOLE}, [["a", 1]], [["a", "b"]]),
    "fewer items than are listed": ({"type": "array", "prefixItems": PAIR, "maxItems": 1}, [["a"]], [["a", 1], []]),
    "a pattern that may be empty": (STRING | {"pattern": "^a*$", "minLength": 0}, ["", "aa"], ["b"]),
    "a format that is none": (STRING | {"format": "password", "minLength": 2}, ["ab"], ["a"]),
    "a format that a pattern says": (STRING | {"pattern": "^a+$", "format": "date"}, ["aa"], ["2024-02-29", "b"]),
    "a format of a length": (STRING | {"format": "uri", "minLength": 1, "maxLength": 2083}, ["https://a.b/c"], [""]),
    "a type beside references": (
        {"type": "object", "$ref": "#/$defs/a", "$defs": {"a": thing("a")}}, [{"kind": "a"}], [{}, 1]),
    "all of one": ({"allOf": [STRING | {"minLength": 2}]}, ["ab"], ["a", {}]),
    "all of one, by reference": ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": WHOLE}}, [7], [{}, "a"]),
    "all of some values": ({"allOf": [{"enum": ["a", "b", "b"]}, {"enum": ["c", "a"]}, {}]}, ["a"], ["b", "c"]),
    "all of some objects": (
        {"allOf": [thing("a", x=WHOLE), {"properties": {"y": STRING}, "required": ["y"]}]},
        [{"kind": "a", "x": 1, "y": ""}], [{"kind": "a"}, {"y": "b"}]),
    "one of some kinds": ({"oneOf": [thing("a"), thing("b", x=WHOLE)]}, [{"kind": "a"}, {"kind": "b", "x": 1}], [{}]),
    "one of several types": ({"oneOf": [STRING, WHOLE, {"enum": [None, True]}]}, ["a", 1, None], [False, [], 1.5]),
    "one of what others lack": (
        {"oneOf": [{"properties": {n: STRING}, "required": [n], "additionalProperties": False} for n in "ab"]},
        [{"a": "x"}, {"b": "x"}], [{}, {"a": "x", "b": "x"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_keywords_beside_each_other_are_kept_to(name: str, mtp: Llama) -> None:
    schema, right, wrong = KEPT[name]
    assert [value for value in right if not takes(schema, value, mtp)] == []
    assert [value for value in wrong if takes(schema, value, mtp)] == []


# A schema, and what is said of it.
REFUSED: list[tuple[Any, str]] = [
    (STRING | {"format": "iri"}, "#/format is not supported: 'iri'"),
    ({"properties": {"a": {"type": ["string", "null"], "format": "regex"}}}, "#/properties/a/format is not supported"),
    ({"format": "email"}, "#/format is supported beside a type alone"),
    (STRING | {"pattern": "^a+$", "minLength": 2}, "#/minLength is not supported beside pattern"),
    (STRING | {"pattern": "^a+$", "maxLength": 2}, "#/maxLength is not supported beside pattern"),
    (STRING | {"format": "date", "maxLength": 9}, "#/maxLength is not supported beside the format date"),
    (STRING | {"format": "uuid", "minLength": 40}, "#/minLength is not supported beside the format uuid"),
    (STRING | {"minLength": 3, "maxLength": 2}, "#: maxLength is below minLength"),
    (STRING | {"enum": ["a"], "pattern": "^a$"}, "#/pattern is not supported beside enum"),
    (STRING | {"const": "a", "format": "date"}, "#/format is not supported beside const"),
    (STRING | {"enum": [1, 2]}, "#/enum holds nothing that is valid"),
    (STRING | {"const": 1}, "#/const holds nothing that is valid"),
    ({"const": "a", "enum": ["b"]}, "#/const holds nothing that is valid"),
    ({"enum": [[1]], "minItems": 2}, "#/minItems is not supported beside enum"),
    (WHOLE | {"minimum": 5, "exclusiveMaximum": 5}, "#: minimum and maximum leave no integer"),
    ({"type": ["number", "null"], "minimum": 5}, "#/minimum is supported for integers alone"),
    ({"minItems": 2}, "#/minItems is supported beside a type alone"),
    ({"required": ["a"]}, "#/required is supported beside a type alone"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "#/required names 'a'"),
    ({"type": "object", "required": ["a"], "properties": {"b": {}}}, "#/required names 'a'"),
    ({"type": "array", "prefixItems": PAIR, "minItems": 3}, "#/minItems is more than the 2 items"),
    ({"type": "array", "items": STRING, "minItems": 3, "maxItems": 2}, "#: maxItems is below minItems"),
    ({"type": "array", "items": PAIR, "prefixItems": PAIR}, "#/prefixItems is not supported beside items"),
    ({"anyOf": [STRING, WHOLE], "type": "string"}, "#/type is not supported beside anyOf"),
    ({"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {}}}, r"#/type is not supported beside \$ref"),
    ({"$ref": "#/$defs/a", "minLength": 2, "$defs": {"a": STRING}}, r"#/minLength is not supported beside \$ref"),
    ({"anyOf": [STRING], "format": "date"}, "#/format is not supported beside anyOf"),
    ({"anyOf": [{"type": "object"}], "additionalProperties": False}, "#/additionalProperties is not .* beside anyOf"),
    ({"oneOf": [STRING], "anyOf": [STRING]}, "#/anyOf is not supported beside oneOf"),
    ({"type": "integer", "allOf": [{"minimum": 1}]}, "#/allOf is not supported beside a type"),
    ({"type": "object", "additionalProperties": False, "allOf": [thing("a")]}, "#/allOf is not supported beside"),
    ({"allOf": [STRING, {"minLength": 2}]}, "#/allOf/0 is supported for objects, or lists of values, alone"),
    ({"allOf": [{"enum": [1]}, {"enum": [2]}]}, "#/allOf leaves no value"),
    ({"allOf": [{"properties": {"x": WHOLE}}, {"properties": {"x": STRING}}]}, "#/allOf/1 has two schemas for 'x'"),
    ({"allOf": [thing("a"), thing("a") | {"additionalProperties": False}]}, "#/allOf/1 .* additionalProperties"),
    ({"allOf": [{"properties": {"a": {}}}, {"anyOf": [thing("a"), thing("b")]}]}, "#/allOf/1 .* require"),
    ({"oneOf": [STRING, STRING | {"minLength": 2}]}, "#/oneOf may hold for 0 and 1 at once"),
    ({"oneOf": [WHOLE, {"type": "number"}]}, "#/oneOf may hold for 0 and 1 at once"),
    ({"oneOf": [thing("a", ()), thing("b", ())]}, "#/oneOf may hold"),
    ({"$ref": "#/x/a", "x": {"a": STRING | {"format": "iri"}}}, "#/x/a/format is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=[json.dumps(schema) for schema, _ in REFUSED])
def test_what_no_grammar_says_is_refused_by_its_path(schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        format_grammar(by_schema(schema))
    assert "\n" not in str(raised.value)


def test_a_chat_and_a_strict_tool_refuse_the_same(mtp: Llama) -> None:
    odd = {"type": "object", "properties": {"a": STRING | {"format": "iri"}}}
    with pytest.raises(ValueError, match="#/properties/a/format"):
        mtp.create_chat_completion([USER], max_tokens=1, response_format=by_schema(odd))
    with pytest.raises(ValueError, match=r"tool 'f': .*#/properties/a/format"):
        mtp.create_chat_completion([USER], max_tokens=1, tools=[tool("f", odd, strict=True)])
    assert mtp.create_chat_completion([USER], max_tokens=1, tools=[tool("f", odd)])


def test_a_number_below_a_bound_is_json(mtp: Llama) -> None:
    """No number of several digits begins with 0."""
    some = random.Random(2)
    assert all(walk(WHOLE | {"maximum": -3}, mtp, some) <= -3 for _ in range(40))


def test_bytes_spell_characters(mtp: Llama) -> None:
    """What is no UTF-8 would be lost where an answer is read, and the length be another one."""
    some = random.Random(3)
    for _ in range(20):
        text = walk(STRING | {"minLength": 3, "maxLength": 12}, mtp, some, spelled=True)
        assert 3 <= len(text) <= 12


LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def is_hostname(text: str) -> bool:
    return re.fullmatch(rf"{LABEL}(?:\.{LABEL})*", text) is not None and len(text) <= 253


def is_email(text: str) -> bool:
    local, _, domain = text.rpartition("@")
    atoms = local.split(".")
    return 0 < len(local) <= 64 and all(atoms) and "@" not in local and is_hostname(domain) and len(text) <= 254


def is_uri(text: str) -> bool:
    parts = urllib.parse.urlsplit(text)
    known = re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:(?:[\w.~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*", text, re.ASCII)
    return bool(known and parts.scheme) and (not parts.netloc or bool(parts.hostname)) and text.count("#") <= 1


def is_duration(text: str) -> bool:
    parts = re.fullmatch(
        r"P(?:(?P<w>\d+W)|(?P<y>\d+Y)?(?P<m>\d+M)?(?P<d>\d+D)?(?P<t>T(?P<h>\d+H)?(?P<n>\d+M)?(?P<s>\d+S)?)?)", text
    )
    if not parts or text in ("P", "PT") or text.endswith("T"):
        return False
    gaps = (parts["y"] and parts["d"] and not parts["m"]) or (parts["h"] and parts["s"] and not parts["n"])
    return not gaps


def parsed_by(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    """Whether a parser takes a text."""

    def judge(text: str) -> bool:
        try:
            return bool(parse(text)) or True
        except ValueError:
            return False

    return judge


def of_version(text: str) -> bool:
    return uuid.UUID(text).version == 4


# A format, who knows what is of it, and texts that are and are not.
FORMATS: dict[str, tuple[Callable[[str], bool], list[str], list[str]]] = {
    "date": (parsed_by(datetime.date.fromisoformat), ["2024-02-29", "2000-02-29", "1999-12-31", "0070-08-31"],
             ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "2024-1-1", "0000-01-01"]),
    "time": (parsed_by(datetime.time.fromisoformat),
             ["23:59:59Z", "00:00:00.123+02:00"], ["24:00:00Z", "12:00:00", "1:0:0Z"]),
    "date-time": (parsed_by(datetime.datetime.fromisoformat),
                  ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-29"]),
    "duration": (is_duration, ["P1D", "PT36H", "P1Y2M3DT4H5M6S", "P2W"],
                 ["P", "PT", "P1Y2D", "PT1H2S", "P1WT1H", "1D"]),
    "uuid": (parsed_by(uuid.UUID), ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
    "uuid4": (of_version, ["123e4567-e89b-42d3-a456-426614174000"], ["123e4567-e89b-12d3-a456-426614174000"]),
    "email": (is_email, ["a@b.cc", "first.last+tag@mail.example.co.uk"],
              ["a", "a@b", "a..b@c.dd", ".a@b.cc", "a@-b.cc"]),
    "hostname": (is_hostname, ["localhost", "xn-a.example.com", "3com.net"], ["", "-a", "a-", "a..b", "a_b", "a."]),
    "ipv4": (parsed_by(ipaddress.IPv4Address), ["127.0.0.1", "255.249.99.0"], ["256.0.0.1", "01.2.3.4", "1.2.3"]),
    "ipv6": (parsed_by(ipaddress.IPv6Address), ["::", "::1", "fe80::1:2", "1:2:3:4:5:6:7:8", "1::8", "1:2:3:4:5:6:7::"],
             [":", ":::", "1::2::3", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "12345::"]),
    "uri": (is_uri, ["https://example.com", "http://localhost:3000/a%20b?c=d#e", "mailto:a@b.cc", "urn:isbn:1"],
            ["example.com", "http://", "https://a b", "//a.b", "http://a.b/%2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, mtp: Llama) -> None:
    judge, right, wrong = FORMATS[name]
    schema = STRING | {"format": name}
    assert [text for text in right if not (judge(text) and takes(schema, text, mtp))] == []
    assert [text for text in wrong if takes(schema, text, mtp)] == []
    some = random.Random(name)
    found = [text for _ in range(20) if (text := walk(schema, mtp, some)) is not None]
    assert found
    assert [text for text in found if not judge(text)] == []


def test_a_tool_keeps_to_formats(mtp: Llama) -> None:
    """The arguments of Gemma 4's tools are no JSON, and have the same patterns."""
    dated = {"type": "object", "properties": {"a": STRING | {"format": "date"}}, "required": ["a"]}
    given: dict[str, Any] = {
        "tools": [tool("f", dated)],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    for seed in range(4):
        (choice,) = mtp.create_chat_completion([USER], max_tokens=64, temperature=1.0, seed=seed, **given)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert datetime.date.fromisoformat(json.loads(call["function"]["arguments"])["a"])


def test_many_fields_of_a_format_are_no_larger_than_one(mtp: Llama) -> None:
    """The rules of a format are there once."""
    fields = {f"f{i}": STRING | {"format": "uri"} for i in range(40)}
    grammar = format_grammar(by_schema({"type": "object", "properties": fields}))
    assert grammar is not None
    assert grammar._grammar.count("%") < 10
