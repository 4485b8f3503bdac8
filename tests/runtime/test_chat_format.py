"""Gemma 4's own format of a chat, beside Google's template, and where it is used."""

from __future__ import annotations

import itertools
import pickle
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import jinja2
import pytest
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.convert.errors import MtpWarning
from gemma_mtp.convert.relink import rewrite
from gemma_mtp.patches import source
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.chat_format import TEMPLATE
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny import PAIR

OPTIONS: dict[str, Any] = {"n_ctx": 512, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
USER = {"role": "user", "content": " Hi \n"}
SYSTEM = {"role": "system", "content": " Be good "}
ANSWER = {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Hello "}
CALL = {
    "role": "assistant", "content": None, "reasoning_content": "hm",
    "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "weather", "arguments": {"city": "Rome", "days": 3, "more": [1, "b", True, {"k": "v"}]}}}],
}  # fmt: skip
TOOL: dict[str, Any] = {"type": "function", "function": {
    "name": "weather", "description": "Tells the weather", "parameters": {
        "type": "object", "required": ["city", "days"], "properties": {
            "city": {"type": "string", "description": "A city", "enum": ["Rome", "Bern"]},
            "days": {"type": "integer", "nullable": True},
            "names": {"type": "array", "items": {"type": "string"}},
            "spots": {"type": "array", "description": "where", "items": {
                "type": "object", "properties": {"z": {"type": "number"}}, "required": ["z"]}},
            "more": {"type": "object", "properties": {"q": {"type": "boolean"}}, "required": ["q"]},
        }}}}  # fmt: skip


def told(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "1", "content": content}


CHATS: list[list[dict[str, Any]]] = [
    [USER], [SYSTEM, USER], [{"role": "developer", "content": "d"}, USER, ANSWER], [USER, ANSWER, USER], [USER, CALL],
    [USER, CALL, told("sunny")], [USER, CALL, told("sunny"), ANSWER, USER],
    [USER, CALL, told("sunny"), CALL, told([{"type": "text", "text": "rain"}])],
    [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}]}],
    [USER, CALL, told("sunny"), {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
]  # fmt: skip


def compiled(text: str) -> jinja2.Template:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]).from_string(
        text
    )


def test_it_is_googles_format(tmp_path: Path) -> None:
    """The one that llama.cpp's source has."""
    file = f"{source.VENDORED}/models/templates/google-gemma-4-31B-it.jinja"
    theirs = compiled((source.unpack(tmp_path, file) / file).read_text(encoding="utf-8"))
    ours, seen = compiled(TEMPLATE.read_text(encoding="utf-8")), set()
    for chat, tools, thinking, prompt in itertools.product(CHATS, (None, [TOOL], [TOOL, TOOL]), *[(False, True)] * 2):
        given = {"messages": chat, "tools": tools, "enable_thinking": thinking, "add_generation_prompt": prompt}
        text = ours.render(**given, bos_token="<bos>")
        assert text == theirs.render(**given, bos_token="<bos>")
        seen.add(text)
    assert len(seen) > 100


def test_the_bundled_pair_has_it() -> None:
    """llama.cpp knows the format by a call's beginning, and by a comment that it takes answers of tools as they are."""
    text = TEMPLATE.read_text(encoding="utf-8")
    assert (PAIR / "gemma-4-demo" / "chat_template.jinja").read_text(encoding="utf-8") == text
    assert "'<|tool_call>call:'" in text and "{#- OpenAI Chat Completions:" in text


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The bundled pair without its chat template."""
    root = tmp_path_factory.mktemp("bare")
    for name in ("gemma-4-demo", "gemma-4-demo-assistant"):
        shutil.copytree(PAIR / name, root / name)
        (root / name / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.warns(MtpWarning, match="gemma-4-demo has no chat template"):
        return convert_pair(root / "gemma-4-demo", root / "gemma-4-demo-assistant", root / "out", "Q8_0")


def test_a_file_without_a_template(bare: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    """A chat has Gemma 4's turns, not those of Llama 2, and that is said once; stated formats and pickles stay."""
    with closing(Llama(bare.target, **OPTIONS)) as llm:
        for _ in range(2):
            llm.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=4, temperature=0)
            prompt = llm.detokenize(llm._input_ids.tolist(), special=True)
            assert b"<|turn>user\nhi<turn|>\n<|turn>model\n" in prompt
            assert b"[INST]" not in prompt
        copy = pickle.loads(pickle.dumps(llm))
    with closing(copy):
        copy.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=4, temperature=0)
        assert b"<|turn>user\nhi" in copy.detokenize(copy._input_ids.tolist(), special=True)
    said = capfd.readouterr().err
    assert said.count("has no chat template") == 2  # by the object and by its copy
    with closing(Llama(bare.target, chat_format="gemma-4", **OPTIONS)) as llm:
        llm.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=4)
    assert "template" not in capfd.readouterr().err


def test_a_template_that_is_none(demo: Pair, tmp_path: Path) -> None:
    """Of a file by others: one line, where stock's is a traceback out of jinja2."""
    path = tmp_path / demo.target.name
    rewrite(link.read_header(demo.target), {"tokenizer.chat_template": "{% if %}"}, path, lambda done, total: None)
    with pytest.raises(ValueError, match=r"chat template of the file is no Jinja \(line 1"):
        Llama(path, drafter=None, **OPTIONS)
