"""What clients of today ask for, answered by `gemma-mtp serve` on the bundled pair."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from children import GUARD, until
from gemma_mtp.convert import Pair
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from serves import Served, served
from train_data import CHAT_TEMPLATE

USER = {"role": "user", "content": "import os"}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]}}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
CALLED = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"deep\": true}"}}]}  # fmt: skip
TOLD = {"role": "tool", "tool_call_id": "1", "content": "nothing"}


@pytest.fixture(scope="module")
def running(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(demo.target, tmp_path_factory.mktemp("running"), "-v", "--metrics", "--", "-lv", 4) as found:
        yield found


def lines(found: Served, **body: Any) -> Any:
    """A stream that is open, to be read line by line."""
    given = {"messages": [USER], "stream": True, "temperature": 0, **body}
    headers = {"Content-Type": "application/json"}
    url = found.root + "/v1/chat/completions"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(given).encode(), headers), timeout=GUARD)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "developer", "content": "Be good"}, USER]},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be good"}]}, USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("import", "os")]}]},
        {"messages": [USER, CALLED, TOLD]},
        {"messages": [USER, CALLED, TOLD], "tools": [LOOK]},
        {"temperature": None, "top_p": None, "stream": None, "stop": None, "seed": None},
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
        {"tools": [LOOK], "tool_choice": "none"},
        {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"logit_bias": {"5": -100}}, {"user": "x", "metadata": {}},
        {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": True}},
    ],
    ids=lambda body: ", ".join(f"{name}: {json.dumps(value)[:40]}" for name, value in body.items()),
)  # fmt: skip
def test_what_is_answered(body: dict[str, Any], running: Served) -> None:
    answer = running.chat(**body)
    assert answer.status == 200, answer.text
    assert len(answer.json["choices"]) == body.get("n", 1)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"messages": 3}, 400), ({"messages": [{"role": "user", "content": 3}]}, 400), ({}, 400),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, 400),
        ({"messages": [{"role": "user", "content": "x " * 9000}], "stream": True}, 400),
    ],
)  # fmt: skip
def test_what_is_refused(body: dict[str, Any], status: int, running: Served) -> None:
    """With a status by which clients do not try again, and the error as an object."""
    answer = running.ask("/v1/chat/completions", body)
    assert answer.status == status
    assert answer.json["error"]["message"]


def test_limits_and_usage(running: Served) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = running.ask("/v1/chat/completions", {"messages": [USER], name: 4, "temperature": 0}).json
        assert answer["usage"]["completion_tokens"] == 4
        assert answer["choices"][0]["finish_reason"] == "length"
    events = running.chat(stream=True, stream_options={"include_usage": True}).events
    assert events[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_where_none_is_asked_for(stream: bool, running: Served) -> None:
    asked = (
        {"max_tokens": 0, "stream": stream, "stream_options": {"include_usage": True}} if stream else {"max_tokens": 0}
    )
    answer = running.chat(**asked)
    last = answer.events[-1] if stream else answer.json
    assert last["usage"]["completion_tokens"] == 0
    choices = [choice for event in answer.events for choice in event["choices"]] if stream else answer.json["choices"]
    assert not any((choice.get("delta") or choice.get("message") or {}).get("content") for choice in choices)
    assert choices[-1]["finish_reason"] == "length"


def test_an_answer_that_is_cut_shows_no_markers(running: Served) -> None:
    """Nor does a stream: of a tool call, and of a block that holds JSON."""
    schema = {
        "type": "json_schema",
        "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    for more in ({"tools": [LOOK], "tool_choice": "required"}, {"response_format": schema}):
        for limit in range(1, 8):
            answer = running.chat(max_tokens=limit, **more).json["choices"][0]
            assert answer["finish_reason"] == "length"
            events = running.chat(max_tokens=limit, stream=True, **more).events
            deltas = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
            for text in (answer["message"]["content"] or "", "".join(deltas)):
                assert "<|" not in text and "`" not in text


def test_a_stream_gives_the_whole_answers_text(running: Served) -> None:
    whole = running.chat(max_tokens=64).json["choices"][0]["message"]["content"]
    events = running.chat(max_tokens=64, stream=True).events
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert "".join(deltas) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_forced_tools(stream: bool, running: Served) -> None:
    answer = running.chat(tools=[LOOK], tool_choice="required", max_tokens=400, stream=stream)
    assert answer.status == 200, answer.text
    choices = [event["choices"][0] for event in answer.events if event["choices"]] if stream else answer.json["choices"]
    if stream:
        deltas = [call for event in answer.events if event["choices"]
                  for call in event["choices"][0]["delta"].get("tool_calls") or []]  # fmt: skip
        name, arguments = deltas[0]["function"]["name"], "".join(each["function"]["arguments"] for each in deltas)
    else:
        function = answer.json["choices"][0]["message"]["tool_calls"][0]["function"]
        name, arguments = function["name"], function["arguments"]
    assert name == "look"
    # Whether the pair comes to the end of its arguments is its own affair.
    if choices[-1]["finish_reason"] == "tool_calls":
        assert isinstance(json.loads(arguments), dict)
    else:
        assert arguments.startswith("{")


def test_answers_by_a_schema(running: Served) -> None:
    formats = [
        {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}},
        {"type": "json_object", "schema": SCHEMA},
    ]
    for each in formats:
        answer = running.chat(response_format=each, max_tokens=200).json
        assert json.loads(answer["choices"][0]["message"]["content"])["good"] in (True, False)


def test_completions_take_all_kinds_of_prompts(running: Served) -> None:
    for prompt in ("import os\n", ["import os\n", "import sys\n"], [2, 5, 6], [[2, 5, 6], [2, 7]]):
        answer = running.ask("/v1/completions", {"prompt": prompt, "max_tokens": 2, "temperature": 0})
        assert answer.status == 200, answer.text
        several = isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str))
        assert len(answer.json["choices"]) == (2 if several else 1)


def test_messages_keep_to_a_schema_and_think_where_asked(running: Served) -> None:
    message: dict[str, Any] = {"messages": [USER], "max_tokens": 200, "temperature": 0}
    shaped = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    (part,) = running.ask("/v1/messages", {**message, **shaped}).json["content"]
    assert json.loads(part["text"])["good"] in (True, False)
    read = {
        kind: running.ask("/v1/messages", {**message, "max_tokens": 1, "thinking": {"type": kind}}).json["usage"]
        for kind in ("enabled", "disabled")
    }
    tokens = {kind: usage["input_tokens"] + usage.get("cache_read_input_tokens", 0) for kind, usage in read.items()}
    assert tokens["enabled"] > tokens["disabled"]


def test_other_interfaces_are_there(running: Served) -> None:
    message = {"messages": [USER], "max_tokens": 4}
    assert running.ask("/v1/messages", message).json["role"] == "assistant"
    assert running.ask("/v1/responses", {"input": "import os", "max_output_tokens": 4}).json["output"]
    assert "spec_decode_num_accepted_tokens" in running.ask("/metrics").text
    assert all(slot["speculative"] for slot in running.ask("/slots").json)


def test_whoever_asks_meanwhile_ends_nobodys_stream(running: Served) -> None:
    """Open WebUI asks for the models all the time; others chat."""
    with lines(running, max_tokens=200) as stream:
        assert stream.readline().startswith(b"data: ")
        assert running.ask("/v1/models").status == running.chat().status == 200
        rest = stream.read().decode()
    assert rest.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"' in rest


def test_several_at_once(running: Served) -> None:
    """As many as there are slots, and more."""
    answers: list[int] = []

    def ask(number: int) -> None:
        for stream in (False, True):
            answers.append(running.chat("import os\n" * (1 + number), stream=stream, max_tokens=16).status)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert answers == [200] * 16


def test_a_client_that_leaves_is_no_longer_worked_for(running: Served) -> None:
    for _ in range(3):
        stream = lines(running, max_tokens=1900, ignore_eos=True)
        assert stream.readline().startswith(b"data: ")
        stream.close()
    until(lambda: not any(slot["is_processing"] for slot in running.ask("/slots").json), running.process)
    assert running.chat().status == 200


def test_flash_attention_is_on(running: Served, demo: Pair) -> None:
    """On a CPU too, where patch 0009 is worth having."""
    assert "Flash Attention enabled" in running.errors.read_text()


@pytest.mark.parametrize("thinking", [False, True])
def test_the_bundled_template_is_the_same_in_llama_cpps_jinja(thinking: bool, running: Served) -> None:
    """Tools, calls and answers included; llama.cpp gives arguments as they are, not as text."""
    arguments = {"deep": True}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "Be good"},
        USER,
        {**CALLED, "content": "", "tool_calls": [call]},
        TOLD,
    ]
    sent = [each if "tool_calls" not in each else CALLED for each in chat]
    wish = {"chat_template_kwargs": {"enable_thinking": thinking}}
    found = running.ask("/apply-template", {"messages": sent, "tools": [LOOK], **wish}).json["prompt"]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    given = {"messages": chat, "tools": [LOOK], "enable_thinking": thinking, "add_generation_prompt": True}
    assert found == template.from_string(CHAT_TEMPLATE).render(**given, bos_token="")
