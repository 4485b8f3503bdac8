"""Drafts that draw as the target does, in `gemma-mtp serve`: what they change, and what they leave as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import llama_cpp
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, Stats, native
from gemma_mtp.runtime.chat_native import schema_grammar
from prompts import FIELDS, STRINGS, held_out
from serves import Served, served

SEEDED: dict[str, Any] = {"temperature": 1, "seed": 7}
NONE: dict[str, Any] = {"speculative.n_max": 0}
BOUND = 3

# What a request may ask for that has to do with how a token is chosen.
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": SEEDED,
    "all tokens": SEEDED | {"top_k": 0, "top_p": 1.0},
    "penalties": SEEDED | {"repeat_penalty": 1.3, "presence_penalty": 0.5, "dry_multiplier": 0.8},
    "bias": SEEDED | {"logit_bias": [[" ", -2.0], ["(", False]]},
    "XTC": SEEDED | {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "mirostat": SEEDED | {"mirostat": 2},
    "adaptive p": SEEDED | {"samplers": ["top_k", "adaptive_p"], "adaptive_target": 0.4},
    "schema, greedy": {"temperature": 0, "json_schema": STRINGS},
    "schema": SEEDED | {"json_schema": STRINGS},
    "JSON": SEEDED | {"json_schema": {}},
    "few ways": SEEDED | {"grammar": 'root ::= ("import " ("os" | "sys" | "re") "\\n"){3,9} "#"'},
    "one way": SEEDED | {"grammar": 'root ::= "import numpy as np" "\\n"?'},
    "p_min": SEEDED | {"speculative.p_min": 0.4},
}


@pytest.fixture(scope="module")
def running(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(demo.target, tmp_path_factory.mktemp("coupled"), "-np", 1, "--draft", BOUND) as found:
        yield found


def completed(found: Served, prompt: str, **body: Any) -> dict[str, Any]:
    given = {"prompt": prompt, "n_predict": 48, "return_tokens": True, **body}
    answer = found.ask("/completion", given)
    assert answer.status == 200, answer.text
    made: dict[str, Any] = answer.json
    return made


def acceptance(answers: list[dict[str, Any]]) -> float:
    timings = [answer["timings"] for answer in answers]
    return float(sum(each["draft_n_accepted"] for each in timings) / sum(each["draft_n"] for each in timings))


@pytest.mark.parametrize("body", ASKED.values(), ids=ASKED)
def test_the_same_tokens_with_drafts_and_without(body: dict[str, Any], running: Served) -> None:
    for prompt in held_out(2):
        drafted, plain = completed(running, prompt, **body), completed(running, prompt, **body, **NONE)
        assert drafted["tokens"] == plain["tokens"]
        assert drafted["timings"]["draft_n"] > 0
        assert "draft_n" not in plain["timings"]


def test_drafts_draw_as_the_target_does(running: Served) -> None:
    """0.33 of them are right with all prompts, and 0.20 of the most likely tokens; by a schema 0.45 and 0.10."""
    free = [completed(running, prompt, n_predict=96, **SEEDED) for prompt in held_out(6)]
    assert acceptance(free) > 0.27
    schema = [completed(running, prompt, n_predict=96, **SEEDED, json_schema=STRINGS) for prompt in held_out(6)]
    assert acceptance(schema) > 0.3


def test_the_same_text_as_llama(demo: Pair, running: Served) -> None:
    sampling = {"temperature": 1.0, "seed": 7, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
    with closing(Llama(demo.target, n_ctx=512, n_threads=1, verbose=False)) as llm:
        ours = [llm(prompt, max_tokens=48, **sampling)["choices"][0]["text"] for prompt in held_out(4)]
    theirs = [completed(running, prompt, **sampling)["content"] for prompt in held_out(4)]
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert same >= 3  # a near-tie may be another token in a batch of another size


@pytest.mark.parametrize("name", ["greedy", "temperature 1", "schema", "fields"])
def test_llama_accepts_as_much(name: str, demo: Pair, running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same requests: the same texts, and of what is drafted the same share.

    By a schema that is more than where the drafter's head does not know what the grammar allows.
    """
    schema = {"schema": STRINGS, "fields": FIELDS}.get(name)
    sampling = {"temperature": float(name != "greedy"), "seed": 7, "top_k": 64, "top_p": 0.95, "min_p": 0.0}
    prompts = held_out(12)
    rules = None if schema is None else llama_cpp.LlamaGrammar.from_string(schema_grammar(schema), verbose=False)
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "verbose": False, "draft_length": BOUND}

    def asked(llm: Llama) -> tuple[list[str], float]:
        texts, total = [], Stats()
        for prompt in prompts:
            made = llm(prompt, max_tokens=96, repeat_penalty=1.0, grammar=rules, **sampling)
            texts.append(made["choices"][0]["text"])
            total.add(llm.stats)
        return texts, total.acceptance

    with closing(Llama(demo.target, **options)) as llm:
        ours, accepted = asked(llm)
        monkeypatch.setattr(native, "allow_drafts", lambda ctx, sequence, legal: None)
        unaware = asked(llm)
    body = sampling if schema is None else sampling | {"json_schema": schema}
    theirs = [completed(running, prompt, n_predict=96, **body) for prompt in prompts]
    said = {"asked": name, "llama": accepted, "llama-server": acceptance(theirs), "unaware": unaware[1]}
    print(json.dumps(said))
    assert unaware[0] == ours
    assert sum(one == other["content"] for one, other in zip(ours, theirs, strict=True)) >= len(prompts) - 1
    if schema is None:
        assert unaware[1] == accepted
        assert abs(accepted - acceptance(theirs)) < 0.04
    else:
        assert unaware[1] < min(accepted, acceptance(theirs))
        assert abs(accepted - acceptance(theirs)) < (accepted - unaware[1]) / 2


def test_the_seed_is_told(running: Served) -> None:
    (prompt,) = held_out(1)
    answer = completed(running, prompt, temperature=1)
    seed = answer["generation_settings"]["seed"]
    assert seed != completed(running, prompt, temperature=1)["generation_settings"]["seed"]
    assert completed(running, prompt, temperature=1, seed=seed)["content"] == answer["content"]
    chat = running.chat(temperature=1, max_tokens=24).json
    again = running.chat(temperature=1, max_tokens=24, seed=chat["seed"]).json
    assert again["seed"] == chat["seed"]
    assert again["choices"] == chat["choices"]
    assert running.chat(temperature=1, seed=5, stream=True).events[-1]["seed"] == 5


def test_how_many_are_drafted(running: Served) -> None:
    (prompt,) = held_out(1)

    def rounds(length: object) -> tuple[int, int]:
        timings = completed(running, prompt, temperature=0, **{"speculative.n_max": length})["timings"]
        return timings["draft_n"], timings["draft_n_accepted"]

    assert rounds("auto") == rounds(BOUND) == rounds(99)
    drafted, accepted = rounds(1)
    assert accepted <= drafted <= 48 - accepted  # one for each round, and each gives a token of its own
    assert drafted < rounds(BOUND)[0]
    for length in (-1, 1.5, "many", [3], None):
        answer = running.ask("/completion", {"prompt": prompt, "n_predict": 1, "speculative.n_max": length})
        assert answer.status == (200 if length is None else 400)
    for chance in (-0.1, 1.1):
        assert running.ask("/completion", {"prompt": prompt, "speculative.p_min": chance}).status == 400


def test_a_chance_that_a_draft_needs(running: Served) -> None:
    drafted: dict[float, list[dict[str, Any]]] = {
        least: [completed(running, prompt, **SEEDED, **{"speculative.p_min": least}) for prompt in held_out(4)]
        for least in (0.0, 0.5)
    }
    assert [each["tokens"] for each in drafted[0.0]] == [each["tokens"] for each in drafted[0.5]]
    assert acceptance(drafted[0.5]) > acceptance(drafted[0.0]) + 0.1


TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"deep": {"type": "boolean"}, "where": {"type": "string"}}, "required": ["deep"],
    "additionalProperties": False}}}  # fmt: skip


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools(choice: str, running: Served) -> None:
    """A grammar that waits for a call, and one that wants one."""
    body: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 64, **SEEDED}
    drafted, plain = running.chat(**body).json, running.chat(**body, **NONE).json
    assert drafted["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    messages = [answer["choices"][0]["message"] for answer in (drafted, plain)]
    for message in messages:
        for call in message.get("tool_calls") or []:
            call.pop("id")
    assert messages[0] == messages[1]
    assert drafted["timings"]["draft_n"] > 0


def test_a_draft_that_its_grammar_fails_in(running: Served) -> None:
    """A trigger within a token whose rest the grammar does not allow: no error, of this request or another."""
    trigger = {"type": 1, "value": "import"}
    lazy = {"grammar": 'root ::= "import" "z"+', "grammar_lazy": True, "grammar_triggers": [trigger]}
    for prompt in held_out(2):
        drafted = running.ask("/completion", {"prompt": prompt, "n_predict": 48, **SEEDED, **lazy})
        plain = running.ask("/completion", {"prompt": prompt, "n_predict": 48, **SEEDED, **lazy, **NONE})
        assert (drafted.status, drafted.json.get("content")) == (plain.status, plain.json.get("content"))
    assert running.chat().status == 200
