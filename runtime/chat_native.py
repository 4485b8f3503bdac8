"""llama.cpp's own chat code, as llama-server uses it: templates, schemas, tools, parsers of answers.

It stands in libllama-common, and our include/llama-mtp-chat.h reaches it: JSON in, JSON out.
"""

from __future__ import annotations

import ctypes
import functools
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from llama_cpp import llama_cpp as lib

_P, _S, _B = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool
_E = ctypes.POINTER(ctypes.c_void_p)
# Of llama-mtp-chat.h, without the prefix: what each returns and takes. A text that is returned is ours to free.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "free_text": (None, _P),
    "init": (_P, _P, _S, _E),
    "free": (None, _P),
    "prepare": (_P, _P, _S),
    "schema": (_P, _S),
    "grammar": (_P, _P, _S, _E),
    "grammar_allowed": (_B, _P, _P),
    "grammar_forced": (ctypes.c_int32, _P),
    "grammar_error": (_P, _P),
    "answer_init": (_P, _S, _E),
    "answer_free": (None, _P),
    "answer_add": (_P, _P, _S, _B),
}
NO_MEMORY = "memory ran out"


@functools.cache
def functions() -> dict[str, Any] | None:
    """The functions of llama-mtp-chat.h; None where the loaded libllama has no libllama-common beside it with them."""
    llama = Path(str(lib._lib._name))
    try:
        common = ctypes.CDLL(str(llama.with_name(llama.name.replace("llama", "llama-common", 1))))
        found = {name: getattr(common, f"llama_mtp_chat_{name}") for name in FUNCTIONS}
    except (OSError, AttributeError):
        return None
    for name, function in found.items():
        function.restype, *function.argtypes = FUNCTIONS[name]
    return found


def call(name: str, *arguments: Any) -> Any:
    """Call one of the functions.

    Returns:
        What it returns: a handle, or of a function that gives JSON the object.

    Raises:
        ValueError: llama.cpp says why not.
    """
    known = functions()
    assert known is not None
    if FUNCTIONS[name][-1] is not _E:
        return _read(known, known[name](*arguments))
    error = ctypes.c_void_p()
    made = known[name](*arguments, ctypes.byref(error))
    if not made:
        raise ValueError(_taken(known, error.value) or NO_MEMORY)
    return made


def _taken(known: Mapping[str, Any], text: int | None) -> str | None:
    """A text that was returned, freed."""
    if not text:
        return None
    made = ctypes.string_at(text).decode("utf-8", errors="replace")
    known["free_text"](text)
    return made


def _read(known: Mapping[str, Any], text: int | None) -> Any:
    made = json.loads(_taken(known, text) or json.dumps({"error": NO_MEMORY}))
    if "error" in made:
        raise ValueError(made["error"])
    return made


def as_json(value: Any, name: str) -> bytes:
    """JSON of what a caller gave.

    Raises:
        ValueError: there is none of it; says what it was given as.
    """
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{name} cannot be written as JSON ({problem}); give what json.dumps takes.") from problem


class Templates:
    """The chat templates of a model.

    Args:
        model: a llama_model; they do not need it any more afterwards.
        template: the one to take, None for the file's own.

    Raises:
        ValueError: llama.cpp cannot read the template.
    """

    def __init__(self, model: Any, template: str | None) -> None:
        self._chat = call("init", model, None if template is None else template.encode())
        known = functions()
        assert known is not None
        weakref.finalize(self, known["free"], self._chat)

    def prepare(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What a request in OpenAI's form becomes: the keys that llama-mtp-chat.h lists.

        Raises:
            ValueError: it asks for what cannot be had; of a schema with the path of the keyword.
        """
        made: dict[str, Any] = call("prepare", self._chat, as_json(body, "the request"))
        return made


def schema_grammar(schema: Any) -> str:
    """The grammar, in GBNF, of the texts that a JSON schema allows.

    Raises:
        ValueError: a grammar cannot say what the schema does; names the keyword by its path.
    """
    made: str = call("schema", as_json(schema, "the schema"))["grammar"]
    return made


class ChatGrammar:
    """What holds an answer to its grammar; in the place of a llama_cpp.LlamaGrammar.

    Args:
        prepared: of `Templates.prepare`, or {"grammar": GBNF}.
    """

    def __init__(self, prepared: Mapping[str, Any]) -> None:
        self._grammar, self._root = str(prepared["grammar"]), "root"
        keys = ("grammar", "grammar_type", "grammar_lazy", "grammar_triggers", "preserved_tokens", "generation_prompt",
                "reasoning_budget_start_tag", "reasoning_budget_end_tags")  # fmt: skip
        self._text = json.dumps({key: prepared[key] for key in keys if key in prepared}).encode()

    def sampler(self, model: Any) -> Any:
        """A llama_sampler of a llama_model, which the caller frees.

        Raises:
            ValueError: llama.cpp cannot read the grammar.
        """
        return ctypes.cast(call("grammar", model, self._text), ctypes.POINTER(lib.llama_sampler))


def grammar_error(sampler: Any) -> str | None:
    """Why a sampler of `ChatGrammar` allows nothing any more; None for another, or where the grammar does."""
    known = functions()
    return None if known is None else _taken(known, known["grammar_error"](sampler))


class Answer:
    """An answer that grows, taken apart.

    Args:
        prepared: of `Templates.prepare`.

    Attributes:
        message: of it so far, in OpenAI's form.
    """

    # The text is read from its beginning each time, so that a long stream would cost its length squared. Reading it
    # takes this part of the time at most; what comes in between waits for the next time.
    SHARE = 0.02

    def __init__(self, prepared: Mapping[str, Any]) -> None:
        keys = ("chat_format", "chat_parser", "generation_prompt", "parse_tool_calls", "reasoning_format",
                "continue_final_message")  # fmt: skip
        text = json.dumps({key: prepared[key] for key in keys if key in prepared}).encode()
        self._answer = call("answer_init", text)
        known = functions()
        assert known is not None
        weakref.finalize(self, known["answer_free"], self._answer)
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        self._waiting, self._again = "", 0.0

    def read(self, text: str) -> list[dict[str, Any]]:
        """Go on with a text of a stream, and give its deltas, or none where they are to come with those of the next."""
        self._waiting += text
        begun = perf_counter()
        if begun < self._again:
            return []
        deltas = self.add("", more=True)
        took = perf_counter() - begun
        self._again = begun + took / self.SHARE
        return deltas

    def add(self, text: str, more: bool) -> list[dict[str, Any]]:
        """Go on with a text, and give the deltas of a stream.

        Args:
            text: with the markers among the prepared "preserved_tokens".
            more: whether more may come, or would have come and was cut off.
        """
        text, self._waiting = self._waiting + text, ""
        made = call("answer_add", self._answer, text.replace("\0", "").encode(), more)
        self.message = made["message"]
        deltas: list[dict[str, Any]] = made["deltas"]
        return deltas
