"""Chats, tools and schemas of `Llama`: as from llama-server, valid, refused where they cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import (
    BOUNDED,
    NAMED,
    PLACE,
    REFUSED,
    REQUESTS,
    TOOLS,
    USER,
    by_schema,
    deep_schema,
    doubling,
    is_bounded,
    is_place,
    nested,
    tool,
)
from gemma_mtp.convert import Pair
from gemma_mtp.patches import source
from gemma_mtp.runtime import Llama, chat, chat_native
from gemma_mtp.runtime.grammar import Mask
from llama_cpp import LlamaGrammar
from llamas import OPTIONS, drafting
from serves import Served, served

pytestmark = pytest.mark.skipif(chat_native.functions() is None, reason="needs libllama-common with our series")
TOKENS = 160
GOOGLES = f"{source.VENDORED}/models/templates/google-gemma-4-31B-it.jinja"


@pytest.fixture(scope="module")
def llm(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS | {"n_ctx": 2048})) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(demo.target, tmp_path_factory.mktemp("served"), "-c", 2048) as running:
        yield running


def of(choice: dict[str, Any]) -> dict[str, Any]:
    """What a choice says, without the ids of calls, which are drawn."""
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    thought = message.get("reasoning_content")
    return {"text": message["content"], "thought": thought, "calls": calls, "finish": choice["finish_reason"]}


def joined(chunks: list[Any]) -> dict[str, Any]:
    """What a stream says: its deltas put together as clients do it."""
    made: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}, "finish": None}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        made["finish"] = made["finish"] or choice["finish_reason"]
        for key in ("content", "reasoning_content"):
            made[key] += choice["delta"].get(key) or ""
        for call in choice["delta"].get("tool_calls", ()):
            known = made["calls"].setdefault(call["index"], {"name": "", "arguments": "", "id": ""})
            known["id"] += call.get("id", "")
            for key in ("name", "arguments"):
                known[key] += call["function"].get(key, "")
    calls = [(call["name"], call["arguments"]) for call in made["calls"].values()]
    assert all(call["id"] for call in made["calls"].values())
    return {"text": made["content"], "thought": made["reasoning_content"] or None, "calls": calls,
            "finish": made["finish"]}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_it_is_what_llama_server_makes(name: str, llm: Llama, server: Served) -> None:
    """Prompt, its tokens and the answer; whole, in a stream, and without drafts."""
    asked = REQUESTS[name]
    given = {**asked, "max_tokens": TOKENS, "temperature": 0.0}
    theirs = server.ask("/v1/chat/completions", {**given, "cache_prompt": False}).json
    prompt = server.ask("/apply-template", asked).json["prompt"]
    tokens = server.ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True}).json["tokens"]
    templates = llm._templates
    assert templates is not None
    assert templates.prepare(asked)["prompt"] == prompt
    assert chat.prepare(llm, templates, {"grammar": None, **asked}, llm.projector).prompt == tokens
    with drafting(llm):
        ours = llm.create_chat_completion(**given)
        chunks = list(llm.create_chat_completion(**given, stream=True))
    expected = of(theirs["choices"][0])
    assert of(ours["choices"][0]) == expected
    assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
    assert joined(chunks) == {**expected, "text": expected["text"] or ""}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert of(llm.create_chat_completion(**given, mtp=False)["choices"][0]) == expected


@pytest.mark.parametrize("seed", range(15))
def test_an_answer_under_a_schema_is_valid(seed: int, llm: Llama) -> None:
    """At temperature 1, of all tokens: the model knows nothing of JSON."""
    wild: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed}
    given = llm.create_chat_completion([USER], response_format=by_schema(PLACE), max_tokens=500, **wild)
    assert given["choices"][0]["finish_reason"] == "stop"
    assert is_place(json.loads(given["choices"][0]["message"]["content"]))
    made = llm.create_completion("x = ", response_format=by_schema(BOUNDED), max_tokens=500, **wild)
    assert made["choices"][0]["finish_reason"] == "stop"
    assert is_bounded(json.loads(made["choices"][0]["text"]))


@pytest.mark.parametrize("seed", range(5))
def test_a_tool_that_is_named_is_called(seed: int, llm: Llama) -> None:
    choice = llm.create_chat_completion(
        [USER], tools=TOOLS, tool_choice=NAMED, max_tokens=500, temperature=1.0, seed=seed
    )["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    ((name, arguments),) = of(choice)["calls"]
    assert name == "weather"
    assert is_place(json.loads(arguments))


def test_functions_are_told_as_they_were_once(llm: Llama) -> None:
    functions = [each["function"] for each in TOOLS]
    given: dict[str, Any] = {"functions": functions, "function_call": {"name": "weather"}, "max_tokens": 500}
    message = llm.create_chat_completion([USER], **given, temperature=0.0)["choices"][0]["message"]
    assert message["function_call"] == message["tool_calls"][0]["function"]
    assert is_place(json.loads(message["function_call"]["arguments"]))


def calling(llm: Llama) -> dict[str, Any]:
    """Settings under which the model, which knows no tools, begins to call one by itself."""
    (mark,) = llm.tokenize(b"<|tool_call>", add_bos=False, special=True)
    return {"temperature": 0.0, "logit_bias": {mark: 12.0}, "max_tokens": 120}


def test_a_call_that_the_model_begins_keeps_to_the_tool(llm: Llama) -> None:
    """The grammar sets in with the mark; drafts or not, the text is the same."""
    given = {"tools": TOOLS, **calling(llm)}
    with drafting(llm):
        choice = llm.create_chat_completion([USER], **given, parallel_tool_calls=False)["choices"][0]
        assert llm.stats.drafted > 0
    said = of(choice)
    assert said["finish"] == "tool_calls"
    assert "<|" not in (said["text"] or "")
    for name, arguments in said["calls"]:
        assert name in ("weather", "clock")
        assert is_place(json.loads(arguments)) if name == "weather" else arguments == "{}"
    plain = llm.create_chat_completion([USER], **given, parallel_tool_calls=False, mtp=False)["choices"][0]
    assert of(plain) == said


@pytest.mark.parametrize(("schema", "where"), REFUSED)
def test_what_no_grammar_says_is_refused_by_its_path(schema: Any, where: str, llm: Llama) -> None:
    with pytest.raises(ValueError, match=re.escape(where)):
        llm.create_chat_completion([USER], response_format=by_schema(schema))
    with pytest.raises(ValueError, match=re.escape(where)):
        llm.create_completion("x", response_format=by_schema(schema))
    with pytest.raises(ValueError, match="third"):
        llm.create_chat_completion(
            [USER], tools=[tool("third", {"type": "object", "properties": {"a": {"not": {}}}}, strict=True)]
        )


def test_long_texts_are_bounded(llm: Llama) -> None:
    """A grammar repeats no more than 2000 times by itself."""
    schema = {"type": "string", "minLength": 2400, "maxLength": 2500}
    ends = llm.create_completion("x", response_format=by_schema(schema), max_tokens=1500, temperature=0.0)
    (choice,) = ends["choices"]
    if choice["finish_reason"] == "stop":
        assert 2400 <= len(json.loads(choice["text"])) <= 2500
    grammar = chat_native.schema_grammar({"type": "array", "items": {"type": "null"}, "maxItems": 5000})
    assert accepted(llm, grammar, json.dumps([None] * 5000).replace(" ", ""))
    assert not accepted(llm, grammar, json.dumps([None] * 5001).replace(" ", ""))


def accepted(llm: Llama, grammar: str, text: str) -> bool:
    """Whether a grammar allows a text, and its end."""
    mask = Mask.of(LlamaGrammar.from_string(grammar, verbose=False), llm._model.model, llm.n_vocab())
    for token in llm.tokenize(text.encode(), add_bos=False, special=False):
        if not mask.allows(ids([token]))[0]:
            return False
        mask.accept(token)
    return bool(mask.allows(ids([llm.token_eos()]))[0])


def ids(tokens: list[int]) -> Any:
    return np.array(tokens, dtype=np.int32)


@pytest.mark.parametrize("parameters", [
    {"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, {"enum": ["a", 1, None]},
    {"const": 3}, {}, {"type": "array"}, {"type": "array", "items": {"type": ["string", "integer"]}}, {"type": None},
    {"type": "array", "items": {"anyOf": [{"type": "null"}]}}, {"type": "object"}, {"$ref": "#/$defs/x"},
    {"type": "object", "properties": {"y": {"type": ["null", "boolean"]}}}, {"allOf": [{"type": "string"}]},
])  # fmt: skip
@pytest.mark.parametrize("template", ["own", "Google's"])
def test_odd_parameters_are_no_error(parameters: Any, template: str, llm: Llama, tmp_path: Path) -> None:
    """Templates that write types in capitals meet lists of them, and none."""
    templates = llm._templates
    if template == "Google's":
        text = (source.unpack(tmp_path, GOOGLES) / GOOGLES).read_text(encoding="utf-8")
        templates = chat_native.Templates(llm._model.model, text)
    assert templates is not None
    schema = {"type": "object", "properties": {"a": parameters}, "$defs": {"x": {"type": "string"}}}
    null: dict[str, Any] = {"type": "function", "function": {"name": "null", "description": None, "parameters": None}}
    for each in (tool("odd", schema), tool("bare"), null):
        made = templates.prepare({"messages": [USER], "tools": [each], "tool_choice": "required"})
        assert each["function"]["name"] in made["prompt"]
        assert chat_native.ChatGrammar(made).sampler(llm._model.model)


BOMBS: dict[str, dict[str, Any]] = {
    "a schema": {"messages": [USER], "response_format": by_schema(deep_schema(300))},
    "a value of a schema": {"messages": [USER], "response_format": by_schema({"const": nested(300)})},
    "parameters": {"messages": [USER], "tools": [tool("deep", deep_schema(300))]},
    "variables": {"messages": [USER], "chat_template_kwargs": {"x": nested(300)}},
    "what json cannot write": {"messages": [USER], "response_format": by_schema({"const": nested(100_000)})},
    "arguments": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}]},
        {"role": "tool", "tool_call_id": "1", "content": "x"}]},
    "three thousand properties": {"messages": [USER], "response_format": by_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}})},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_nests_too_deep_is_an_error(name: str, llm: Llama) -> None:
    with pytest.raises(ValueError, match=r"."):
        llm.create_chat_completion(**BOMBS[name], max_tokens=1)
    assert llm.create_chat_completion([USER], max_tokens=1)["usage"]["completion_tokens"] == 1


def test_what_doubles_is_no_matter(llm: Llama) -> None:
    answer = llm.create_chat_completion([USER], response_format=by_schema(doubling(60)), temperature=0.0)
    assert answer["choices"][0]["message"]["content"] == "null"


@pytest.mark.parametrize("text", ["<|tool_call>call:clock{a:" + "[" * 100_000, "{" * 100_000, "<|channel>" * 20_000])
def test_what_a_model_nests_ends_nothing(text: str, llm: Llama) -> None:
    templates = llm._templates
    assert templates is not None
    for asked in ({"tools": TOOLS}, {"response_format": by_schema(PLACE)}, {}):
        answer = chat_native.Answer(templates.prepare({"messages": [USER], **asked}))
        answer.add(text[:20], more=True)
        answer.add(text[20:], more=False)
        assert isinstance(answer.message.get("content"), str | None)


def test_a_grammar_that_branches_too_much_is_an_error(llm: Llama) -> None:
    """In the midst of an answer; llama.cpp's own sampler would end the process."""
    rules = "\n".join(f"r{i} ::= r{i + 1} r{i + 1} | r{i + 1}" for i in range(14)) + '\nr14 ::= "" | "a" | "aa"'
    for text in ("root ::= r0\n" + rules, 'root ::= "b" r0\n' + rules):
        with pytest.raises(ValueError, match="grammar"):
            llm("x", grammar=LlamaGrammar.from_string(text, verbose=False), max_tokens=40, temperature=0.0)
    assert llm("x", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_two_grammars_are_one_too_many(llm: Llama) -> None:
    own = LlamaGrammar.from_string('root ::= "a"', verbose=False)
    for asked in ({"tools": TOOLS}, {"response_format": by_schema(PLACE)}):
        with pytest.raises(ValueError, match="either"):
            llm.create_chat_completion([USER], grammar=own, **asked)
    with pytest.raises(ValueError, match="either"):
        llm("x", grammar=own, response_format=by_schema(PLACE))
    said = llm.create_chat_completion([USER], grammar=own, max_tokens=5)["choices"][0]
    assert of(said)["text"] == "a"


def test_a_library_without_it_goes_stocks_way(
    demo: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_native, "functions", lambda: None)
    with closing(Llama(demo.target, **OPTIONS)) as stock:
        for _ in range(2):
            said = stock.create_chat_completion([USER], response_format={"type": "json_object"}, max_tokens=60)
            assert said["choices"][0]["message"]["content"].startswith("{")
        made = stock("x", response_format=by_schema({"type": "null"}), max_tokens=5)
        assert json.loads(made["choices"][0]["text"]) is None
    assert capfd.readouterr().err.count("tools and schemas") == 1


def test_a_format_that_is_named_is_stocks(demo: Pair) -> None:
    with closing(Llama(demo.target, chat_format="chatml", **OPTIONS)) as named:
        assert named._templates is None
        assert named.create_chat_completion([USER], max_tokens=2)["object"] == "chat.completion"
    with closing(Llama(demo.target, chat_format="gemma-4", **OPTIONS)) as named:
        assert named._templates is not None


def test_logprobs_are_those_of_all_tokens(llm: Llama) -> None:
    given: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "logprobs": True, "top_logprobs": 2}
    whole = llm.create_chat_completion([USER], **given)["choices"][0]["logprobs"]["content"]
    chunks = list(llm.create_chat_completion([USER], **given, stream=True))
    told = [each for chunk in chunks for each in (chunk["choices"][0]["logprobs"] or {"content": ()})["content"]]
    assert len(whole) == 12
    assert [each["token"] for each in told] == [each["token"] for each in whole]
