"""Chats by llama.cpp's own code: a request becomes a prompt, a grammar and a parser, and its answer a message.

The same request has the same prompt and the same parsed answer as from our llama-server.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_mtp.runtime import media
from gemma_mtp.runtime.chat_format import GEMMA_FORMATS, TEMPLATE
from gemma_mtp.runtime.chat_native import Answer, ChatGrammar, Templates, schema_grammar
from gemma_mtp.runtime.context import Context, Seen
from llama_cpp.llama_chat_format import _convert_text_completion_logprobs_to_chat as chat_logprobs

if TYPE_CHECKING:
    from gemma_mtp.runtime.projector import Projector

# What a request says in OpenAI's words, beside how tokens are chosen.
BODY = ("messages", "tools", "tool_choice", "response_format", "stop", "chat_template_kwargs", "parallel_tool_calls",
        "reasoning_effort")  # fmt: skip
# What needs llama.cpp's code: stock knows it in part, or not at all.
WANTING = ("functions", "tools", "response_format", "parallel_tool_calls", "reasoning_effort")
OF_FILE = "chat_template."
JSON_OBJECT = {"type": "object"}


def templates_of(llm: Context, chat_format: str, given: str | None) -> Templates | None:
    """llama.cpp's templates for a chat format; None for one of llama-cpp-python's own, which the caller named.

    Args:
        llm: whose model it is.
        chat_format: that it has.
        given: that it was told to have, if it was.

    Raises:
        ValueError: llama.cpp cannot read the template.
    """
    template = None
    if chat_format in GEMMA_FORMATS:
        template = TEMPLATE.read_text(encoding="utf-8")
    elif given is not None:
        if not given.startswith(OF_FILE):
            return None
        name = given.removeprefix(OF_FILE)
        template = llm.metadata.get(
            "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        )
    return Templates(llm._model.model, template)


@dataclass
class Prepared:
    """A chat to be completed.

    Attributes:
        prompt: its tokens.
        grammar: that its answer keeps to; None for none.
        stop: what ends the answer.
        shown: the markers that its answer's text shows.
        media: images and sounds of the prompt, by their first positions.
        answer: takes that text apart.
        legacy: whether calls are told as "function_call", too.
    """

    prompt: list[int]
    grammar: Any
    stop: list[str]
    shown: dict[int, bytes]
    media: Mapping[int, Seen]
    answer: Answer
    legacy: bool


def prepare(
    llm: Context, templates: Templates, given: Mapping[str, Any], projector: Callable[[], Projector]
) -> Prepared:
    """A chat, by the arguments of `create_chat_completion`.

    Args:
        llm: whose chat it is.
        templates: of its model.
        given: the arguments.
        projector: of the model; called where the chat has an image or a sound.

    Raises:
        ValueError: it asks for what cannot be had.
    """
    body = {name: given[name] for name in BODY if given.get(name) is not None}
    legacy = bool(given.get("functions")) and "tools" not in body
    if legacy:
        body |= _as_tools(given["functions"], given.get("function_call"))
    found = media.media_of(body["messages"])
    if found:
        body["messages"] = media.marked(body["messages"], projector().marker)
    made = templates.prepare(body)
    if made.get("grammar") and given["grammar"] is not None:
        raise ValueError("grammar is given, and tools or a response_format, which have one of their own; give either.")
    model = llm._model
    marks = {mark: model.tokenize(mark.encode(), add_bos=False, special=True) for mark in made["preserved_tokens"]}
    if found:
        prompt, seen = projector().read(made["prompt"], found)
    else:
        prompt, seen = model.tokenize(made["prompt"].encode(), add_bos=True, special=True), {}
    return Prepared(
        prompt=prompt,
        media=seen,
        grammar=ChatGrammar(made) if made.get("grammar") else given["grammar"],
        stop=made["stop"],
        shown={ids[0]: mark.encode() for mark, ids in marks.items() if len(ids) == 1},
        answer=Answer(made),
        legacy=legacy,
    )


def as_completion(prepared: Prepared, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the completion behind a chat that are other than the chat's own, or that it does not have."""
    top = given["top_logprobs"] or 0
    return {
        "prompt": prepared.prompt,
        "grammar": prepared.grammar,
        "stop": prepared.stop,
        "logprobs": top if given["logprobs"] else None,
        "suffix": None,
        "echo": False,
        "stopping_criteria": None,
    }


def _as_tools(functions: Any, call: Any) -> dict[str, Any]:
    """OpenAI's former words for tools, in those of today."""
    made: dict[str, Any] = {"tools": [{"type": "function", "function": function} for function in functions]}
    if isinstance(call, Mapping):
        made["tool_choice"] = {"type": "function", "function": dict(call)}
    elif call is not None:
        made["tool_choice"] = call
    return made


def format_grammar(response_format: Mapping[str, Any]) -> ChatGrammar | None:
    """The grammar of a completion's response_format; None for "text".

    Raises:
        ValueError: a grammar cannot say what the schema does, or the type is not known.
    """
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
    elif kind == "json_object":
        schema = response_format.get("schema")
    else:
        raise ValueError(f'response_format has the type {kind!r}; give "text", "json_object" or "json_schema".')
    return ChatGrammar({"grammar": schema_grammar(JSON_OBJECT if schema in (None, {}) else schema)})


def answers(
    prepared: Prepared, completions: Generator[dict[str, Any], None, None], stream: bool
) -> Generator[dict[str, Any], None, None]:
    """The answer of a chat, or its chunks, from those of its completion."""
    with closing(completions):
        if stream:
            yield from _chunks(prepared, completions)
        else:
            for item in completions:
                yield whole(prepared, item)


def whole(prepared: Prepared, item: dict[str, Any]) -> dict[str, Any]:
    """The answer of a chat, from that of its completion."""
    (choice,) = item["choices"]
    prepared.answer.add(choice["text"], more=choice["finish_reason"] == "length")
    made = {
        "index": 0,
        "message": _shown(prepared, prepared.answer.message),
        "logprobs": chat_logprobs(choice["logprobs"]),
        "finish_reason": _finish(prepared, choice["finish_reason"]),
    }
    return item | {"id": f"chat{item['id']}", "object": "chat.completion", "choices": [made]}


def _chunks(prepared: Prepared, items: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    begun = False
    told: list[Any] = []  # log-probabilities of tokens that no delta shows yet
    answer = prepared.answer
    for item in items:
        (choice,) = item["choices"]
        finish = choice["finish_reason"]
        if not begun:
            begun = True
            yield _chunk(item, {"role": "assistant"})
        told += (chat_logprobs(choice["logprobs"]) or {"content": ()})["content"]
        deltas = answer.read(choice["text"]) if finish is None else answer.add(choice["text"], more=finish == "length")
        for delta in deltas:
            yield _chunk(item, _shown(prepared, delta), told)
            told = []
        if finish is not None:
            yield _chunk(item, {}, told, _finish(prepared, finish))


def _chunk(
    item: Mapping[str, Any], delta: dict[str, Any], logprobs: Sequence[Any] = (), finish: str | None = None
) -> dict[str, Any]:
    """A chat's chunk, from a completion's; the last one has what that has beside."""
    told = {"content": logprobs, "refusal": None} if logprobs else None
    made = {
        "id": f"chat{item['id']}",
        "model": item["model"],
        "created": item["created"],
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish}],
    }
    return made if finish is None else {**made, **{name: item[name] for name in item if name not in made}}


def _finish(prepared: Prepared, finish: str) -> str:
    return "tool_calls" if finish == "stop" and prepared.answer.message.get("tool_calls") else finish


def _shown(prepared: Prepared, message: dict[str, Any]) -> dict[str, Any]:
    """A message, or a delta, in the words that the request had."""
    calls = message.get("tool_calls")
    legacy = prepared.legacy and calls and "function" in calls[0]
    return message | {"function_call": calls[0]["function"]} if calls and legacy else message
