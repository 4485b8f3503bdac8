"""Requests to a chat in OpenAI's form, schemas and tools, for tests of `Llama` and of llama-server."""

from __future__ import annotations

import re
from typing import Any

USER = {"role": "user", "content": "import os"}
PLACE = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 2, "exclusiveMaximum": 9},
        "code": {"type": "string", "pattern": "^[A-C]{3}-(x|y)$"},
        "at": {"$ref": "#/$defs/place"},
        "more": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["unit", "days", "code", "at", "more"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
                        "required": ["x"], "additionalProperties": False}},
}  # fmt: skip
BOUNDED = {
    "type": "array", "minItems": 2, "maxItems": 3,
    "items": {"type": "object", "properties": {"id": {"type": "integer", "minimum": 10, "maximum": 99},
              "name": {"type": "string", "minLength": 1, "maxLength": 12}}, "required": ["id", "name"]},
}  # fmt: skip


def is_place(given: Any) -> bool:
    """Whether it is what `PLACE` describes."""
    return (
        given.keys() == {"unit", "days", "code", "at", "more"}
        and given["unit"] in ("celsius", "kelvin")
        and 2 <= given["days"] < 9
        and re.fullmatch("[A-C]{3}-(x|y)", given["code"]) is not None
        and given["at"].keys() == {"x"}
        and 0 <= given["at"]["x"] <= 9
        and given["more"] in (True, False, None)
    )


def is_bounded(given: Any) -> bool:
    """Whether it is what `BOUNDED` describes."""
    return 2 <= len(given) <= 3 and all(10 <= each["id"] <= 99 and 1 <= len(each["name"]) <= 12 for each in given)


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    """A tool; without parameters, as OpenAI has it, where there are none."""
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, "description": f"The {name}", **given, **more}}


TOOLS = [tool("weather", PLACE), tool("clock")]
NAMED = {"type": "function", "function": {"name": "weather"}}


def by_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]}  # fmt: skip
TOLD = {"role": "tool", "tool_call_id": "1", "content": "noon"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "import"}, {"type": "text", "text": " sys"}]}

# What is asked, beside `max_tokens` and how tokens are chosen.
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "developer": {"messages": [{"role": "developer", "content": "Be good."}, USER]},
    "parts": {"messages": [{"role": "system", "content": "Be good."}, PARTS]},
    "a tool's result": {"messages": [USER, CALL, TOLD], "tools": TOOLS},
    "a conversation": {"messages": [USER, CALL, TOLD, {"role": "assistant", "content": "It is noon."}, USER]},
    "an answer to go on with": {"messages": [USER, {"role": "assistant", "content": "def main("}]},
    "tools": {"messages": [USER], "tools": TOOLS},
    "no tool": {"messages": [USER], "tools": TOOLS, "tool_choice": "none"},
    "some tool": {"messages": [USER], "tools": TOOLS, "tool_choice": "required"},
    "one call": {"messages": [USER], "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    "a named tool": {"messages": [USER], "tools": TOOLS, "tool_choice": NAMED},
    "a schema": {"messages": [USER], "response_format": by_schema(PLACE, strict=True)},
    "a bounded schema": {"messages": [USER], "response_format": by_schema(BOUNDED)},
    "any JSON": {"messages": [USER], "response_format": {"type": "json_object"}},
    "JSON beside tools": {"messages": [USER], "tools": TOOLS, "response_format": by_schema(BOUNDED)},
    "thinking": {"messages": [USER], "reasoning_effort": "high"},
    "thinking, by the template": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}},
    "thinking, then a call": {"messages": [USER], "tools": TOOLS, "tool_choice": NAMED, "reasoning_effort": "low"},
    "a stop": {"messages": [USER], "stop": ["path", ")"]},
}

# A schema, and where in it is what no grammar says.
REFUSED: list[tuple[Any, str]] = [
    ({"type": "object", "properties": {"a": {"type": "number", "multipleOf": 2}}}, "#/properties/a/multipleOf"),
    ({"type": "array", "items": {"not": {"type": "null"}}}, "#/items/not"),
    ({"type": "number", "minimum": 2}, "#/minimum"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
    ({"type": "object", "patternProperties": {"^a": {}}}, "#/patternProperties"),
    ({"type": "string", "maxLength": 2_000_000}, "#/maxLength"),
    ({"$ref": "https://example.com/schema"}, "unsupported $ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "left recursion"),
]


def nested(depth: int) -> Any:
    """Lists in lists."""
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


def deep_schema(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}}
    return made


def doubling(depth: int) -> dict[str, Any]:
    """A schema of definitions, each of which is twice the next."""
    twice = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**twice, f"d{depth}": {"type": "null"}}}
