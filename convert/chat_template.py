"""The chat template of a folder, chosen from its files as transformers chooses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from gemma_mtp.convert.errors import MtpError, warn
from gemma_mtp.convert.files import read_small
from gemma_mtp.convert.json_file import read_json
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# One template, or several by name: entries of "name" and "template", as the gguf package writes them.
Template = str | list[dict[str, str]]
JINJA, MORE = "chat_template.jinja", "additional_chat_templates"
# Files of a processor, which hold it where the tokenizer's do not (processing_utils.py).
OF_PROCESSORS = ("chat_template.json", "processor_config.json")
# transformers' own statement, which marks what the model said, for training.
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def chat_template(folder: Path, settings: Mapping[str, Any]) -> Template | None:
    """The template that transformers would take: chat_template.jinja, tokenizer_config.json's, or a processor's.

    What is empty is passed over; what is of another kind, or no Jinja, is passed over and said. None: there is none.

    Args:
        folder: of the checkpoint.
        settings: its tokenizer_config.json, or {}.
    """
    for path, given in _candidates(folder, settings):
        named = _by_name(given)
        if not named:
            if given not in (None, "", [], {}):
                warn(f"{path}: its chat template is neither text nor texts by name; it is left out.")
            continue
        broken = {name: problem for name, text in named.items() if (problem := _problem(text))}
        if broken:
            which = "its chat template" if len(named) == 1 else f"of its chat templates {', '.join(broken)}"
            warn(f"{path}: {which} is left out: {next(iter(broken.values()))}.")
            named = {} if "default" in broken else {name: named[name] for name in named if name not in broken}
            if not named:
                continue
        if len(named) == 1:  # whatever it is called, a chat takes it
            return next(iter(named.values()))
        if "default" not in named:
            warn(f"{path}: none of its chat templates is called default; {next(iter(named))!r} is taken for it.")
            named = {"default": next(iter(named.values())), **named}
        return [{"name": name, "template": text} for name, text in named.items()]
    return None


def _candidates(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """What may be the template, the first choice first, and the file it stands in."""
    more = {path.stem: text for path in sorted((folder / MORE).glob("*.jinja")) if (text := _text(path))}
    if (text := _text(folder / JINJA)) or "default" in more:
        yield folder / JINJA, {**({"default": text} if text else {}), **more}
    yield folder / "tokenizer_config.json", settings.get("chat_template")
    yield folder / MORE, more
    for name in OF_PROCESSORS:
        path = folder / name
        try:
            yield path, read_json(path).get("chat_template") if path.exists() else None
        except MtpError as problem:
            warn(f"left out: {problem}")


def _text(path: Path) -> str:
    """The text of a file, "" if it is not there or blank; one that cannot be read is said."""
    if not os.path.lexists(path):
        return ""
    try:
        text = read_small(path).decode("utf-8-sig")
    except MtpError as problem:
        warn(f"left out: {problem}")
        return ""
    except UnicodeDecodeError:
        warn(f"{path} is left out: it is not UTF-8.")
        return ""
    return text if text.strip() else ""


def _by_name(given: Any) -> dict[str, str]:
    """Templates by their names, whatever form they have in the file; only those that hold something."""
    if isinstance(given, str):
        given = {"default": given}
    if isinstance(given, list):
        given = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)
                 if isinstance(each.get("name"), str)}  # fmt: skip
    if not isinstance(given, dict):
        return {}
    return {name: text for name, text in given.items() if isinstance(text, str) and text.strip() and _utf8(name + text)}


def _utf8(text: str) -> bool:
    """Whether a file can hold it: JSON can name halves of characters."""
    return not re.search("[\ud800-\udfff\0]", text)


def _problem(text: str) -> str | None:
    """What keeps a text from being a template of Jinja, with the line; None if nothing does."""
    compiler = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    try:
        compiler.compile(GENERATION.sub("", text))
    except jinja2.TemplateSyntaxError as problem:
        return f"line {problem.lineno}: {(problem.message or '').rstrip('.')}"
    except (RecursionError, MemoryError):
        return "it is nested too deeply"
    except (SyntaxError, ValueError, OverflowError) as problem:  # of the Python that Jinja makes of it
        return str(problem).partition(" (")[0]
    return None
