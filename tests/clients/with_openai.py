"""openai: chats, streams, tools, schemas, usage, several answers, errors."""

import json
import sys

from openai import BadRequestError, OpenAI
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
    left = client.chat.completions.create(model=model, messages=[USER], max_tokens=1000, stream=True)
    next(iter(left))
    left.close()


def check_tools() -> None:
    """A forced call, and the tool's answer sent back."""
    asked = client.chat.completions.create(
        model=model, messages=[USER], tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0
    )
    message = asked.choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "look"
    assert isinstance(json.loads(call.function.arguments), dict)
    told = {"role": "tool", "tool_call_id": call.id, "content": "nothing"}
    client.chat.completions.create(model=model, messages=[USER, message, told], tools=[TOOL], max_tokens=8)


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
    for check in (check_chat, check_streams, check_tools, check_schemas, check_errors):
        check()
    assert client.completions.create(model=model, prompt="import os\n", max_tokens=4).choices[0].text
    assert client.responses.create(model=model, input="import os", max_output_tokens=8).output


main()
