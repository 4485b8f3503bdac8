"""Requests that ended a server, kept it busy or took its memory; and a few of those that `make fuzz-server` makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fuzz_server import CLIENTS, OPTIONS, alive, send, texts
from gemma_mtp.convert import Pair
from odd_requests import request
from odd_values import Written, written
from serves import Served, served

USER = {"role": "user", "content": "import os"}
FEW = {"max_tokens": 8, "temperature": 0}
NUMBERS = 200


@pytest.fixture(scope="module")
def running(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(demo.target, tmp_path_factory.mktemp("running"), *OPTIONS, GGML_NO_BACKTRACE="1") as found:
        yield found


@pytest.fixture(scope="module")
def first(running: Served) -> list[str]:
    """What every slot says before anything odd was asked."""
    return texts(running)


def by_schema(schema: Any) -> dict[str, Any]:
    return {"messages": [USER], **FEW, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def by_tool(schema: Any) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    return {"messages": [USER], **FEW, "tools": [tool], "tool_choice": "required"}


def by_grammar(text: str) -> dict[str, Any]:
    return {"prompt": "import os", "n_predict": 8, "grammar": text}


def doubled(n: int) -> str:
    """A grammar with two to the power of n ways to begin."""
    lines = [f"r{i} ::= r{i + 1} r{i + 1}" for i in range(n)]
    return "root ::= r0\n" + "\n".join(lines) + f'\nr{n} ::= "a"?'


NAMES = {"type": "object", "properties": {"é" * 300_000: {"type": "null"}}}
LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)} | {"d5000": {"type": "null"}}
MANY = {f"k{i}": i for i in range(100_000)}
DEEP = Written('{"type":["array","array"],"items":' * 60 + "{}" + "}" * 60)
PROPERTIES = {f"p{i}": {"type": "null"} for i in range(2000)}
ARENA = json.dumps({"parsers": [{"type": "sequence", "children": [0]}], "rules": {}, "root": 0})
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "look", "arguments": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"},
}
NESTED = Written('{"type":"object","properties":{"a":{"type":"null"},"b":' * 50 + "{}" + "}}" * 50)

# What is wrong with the request, or nothing where it only looks so: then it is answered.
BODIES: dict[str, tuple[str, Any, str]] = {
    "a maximum below the minimum": ("/completion", by_grammar('root ::= "a"{5,2}'), "failed to parse grammar"),
    "repetitions of much": ("/completion", by_grammar('root ::= "' + "a" * 9999 + '"{2000}'),
    "failed to parse grammar"),
    "groups in groups": ("/completion", by_grammar("root ::= " + "(" * 100_000 + '"a"'), "failed to parse grammar"),
    "a chain of rules": ("/completion",
    by_grammar("root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(99_999))
                         + '\nr99999 ::= "a"'), ""),
    "left recursion behind nothing": ("/completion", by_grammar('root ::= a root "x" | "y"\na ::= b\nb ::= ""'),
    "failed to parse"),
    "too many ways to begin": ("/completion", by_grammar(doubled(40)), "failed to parse grammar"),
    "no character": ("/completion", by_grammar("root ::= [z-a]"), "grammar"),
    "repetitions in repetitions": ("/completion", by_grammar("root ::= ((((.{0,9}){0,9}){0,9}){0,9}){0,9}"), ""),
    "a choice of many": ("/completion", by_grammar("root ::= " + '"a" | ' * 50_000 + '"b"'), ""),
    "many ways to go on": ("/completion", by_grammar("root ::= " + "[a-z]? " * 40 + '"."'), ""),
    "no way to go on": ("/completion", by_grammar(r"root ::= [^\x00-\U0010FFFF]"), ""),
    "a trigger with many ways": ("/completion", {**by_grammar('root ::= "a"'), "grammar_lazy": True,
    "grammar_triggers": [
        {"type": 2, "value": "((((((.+)+)+)+)+)+)+x$"}]}, ""),
    "a long trigger": ("/completion", {**by_grammar('root ::= "a"'), "grammar_lazy": True, "grammar_triggers": [
        {"type": 2, "value": "a" * 100_000}]}, "longer than"),
    "a kind of trigger that is none": ("/completion", {"prompt": "a", "grammar_triggers": [{"type": 9,
    "value": "a"}]}, "trigger"),
    "a chat format that is none": ("/completion", {"prompt": "a", "chat_format": 255}, "chat format"),
    "a parser that calls itself": ("/completion", {"prompt": "import os", "n_predict": 8, "chat_parser": ARENA,
    "chat_format": 0}, ""),
    "text of no length": ("/v1/chat/completions", by_schema({"type": "string", "minLength": 5, "maxLength": 2}),
    "below minLength"),
    "text of any length": ("/v1/chat/completions", by_schema({"type": "string", "maxLength": 65536}), ""),
    "a large minimum": ("/v1/chat/completions", by_schema({"type": "integer", "minimum": 10**17}), ""),
    "a long name": ("/v1/chat/completions", by_schema(NAMES), ""),
    "a long name beside others": ("/v1/chat/completions", by_schema(NAMES | {"additionalProperties": True}),
    "longer than"),
    "references in a circle": ("/v1/chat/completions", by_schema({"$ref": "#/$defs/a", **LOOP}), "grammar"),
    "all of a circle": ("/v1/chat/completions", by_schema({"allOf": [{"$ref": "#/$defs/a"}], **LOOP}),
    "leads to itself"),
    "a chain of references": ("/v1/chat/completions", by_schema({"$ref": "#/$defs/d0", "$defs": CHAIN}), "too deep"),
    "types that double": ("/v1/chat/completions", by_schema(DEEP), "too large"),
    "many properties": ("/v1/chat/completions", by_schema({"type": "object", "properties": PROPERTIES}), ""),
    "the same in a tool": ("/v1/chat/completions", by_tool({"type": "object", "properties": PROPERTIES}), ""),
    "properties in properties": ("/v1/chat/completions", by_tool(NESTED), ""),
    "arguments that nest": ("/v1/chat/completions", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}],
    **FEW}, ""),
    "a body that is no object": ("/v1/chat/completions", [], ""),
    "many members": ("/v1/chat/completions", {"messages": [USER], **FEW, "metadata": MANY}, "members"),
    "two answers by no grammar": ("/completion", by_grammar("root ::= (") | {"n": 2}, "grammar"),
    "a long memory": ("/completion", {"prompt": "a", "n_predict": 8, "repeat_last_n": 2**31 - 1, "dry_multiplier": 1,
                                      "dry_penalty_last_n": 2**31 - 1}, ""),
    "many samplers": ("/completion", {"prompt": "a", "samplers": ["penalties"] * 9999}, "samplers"),
    "many breakers": ("/completion", {"prompt": "a", "dry_sequence_breakers": ["a"] * 9999}, "breakers"),
    "many prompts": ("/completion", {"prompt": ["a"] * 5000, "n_predict": 1}, "prompts"),
    "a token that is none": ("/detokenize", {"tokens": [2**31 - 1]}, "range"),
    "tools that are none": ("/v1/chat/completions", {"messages": [USER], "tools": 3}, "tools"),
    "biases beyond all numbers": ("/completion", {"prompt": "a", "n_predict": 8, "logit_bias": [[i,
    1e308] for i in range(99)]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_request_ends_neither_the_server_nor_a_slot(name: str, running: Served, first: list[str]) -> None:
    path, body, wrong = BODIES[name]
    answer = running.ask(path, written(body).encode("utf-8", "surrogatepass"))
    assert alive(running), running.errors.read_text()[-2000:]
    assert answer.status in ((400,) if wrong else (200, 400)), answer.text[:1000]
    if answer.status == 400:
        assert wrong in answer.json["error"]["message"], answer.text[:1000]
        assert answer.json["error"]["type"] in ("invalid_request_error", "exceed_context_size_error")
    assert texts(running) == first


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
def test_another_method_than_a_path_has(method: str, running: Served) -> None:
    answer = running.ask("/v1/chat/completions", method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert running.ask("/v1/nothing", method=method).status == 404


def test_odd_requests_are_answered_as_such(running: Served, first: list[str]) -> None:
    with ThreadPoolExecutor(CLIENTS) as clients:
        sent = [*map(request, range(NUMBERS))]
        outcomes = [*clients.map(lambda each: send(running.root, each), sent)]
    assert alive(running), running.errors.read_text()[-2000:]
    assert not [f"{outcome.fault}\n{each}" for each, outcome in zip(sent, outcomes, strict=True) if outcome.fault]
    assert texts(running) == first
