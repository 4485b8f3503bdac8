"""Gemma 4's own format of a chat, for files without a template; stock would write a prompt of Llama 2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_cpp import Llama, LlamaGrammar, llama_chat_format

# Asked for, and taken because neither the file nor the caller says anything.
GEMMA_FORMATS = NAME, UNSAID = "gemma-4", "gemma-4, for want of a template"
# What stock falls back on where a file has no template.
FALLBACK = "llama-2"
TEMPLATE = Path(__file__).with_name("gemma4.jinja")


def check(wanted: str, of_file: Mapping[str, Any]) -> None:
    """Refuse a chat format that nobody has registered and the file has not either; stock does with the first chat.

    Args:
        wanted: its name.
        of_file: handlers of the file's templates, by name.

    Raises:
        ValueError: naming those that there are.
    """
    if wanted in of_file:
        return
    try:
        llama_chat_format.get_chat_completion_handler(wanted)
    except llama_chat_format.LlamaChatCompletionHandlerNotFoundException as problem:
        names = ", ".join(sorted(name for name in of_file if name != UNSAID))
        raise ValueError(
            f"chat_format is {wanted!r}; give one of the file's own ({names}) or of llama_cpp's ({problem})."
        ) from problem


def gemma_handler(llm: Llama) -> Any:
    """A chat handler in Gemma 4's format (tests/runtime/test_chat_format.py sets it beside Google's template)."""
    bos, eos = (
        (llm._model.token_get_text(token) if token >= 0 else "") for token in (llm.token_bos(), llm.token_eos())
    )
    return llama_chat_format.Jinja2ChatFormatter(
        template=TEMPLATE.read_text(encoding="utf-8"), eos_token=eos, bos_token=bos, stop_token_ids=[llm.token_eos()]
    ).to_chat_handler()


def stock_grammar(response_format: Mapping[str, Any]) -> LlamaGrammar | None:
    """The grammar of a response_format as llama-cpp-python has it, for a library without llama.cpp's converter."""
    kind = response_format.get("type")
    holder = response_format.get("json_schema") if kind == "json_schema" else response_format
    schema = (holder or {}).get("schema") or {"type": "object"}
    return None if kind == "text" else LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
