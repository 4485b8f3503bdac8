"""What the tests ask the bundled pair to go on from."""

from __future__ import annotations

import json

from tiny import PAIR

# What the pair was trained on goes on from here, greedily, for longer than any test.
PROMPT = "import os\nimport sys\n\ndef main("


def held_out(count: int = 20) -> list[str]:
    """The first prompts of those that the pair was not trained on."""
    prompts = json.loads((PAIR / "prompts.json").read_text())["prompts"]
    return [prompt["text"] for prompt in prompts[:count]]
