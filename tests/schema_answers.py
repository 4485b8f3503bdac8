"""`make check-schema-answers`: answers under schemas, and calls of tools, of the bundled pair at temperature 1.

The pair knows nothing of JSON or tools: what makes answers valid is the grammar alone. Asked are 500 answers under two
schemas, 200 calls of a tool that is named, and 200 answers in which a tool may be called and its mark is made likely.
Counted are those that parse and are what was asked for; the exit status is 1 unless all are.

    python tests/schema_answers.py --share 0.1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from chats import BOUNDED, NAMED, PLACE, TOOLS, USER, by_schema, is_bounded, is_place
from demo import PAIR
from gemma_mtp.convert import convert_pair
from gemma_mtp.runtime import Llama

MADE, NAMED_CALLS, FREE_CALLS = 500, 200, 200
WILD: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 800}
LIKELY = 12.0  # added to the logit of a call's mark


def schema_answers(llm: Llama, count: int) -> Iterator[bool]:
    """Whether answers under a schema are valid."""
    for seed in range(count):
        schema, right = ((PLACE, is_place), (BOUNDED, is_bounded))[seed % 2]
        answer = llm.create_chat_completion([USER], response_format=by_schema(schema), seed=seed, **WILD)
        (choice,) = answer["choices"]
        yield choice["finish_reason"] == "stop" and right(json.loads(choice["message"]["content"]))


def called(choice: dict[str, Any]) -> bool:
    """Whether a choice has calls, and all of them are what the tool takes."""
    calls = choice["message"].get("tool_calls", [])
    right = all(
        call["function"]["name"] == "weather" and is_place(json.loads(call["function"]["arguments"])) for call in calls
    )
    return choice["finish_reason"] == "tool_calls" and bool(calls) and right


def named_calls(llm: Llama, count: int) -> Iterator[bool]:
    """Whether a tool that is named is called."""
    for seed in range(count):
        yield called(
            llm.create_chat_completion([USER], tools=TOOLS, tool_choice=NAMED, seed=seed, **WILD)["choices"][0]
        )


def free_calls(llm: Llama, count: int) -> Iterator[bool]:
    """Whether answers are calls; or text, or a call that was cut, without marks in their content."""
    (mark,) = llm.tokenize(b"<|tool_call>", add_bos=False, special=True)
    given = {**WILD, "logit_bias": {mark: LIKELY}, "max_tokens": 200, "parallel_tool_calls": False}
    for seed in range(count):
        (choice,) = llm.create_chat_completion([USER], tools=TOOLS[:1], seed=seed, **given)["choices"]
        is_call = choice["finish_reason"] == "tool_calls"
        yield called(choice) if is_call else "tool_call" not in (choice["message"]["content"] or "")


WAYS: dict[str, tuple[Callable[[Llama, int], Iterator[bool]], int]] = {
    "answers under a schema": (schema_answers, MADE),
    "calls of a named tool": (named_calls, NAMED_CALLS),
    "answers that may call": (free_calls, FREE_CALLS),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="part of the answers that is asked for")
    share = parser.parse_args().share
    all_right = True
    with tempfile.TemporaryDirectory() as folder:
        pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", Path(folder), "Q8_0")
        with closing(Llama(pair.target, n_ctx=2048, verbose=False)) as llm:
            for what, (ask, count) in WAYS.items():
                seen = Counter(ask(llm, max(int(count * share), 1)))
                print(f"{what}: {seen[True]} of {seen.total()} valid", flush=True)
                all_right &= not seen[False]
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
