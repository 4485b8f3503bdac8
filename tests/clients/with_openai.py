"""openai: chats, streams, tools, schemas, usage, several answers, clients that leave, errors."""

import json
import sys

from openai import APITimeoutError, BadRequestError, OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]
client = OpenAI(base_url=url, api_key="none", max_retries=0)
USER = {"role": "user", "content": "import os"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]}}}  # fmt: skip


class Verdict(BaseModel):
    good: bool


def check_chat() -> None:
    system = {"role": "developer", "content": [{"type": "text", "text": "Be good"}]}
    answer = client.chat.completions.create(model=model, messages=[system, USER], max_completion_tokens=4)
    assert answer.usage.completion_tokens <= 4
    assert answer.choices[0].message.role == "assistant"
    two = client.chat.completions.create(model=model, messages=[USER], max_tokens=4, n=2)
    assert len(two.choices) == 2


def check_streams() -> None:
    chunks = list(client.chat.completions.create(
        model=model, messages=[USER], max_tokens=8, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert chunks[-1].usage.completion_tokens <= 8
    assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)


def check_leaving() -> None:
    """A stream that is closed and an answer that is not waited for; others are answered all the same."""
    long = {"model": model, "messages": [USER], "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**long, stream=True) as stream:
        next(iter(stream))
    try:
        client.with_options(timeout=0.01).chat.completions.create(**long)
    except APITimeoutError:
        check_chat()
    else:
        raise AssertionError("1900 tokens in 10 ms")


def check_tools() -> None:
    """A forced call, the tool's answer sent back, and a call in a stream."""
    asked = client.chat.completions.create(
        model=model, messages=[USER], tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0
    )
    message = asked.choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "look"
    assert isinstance(json.loads(call.function.arguments), dict)
    told = {"role": "tool", "tool_call_id": call.id, "content": "nothing"}
    client.chat.completions.create(model=model, messages=[USER, message, told], tools=[TOOL], max_tokens=8)
    named = {"type": "function", "function": {"name": "look"}}
    with client.chat.completions.stream(
        model=model, messages=[USER], tools=[TOOL], tool_choice=named, max_tokens=200, temperature=0
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.name == "look"


def check_schemas() -> None:
    answer = client.chat.completions.parse(model=model, messages=[USER], response_format=Verdict, max_tokens=200)
    assert answer.choices[0].message.parsed.good in (True, False)


def check_errors() -> None:
    for wrong in ({"messages": 3}, {"messages": [{"role": "user", "content": "x " * 100_000}], "stream": True}):
        try:
            client.chat.completions.create(model=model, **wrong)
        except BadRequestError:
            continue
        raise AssertionError(f"{list(wrong)} was taken")


def main() -> None:
    assert [each.id for each in client.models.list()] == [model]
    for check in (check_chat, check_streams, check_leaving, check_tools, check_schemas, check_errors):
        check()
    assert client.completions.create(model=model, prompt="import os\n", max_tokens=4).choices[0].text
    assert client.responses.create(model=model, input="import os", max_output_tokens=8).output


main()
