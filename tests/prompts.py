"""What the tests ask the bundled pair to go on from."""

from __future__ import annotations

import json
from typing import Any

from tiny import PAIR

# What the pair was trained on goes on from here, greedily, for longer than any test.
PROMPT = "import os\nimport sys\n\ndef main("
# What answers are asked by: strings of any length; and fields of few values, much of which is what the schema says.
LINES: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
STRINGS = {"type": "object", "properties": {"name": {"type": "string"}, "lines": LINES}, "required": ["name", "lines"]}
FIELDS = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "version": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["parser", "network", "files"]}, "minItems": 1, "maxItems": 3},
        "public": {"type": "boolean"},
    },
    "required": ["name", "version", "tags", "public"],
}


def held_out(count: int = 20) -> list[str]:
    """The first prompts of those that the pair was not trained on."""
    prompts = json.loads((PAIR / "prompts.json").read_text())["prompts"]
    return [prompt["text"] for prompt in prompts[:count]]
