"""Which chat template a folder has: transformers' choice, and what is said of those that are none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from faulty import Folders
from gemma_mtp.convert import convert_pair, link
from gemma_mtp.convert.chat_template import chat_template
from gemma_mtp.convert.errors import MtpWarning
from gemma_mtp.convert.special_tokens import read_settings
from transformers import AutoTokenizer

JINJA = "chat_template.jinja"
NAMED = [{"name": "default", "template": "named {{ bos_token }}"}, {"name": "tool_use", "template": "tools"}]


def put(folder: Path, **files: Any) -> Path:
    """A folder with the tokenizer of the tiny pair and these files; `__` stands for a dot, values become JSON."""
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(value if path.suffix == ".jinja" else json.dumps(value), encoding="utf-8")
    return folder


def chosen(folder: Path) -> Any:
    return chat_template(folder, read_settings(folder))


def config(pair: Folders, template: Any) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((pair[0] / "tokenizer_config.json").read_text())
    return settings | {"chat_template": template}


@pytest.fixture
def folder(pair: Folders) -> Path:
    (pair[0] / JINJA).unlink()
    return pair[0]


def test_as_transformers_chooses(folder: Path, pair: Folders) -> None:
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"tokenizer_config__json": config(pair, "config")}, "config"),
        ({"chat_template__jinja": "jinja"}, "jinja"),  # newer than the one beside it
        ({"tokenizer_config__json": config(pair, NAMED)}, "jinja"),
        ({"additional_chat_templates/tool_use__jinja": "tools"}, {"default": "jinja", "tool_use": "tools"}),
    ]
    for files, wanted in cases:
        put(folder, **files)
        assert AutoTokenizer.from_pretrained(folder).chat_template == wanted
        entries = (
            [{"name": name, "template": text} for name, text in wanted.items()] if isinstance(wanted, dict) else wanted
        )
        assert chosen(folder) == entries
    (folder / JINJA).unlink()
    (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template == {each["name"]: each["template"] for each in NAMED}
    assert chosen(folder) == NAMED


@pytest.mark.parametrize("name", ["chat_template__json", "processor_config__json"])
@pytest.mark.parametrize("before", [None, "", [], {}])
def test_of_a_processor(name: str, before: Any, folder: Path, pair: Folders) -> None:
    """What is null or empty before it does not hide it."""
    put(
        folder,
        tokenizer_config__json=config(pair, before),
        chat_template__jinja=" \n",
        **{name: {"chat_template": "p"}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(folder) == "p"


@pytest.mark.parametrize(
    ("files", "message", "wanted"),
    [
        ({"chat_template__jinja": "a".encode("utf-16")}, "chat_template.jinja is left out: it is not UTF-8", "config"),
        ({"chat_template__jinja": "ö".encode("latin-1")}, "chat_template.jinja is left out: it is not UTF-8", "config"),
        ({"chat_template__jinja": b"version https://git-lfs.github.com/spec/v1"}, "left out: .*git lfs pull", "config"),
        ({"chat_template__jinja": "a\n{{ x | nothing }}"}, "left out: line 2: No filter named", "config"),
        ({"chat_template__jinja": "{% break %}"}, "chat_template.jinja: .* left out: 'break' outside loop", "config"),
        ({"chat_template__jinja": "{{ " + "9" * 5000 + " }}"}, "chat_template.jinja: .* left out: ", "config"),
        ({"chat_template__jinja": "jinja", "additional_chat_templates/tool_use__jinja": "{% bad %}"},
         "of its chat templates tool_use is left out", "jinja"),
        ({"chat_template__jinja": "a\n{% if %}"}, "chat_template.jinja: .* left out: line 2", "config"),
        ({"chat_template__jinja": "{% for x in y %}"}, "chat_template.jinja: .* left out: line 1", "config"),
        ({"tokenizer_config__json": {"chat_template": 5}, "chat_template__json": {"chat_template": "p"}},
         "tokenizer_config.json: .* neither text nor", "p"),
        ({"tokenizer_config__json": {"chat_template": {"a": "x", "b": "y"}}}, "'a' is taken",
         [{"name": "default", "template": "x"}, {"name": "a", "template": "x"}, {"name": "b", "template": "y"}]),
        ({"tokenizer_config__json": {}, "chat_template__json": []}, "chat_template.json does not hold", None),
        ({"tokenizer_config__json": {}, "chat_template__json": b"{"}, "chat_template.json is not JSON", None),
        ({"tokenizer_config__json": {"chat_template": "\ud800"}}, "neither text nor", None),
    ],
)  # fmt: skip
def test_what_is_no_template_is_said(
    files: dict[str, Any], message: str, wanted: Any, folder: Path, pair: Folders
) -> None:
    put(folder, **({"tokenizer_config__json": config(pair, "config")} | files))
    with pytest.warns(MtpWarning, match=message) as said:
        assert chosen(folder) == wanted
    assert len(said) == 1


@pytest.mark.parametrize("text", ["{% generation %}x{% endgeneration %}", "{% for a in b %}{% break %}{% endfor %}"])
def test_statements_of_transformers(text: str, folder: Path) -> None:
    put(folder, chat_template__jinja=text)
    assert chosen(folder) == text


def test_a_template_with_one_name_of_its_own(folder: Path, pair: Folders) -> None:
    put(folder, tokenizer_config__json=config(pair, {"chat": "x"}))
    assert chosen(folder) == "x"


def test_it_reaches_the_file(folder: Path, pair: Folders, tmp_path: Path) -> None:
    put(folder, tokenizer_config__json=config(pair, NAMED))
    header = link.read_header(convert_pair(*pair, tmp_path / "out", "Q8_0").target)
    assert header.metadata["tokenizer.chat_template"] == NAMED[0]["template"]
    assert header.metadata["tokenizer.chat_template.tool_use"] == NAMED[1]["template"]
