"""What users do with a model in Ollama gives with drafts what it gives without; on a real one.

Ollama's own engine drafts as llama.cpp does: at a temperature and beyond the end of a sliding window its texts may
differ. What is asked of it here is what was found there.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from encoders import make
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.convert.checkpoint import open_checkpoint
from gemma_mtp.convert.mmproj import plan_mmproj, write_mmproj
from gemma_mtp.convert.ollama.api import LOADING, Client, OllamaError
from gemma_mtp.convert.ollama.store import stored
from gemma_mtp.convert.ollama.trial import flag_value, servers
from ollamas import run
from prompts import held_out

pytestmark = [pytest.mark.ollama, pytest.mark.usefixtures("real")]

GREEDY: dict[str, Any] = {"temperature": 0}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}]  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "tags", "kind"],
}  # fmt: skip
Request = tuple[str, dict[str, Any]]


def drawn(seed: int) -> dict[str, Any]:
    return {"temperature": 1, "seed": seed}


def text(prompt: str, options: Mapping[str, Any], **more: Any) -> Request:
    body = {"model": "mine", "prompt": prompt, "raw": True, "stream": False, **more}
    return "/api/generate", {**body, "options": {"num_predict": 64, **options}}


def chat(said: str, options: Mapping[str, Any], **more: Any) -> Request:
    """Without a word on thinking the bundled pair never ends it."""
    body = {"model": "mine", "messages": [{"role": "user", "content": said}], "stream": False, "think": False, **more}
    return "/api/chat", {**body, "options": {"num_predict": 64, **options}}


def picture(number: int, side: int = 32) -> str:
    """A PNG, base64."""
    rows = b"".join(
        b"\0" + bytes(value % 256 for x in range(side) for value in (x * number, y * (number + 3), x * y))
        for y in range(side)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def said(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What of an answer does not depend on when it was given."""
    return {key: value for key, value in answer.items() if key != "created_at" and not key.endswith("duration")}


def answers(requests: Sequence[Request], drafts: int) -> list[dict[str, Any]]:
    """Answers with that many drafts a round. Every change of the number loads the model anew."""
    api = Client()
    bodies = [(path, {**body, "options": {**body["options"], "draft_num_predict": drafts}}) for path, body in requests]
    return [said(api.post(path, body, LOADING)) for path, body in bodies]


@pytest.fixture
def mine(demo: Pair, real: object) -> None:
    """The bundled pair as a model of this name."""
    del real
    done = run("ollama", "create", "mine", demo.target.parent)
    assert done.exit_code == 0, done.stderr


USES: dict[str, Callable[[list[str]], list[Request]]] = {
    "greedy": lambda prompts: [text(each, GREEDY) for each in prompts],
    "drawn": lambda prompts: [text(each, drawn(seed)) for seed, each in enumerate(prompts)],
    "penalties": lambda prompts: [
        text(each, {**drawn(seed), "repeat_penalty": 1.3, "repeat_last_n": 32, "presence_penalty": 0.5,
                    "frequency_penalty": 0.3, "min_p": 0.05, "typical_p": 0.9}) for seed, each in enumerate(prompts)
    ],
    "stop words": lambda prompts: [
        text(each, {**drawn(seed), "stop": ["self", "\n\n", "):"]}) for seed, each in enumerate(prompts)
    ],
    "few tokens": lambda prompts: [
        text(each, {**drawn(n), "num_predict": n}) for each in prompts[:5] for n in (1, 2, 3, 5)
    ],
    "chat": lambda prompts: [chat(each[:200], drawn(seed)) for seed, each in enumerate(prompts)],
    "thinking": lambda prompts: [chat(each[:200], drawn(seed), think=True) for seed, each in enumerate(prompts)],
    "tools": lambda prompts: [chat(each[:200], drawn(seed), tools=TOOLS) for seed, each in enumerate(prompts)],
    "any JSON": lambda prompts: [chat(each[:100], drawn(seed), format="json") for seed, each in enumerate(prompts)],
    "logprobs": lambda prompts: [
        text(each, drawn(seed), logprobs=True, top_logprobs=3) for seed, each in enumerate(prompts)
    ],
}  # fmt: skip


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("use", USES)
def test_an_answer_with_drafts_is_the_one_without(use: str, ours: bool) -> None:
    if not ours and use != "greedy":
        pytest.skip("drawn texts are equal on our llama-server alone")
    requests = USES[use](held_out(20))
    assert answers(requests, 4) == answers(requests, 0)


@pytest.mark.usefixtures("mine")
def test_a_schema_is_kept_to(ours: bool) -> None:
    """200 of 200. Ollama enforces it after thinking alone, so it must not be left to the model whether to think."""
    prompts = held_out(20)
    requests = [
        chat(prompts[seed % 20][:100], {**drawn(seed), "num_predict": 400}, format=SCHEMA) for seed in range(200)
    ]
    given = answers(requests, 4)
    for answer in given:
        assert answer["done_reason"] == "stop"
        found = json.loads(answer["message"]["content"])
        assert list(found) == SCHEMA["required"]
        assert isinstance(found["name"], str) and found["age"] in range(100) and found["kind"] in ("a", "b")
        assert len(found["tags"]) <= 3 and all(isinstance(each, str) for each in found["tags"])
    if ours:
        assert given[:20] == answers(requests[:20], 0)


@pytest.mark.usefixtures("mine")
def test_a_conversation_is_the_same(ours: bool) -> None:
    """Each turn reuses what was computed for those before; by messages, and by the older `context`."""

    def turns(drafts: int) -> list[Any]:
        api, messages, found, context = Client(), [], [], None
        options = {"num_predict": 60, "draft_num_predict": drafts, **GREEDY}
        for prompt in held_out(6):
            messages.append({"role": "user", "content": prompt[:150]})
            body = {"model": "mine", "messages": messages, "stream": False, "think": False, "options": options}
            answer = api.post("/api/chat", body, LOADING)
            messages.append(answer["message"])
            body = {"model": "mine", "prompt": prompt[:100], "stream": False, "think": False, "options": options}
            more = api.post("/api/generate", {**body, "context": context}, LOADING)
            context = more["context"]
            found += [said(answer), said(more)]
        return found

    assert ours or turns(4)
    if ours:
        assert turns(4) == turns(0)


@pytest.mark.usefixtures("mine")
def test_at_a_full_context_an_answer_ends_at_the_same_token(ours: bool) -> None:
    """At 1024 the context cannot be shifted (a sliding window with 768 cells); at 512 it is."""
    if not ours:
        pytest.skip("Ollama's own engine ends answers with drafts up to four tokens early")
    for context, sampling in ((1024, GREEDY), (1024, drawn(5)), (512, GREEDY), (512, drawn(5))):
        options = {"num_ctx": context, "num_predict": 1100, **sampling}
        requests = [text(prompt, options) for prompt in held_out(5)]
        given = answers(requests, 4)
        assert given == answers(requests, 0)
        if context == 1024:
            full = [
                each["prompt_eval_count"] + each["eval_count"] for each in given if each.get("done_reason") == "length"
            ]
            assert full
            assert set(full) == {context}


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    "real",
    [{"OLLAMA_KV_CACHE_TYPE": "q8_0"}, {"OLLAMA_NUM_PARALLEL": "4"}],
    indirect=True,
    ids=["q8_0", "four at once"],
)
def test_settings_of_the_server(real: Mapping[str, str], ours: bool) -> None:
    prompts = held_out(20)
    at_once = int(real.get("OLLAMA_NUM_PARALLEL", 1))
    requests = [text(each, GREEDY) for each in prompts]
    if ours and at_once == 1:  # of several at once a drawn text in a hundred was another
        requests += [text(each, drawn(seed)) for seed, each in enumerate(prompts)]

    def together(drafts: int) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda request: answers([request], drafts)[0], requests))

    assert together(4) == answers(requests, 0)


def drafted(model: str) -> int:
    """Tokens that its llama-server has drafted so far, by its metrics."""
    (line,) = servers(stored(Client(), model))
    with urllib.request.urlopen(f"http://127.0.0.1:{flag_value(line, '--port')}/metrics") as answer:
        (found,) = re.findall(r"num_draft_tokens_total (\d+)", answer.read().decode())
    return int(found)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    "real",
    [{"LLAMA_ARG_ENDPOINT_METRICS": "1", "LLAMA_ARG_SPEC_SYNTH_RATES": rates} for rates in ("0,0,0,0", "1,1,1,1")],
    indirect=True,
    ids=["none is right", "all are right"],
)
def test_it_drafts_as_far_as_it_pays(real: Mapping[str, str], ours: bool) -> None:
    """Four at most, as Ollama says, where all are right; where none is, hardly any."""
    if not ours:
        pytest.skip("Ollama's own engine drafts as many in every round")
    prompt, options = held_out(1)[0], {**GREEDY, "stop": []}
    answers([text(prompt, {**options, "num_predict": 1})], 4)
    before = drafted("mine")
    (answer,) = answers([text(prompt, {**options, "num_predict": 200})], 4)
    made, found = answer["eval_count"], drafted("mine") - before
    if real["LLAMA_ARG_SPEC_SYNTH_RATES"].startswith("0"):
        assert found < made  # 4 a round would be four times as many
    else:
        assert found > made / 4  # of a round of five tokens four are drafts


@pytest.mark.usefixtures("mine")
def test_a_model_that_is_unloaded_and_loaded_again() -> None:
    api, request = Client(), [text(each, GREEDY) for each in held_out(3)]
    first = answers(request, 4)
    api.post("/api/generate", {"model": "mine", "keep_alive": 0})
    assert answers(request, 4) == first
    assert answers([(path, {**body, "keep_alive": -1}) for path, body in request], 4) == first


def test_a_picture_is_looked_at(demo: Pair, ours: bool, tmp_path: Path) -> None:
    projector = tmp_path / "mmproj.gguf"
    with open_checkpoint(make("31B", tmp_path / "checkpoint")) as checkpoint:
        write_mmproj(plan_mmproj(checkpoint, "F16"), checkpoint, projector)
    done = run("ollama", "create", "mine", demo.target, "--projector", projector)
    assert done.exit_code == 0, done.stderr
    requests = []
    for number in range(1, 9):
        path, body = chat("What is that?", drawn(number) if number % 2 and ours else GREEDY)
        body["messages"][0]["images"] = [picture(number)]
        requests.append((path, body))
    given = answers(requests, 4)
    assert given == answers(requests, 0)
    assert len({each["message"]["content"] for each in given}) > 1


@pytest.mark.usefixtures("mine")
def test_through_the_interface_of_openai(ours: bool) -> None:
    """It has no option for drafts: a second model of the same layers has them off."""
    api = Client()
    api.post("/api/create", {"model": "plain", "from": "mine", "parameters": {"draft_num_predict": 0}, "stream": False})
    kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}

    def choices(model: str) -> list[Any]:
        found = []
        for seed, prompt in enumerate(held_out(6)):
            body = {"model": model, "messages": [{"role": "user", "content": prompt[:100]}], "max_tokens": 300,
                    "reasoning_effort": "none", "seed": seed, "temperature": 1 if ours else 0}  # fmt: skip
            found += [api.post("/v1/chat/completions", {**body, **more}, LOADING)["choices"]
                      for more in ({}, {"tools": TOOLS}, {"response_format": kind})]  # fmt: skip
            found.append(api.post("/v1/completions", {**body, "prompt": prompt}, LOADING)["choices"])
        return found

    assert choices("mine") == choices("plain")


def test_a_wrong_drafter_is_one_line(
    demo: Pair, sizes: dict[str, tuple[Path, Path]], ours: bool, tmp_path: Path
) -> None:
    """Ollama takes any file as a drafter; what it then says is its engine's."""
    other = convert_pair(*sizes["31B"], tmp_path / "other", "Q8_0", "Q8_0")
    api = Client()
    assert run("ollama", "create", "mine", demo.target.parent).exit_code == 0
    body = {"model": "mine", "prompt": "x", "stream": False}
    for file, why in (
        (other.drafter, "was made for the target with fingerprint"),
        (demo.target, "cannot draft: the model doesn't contain MTP layers; use the drafter that was published"),
    ):
        made = {"model": "mine", "from": "mine", "draft_files": {"d.gguf": api.upload(file)}, "stream": False}
        api.post("/api/create", made)
        api.post("/api/generate", {"model": "mine", "keep_alive": 0})
        with pytest.raises(OllamaError) as problem:
            api.post("/api/generate", body, LOADING)
        told = str(problem.value)
        if ours:
            assert why in told
            assert told.count("error: ") + told.count("llama_init_from_model") == 1


@pytest.mark.usefixtures("mine")
def test_commands_read_the_store_of_a_real_one(ours: bool) -> None:
    """By the name, drafter and all: checked, and the same text as Ollama's."""
    model = stored(Client(), "mine")
    checked = json.loads(run("verify", "mine", "--json").stdout)
    assert checked["pairs"] == {str(model.target): str(model.drafter)}
    assert all(each["hashed"] == each["tensors"] for each in checked["files"])
    for prompt in held_out(3):
        done = run("run", "mine", "-p", prompt, "-n", "32", "--temp", "0", "--json")
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["stats"]["drafted"] > 0
        if ours:
            assert found["text"] == answers([text(prompt, {**GREEDY, "num_predict": 32})], 4)[0]["response"]
