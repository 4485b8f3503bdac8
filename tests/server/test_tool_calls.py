"""Tools, schemas and errors of llama-server's chat, as OpenAI's clients expect them."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from children import GUARD, post, serving
from gemma_mtp.convert import Pair
from gemma_mtp.patches import source

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
TEMPLATE = f"{source.VENDORED}/models/templates/google-gemma-4-31B-it.jinja"
WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "kelvin"]},
        "City": {"type": "null"},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        "at": {"$ref": "#/$defs/place"},
        "exact": {"type": ["boolean", "null"]},
    },
    "required": ["unit", "days", "at", "exact"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "in": {"anyOf": [{"$ref": "#/$defs/place"}, {"const": 7}]}},
            "required": ["x", "in"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}
    for name, parameters in (("weather", WEATHER), ("clock", {"type": "object", "properties": {}}))
]


@pytest.fixture(scope="module")
def chat(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the template of the published models, by which llama.cpp knows how they call tools."""
    folder = tmp_path_factory.mktemp("server")
    template = source.unpack(folder, TEMPLATE) / TEMPLATE
    options = (
        "-c",
        4096,
        "--chat-template-file",
        template,
        "-np",
        2,
        "--reasoning",
        "off",
        "--alias",
        "demo,someone/demo",
    )
    with serving(SERVER, folder / "log", "-m", demo.target, "-c", 4096, *options) as url:
        yield url


def asked(url: str, **more: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    body = {"messages": [{"role": "user", "content": "Weather?"}], "temperature": 1.5, "max_tokens": 400, **more}
    choice: dict[str, Any] = post(f"{url}/v1/chat/completions", body)["choices"][0]
    return choice


def refused(url: str, path: str, body: Any = None, method: str = "POST") -> tuple[int, dict[str, Any]]:
    """Status and error of an answer; a body that is bytes is sent as it is."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"}, method=method)
    with pytest.raises(urllib.error.HTTPError) as told:
        urllib.request.urlopen(request, timeout=GUARD)
    error: dict[str, Any] = json.load(told.value)["error"]
    return told.value.code, error


def chosen(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("seed", range(6))
def test_a_named_tool_is_called_with_what_its_parameters_allow(seed: int, chat: str) -> None:
    choice = asked(chat, tools=TOOLS, tool_choice=chosen("weather"), seed=seed, max_tokens=3000)
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    given = json.loads(call["function"]["arguments"])
    assert given.keys() in ({"unit", "days", "at", "exact"}, {"City", "unit", "days", "at", "exact"})
    assert given["unit"] in ("celsius", "kelvin")
    assert 2 <= len(given["days"]) <= 3
    assert all(isinstance(day, int) for day in given["days"])
    assert given["exact"] in (True, False, None)
    assert given.get("City") is None
    place = given["at"]
    while place != 7:
        assert place.keys() == {"x", "in"}
        assert isinstance(place["x"], (int, float))
        place = place["in"]


@pytest.mark.parametrize("seed", range(3))
def test_text_in_arguments_is_taken_as_it_is(seed: int, chat: str) -> None:
    echo = {"type": "object", "properties": {"said": {"type": "string"}}, "required": ["said"]}
    tool = {"type": "function", "function": {"name": "echo", "parameters": echo}}
    ends = [['<|"|>', 15.0]]  # or the untrained model goes on for ever
    choice = asked(chat, tools=[tool], tool_choice=chosen("echo"), seed=seed, logit_bias=ends)
    assert choice["finish_reason"] == "tool_calls"
    given = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert given.keys() == {"said"}
    assert isinstance(given["said"], str)


BOUNDED = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-C]{3}-(x|y)$"},
        "long": {"type": "string", "minLength": 3, "maxLength": 6},
        "mark": {"type": "string", "pattern": r'^\d{2}"\.\w$'},
        "min": {"type": "string", "minLength": 4},
        "n": {"type": "integer", "minimum": 3, "exclusiveMaximum": 20},
        "short": {"type": "string", "maxLength": 2},
    },
    "required": ["code", "long", "mark", "min", "n", "short"],
}


@pytest.mark.parametrize("seed", range(6))
def test_bounds_of_arguments_are_kept(seed: int, chat: str) -> None:
    tool = {"type": "function", "function": {"name": "note", "parameters": BOUNDED}}
    ends = [['<|"|>', 20.0]]  # or the untrained model goes on for ever
    choice = asked(chat, tools=[tool], tool_choice=chosen("note"), seed=seed, logit_bias=ends)
    assert choice["finish_reason"] == "tool_calls"
    given = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert re.fullmatch(r"[A-C]{3}-(x|y)", given["code"])
    assert 3 <= len(given["long"]) <= 6
    assert re.fullmatch(r'\d{2}"\.\w', given["mark"])  # no escapes of JSON in what the model writes
    assert len(given["min"]) >= 4
    assert 3 <= given["n"] < 20
    assert len(given["short"]) <= 2


@pytest.mark.parametrize("strict", [True, False, None])
def test_what_a_grammar_cannot_say_is_an_error_of_a_strict_tool(strict: bool | None, chat: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 3}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "third", "parameters": parameters, "strict": strict}}
    if strict:
        body = {"messages": [{"role": "user", "content": "?"}], "tools": [tool]}
        status, error = refused(chat, "/v1/chat/completions", body)
        assert status == 400
        assert "tool 'third': JSON schema: #/properties/a/multipleOf " in error["message"]
    else:
        assert asked(chat, tools=[tool], tool_choice=chosen("third"))["message"]["tool_calls"]


def test_the_interface_of_responses_keeps_to_a_schema(chat: str) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    body = {"input": "?", "text": text, "max_output_tokens": 400, "temperature": 1.5}
    (message,) = [each for each in post(f"{chat}/v1/responses", body)["output"] if each["type"] == "message"]
    assert json.loads(message["content"][0]["text"]).keys() == {"n"}
    text["format"]["schema"] = {"type": "object", "minProperties": 1}
    status, error = refused(chat, "/v1/responses", body)
    assert status == 400
    assert "#/minProperties" in error["message"]
    assert post(f"{chat}/v1/responses", body | {"text": {"format": {"type": "text"}}})["output"]


@pytest.mark.parametrize("asked_for", ["schema", "tool"])
def test_without_thinking_an_answer_begins_with_what_was_asked_for(asked_for: str, chat: str) -> None:
    """However much the model would like to think."""
    wish: dict[str, Any] = {"tools": TOOLS[1:2], "tool_choice": "required"}
    if asked_for == "schema":
        wish = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}}
    more: dict[str, Any] = {"logit_bias": [["<|channel>", 40.0]], "max_tokens": 60, "temperature": 0}
    for thinking in (False, True):
        choice = asked(chat, **wish, **more, chat_template_kwargs={"enable_thinking": thinking})
        message = choice["message"]
        assert bool(message.get("reasoning_content")) == thinking
        if not thinking:
            assert message.get("tool_calls") or json.loads(message["content"]) in (True, False)


def test_a_tool_without_properties_is_called(chat: str) -> None:
    (call,) = asked(chat, tools=TOOLS, tool_choice=chosen("clock"))["message"]["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": "{}"}


def test_allowed_tools_are_those_that_may_be_called(chat: str) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [chosen("clock")]}}
    calls = asked(chat, tools=TOOLS, tool_choice=allowed, parallel_tool_calls=False)["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "clock", "arguments": "{}"}]


@pytest.mark.parametrize("choice", [chosen("other"), {"type": "function"}, 3, "sometimes"])
def test_a_choice_that_names_no_tool_is_refused(choice: Any, chat: str) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "tool_choice": choice}
    status, error = refused(chat, "/v1/chat/completions", body)
    assert status == 400
    assert "tool_choice" in error["message"]


def test_a_schema_beside_tools_keeps_them(chat: str) -> None:
    """An answer is a call, or what the schema allows."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(12):
        choice = asked(chat, tools=TOOLS[1:2], response_format=wanted, seed=seed, parallel_tool_calls=False)
        calls = choice["message"].get("tool_calls")
        kinds.add("call" if calls else "text")
        if calls:
            assert calls[0]["function"] == {"name": "clock", "arguments": "{}"}
        else:
            assert isinstance(json.loads(choice["message"]["content"])["n"], int)
    assert kinds == {"call", "text"}
    forced = asked(chat, tools=TOOLS[1:2], response_format=wanted, tool_choice="required")
    assert forced["message"]["tool_calls"][0]["function"]["name"] == "clock"
    off = asked(chat, tools=TOOLS[1:2], response_format=wanted, tool_choice="none")
    assert isinstance(json.loads(off["message"]["content"])["n"], int)


REFUSED: dict[str, dict[str, Any]] = {
    "#/properties/a/multipleOf": {"properties": {"a": {"type": "integer", "multipleOf": 3}}},
    "#/properties/a/minimum": {"properties": {"a": {"type": "number", "minimum": 3}}},
    "#/minProperties": {"minProperties": 1},
    "#/$defs/x/items/uniqueItems": {"$defs": {"x": {"items": {"type": "array", "uniqueItems": True}}}},
    "#/properties/a/pattern": {"properties": {"a": {"type": "string", "pattern": "a+"}}},
    "#/required": {"properties": {"a": {"type": "string"}}, "required": ["b"]},
    "#/properties": {"properties": {"a": {}}, "anyOf": [{"type": "object"}]},
    "#/allOf": {"properties": {"a": {}}, "allOf": [{"type": "object"}]},
    "#/not": {"not": {"required": ["a"]}},
    "#/properties/a": {"properties": {"a": {"$ref": "#/$defs/none"}}},
}


@pytest.mark.parametrize("path", REFUSED)
def test_a_schema_that_would_be_taken_for_another_is_refused_by_its_path(path: str, chat: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", **REFUSED[path]}}}
    body = {"messages": [{"role": "user", "content": "?"}], "response_format": wanted}
    status, error = refused(chat, "/v1/chat/completions", body)
    assert status == 400
    assert f" {path}" in error["message"]


def test_annotations_and_what_is_enforced_pass(chat: str) -> None:
    item = {"type": "integer", "minimum": 1, "exclusiveMaximum": 9, "description": "d", "examples": [3], "title": "T"}
    some = {"type": "array", "items": item, "maxItems": 4, "uniqueItems": False}
    text, mail = {"type": "string", "maxLength": 5}, {"type": "string", "format": "email"}
    schema = {"$schema": "x", "type": "object", "properties": {"a": some, "t": text, "m": mail}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    content = asked(chat, response_format=wanted)["message"]["content"]
    assert all(1 <= number < 9 for number in json.loads(content)["a"])


@pytest.mark.parametrize(
    "body", [b"", b"hello", b"[1", b'{"messages": 3}', b'"\xff"', b"[]", b"{" * 100000, b"[" * 129]
)
def test_what_is_no_request_is_refused_as_the_clients_fault(body: bytes, chat: str) -> None:
    status, error = refused(chat, "/v1/chat/completions", body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_prompt_that_is_too_long_has_openais_code(chat: str) -> None:
    body = {"messages": [{"role": "user", "content": "import sys\n" * 3000}]}
    for stream in (False, True):
        status, error = refused(chat, "/v1/chat/completions", {**body, "stream": stream})
        assert (status, error["code"]) == (400, "context_length_exceeded")


def test_a_model_is_told_of_by_its_name(chat: str) -> None:
    def told(path: str) -> Any:
        with urllib.request.urlopen(f"{chat}/v1/models{path}", timeout=GUARD) as answer:
            return json.load(answer)

    (model,) = told("")["data"]
    assert {model["id"], *model["aliases"]} == {"demo", "someone/demo"}
    assert told("/demo") == told("/someone/demo") == model
    status, error = refused(chat, "/v1/models/google/gemma", method="GET")
    assert (status, error["code"]) == (404, "model_not_found")
    assert "'google/gemma'" in error["message"]


@pytest.mark.parametrize("asked_for", ["schema", "tool"])
def test_definitions_that_double_at_each_level_are_read_once(asked_for: str, chat: str) -> None:
    """Two to the power of forty ways lead to the last of them."""
    levels: dict[str, Any] = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**levels, "a40": {"type": "object", "properties": {}}}}
    if asked_for == "schema":
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert json.loads(asked(chat, response_format=wanted)["message"]["content"]) == {}
    else:
        tool = {"type": "function", "function": {"name": "deep", "parameters": {
            "type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}}, "required": ["a"], "$defs": schema["$defs"]
        }}}  # fmt: skip
        (call,) = asked(chat, tools=[tool], tool_choice=chosen("deep"))["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": {}}
