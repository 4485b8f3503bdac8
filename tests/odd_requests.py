"""Requests to a server that no client sends: values of the wrong kind, huge, nested and looped; HTTP that is none.

All are made of a number, so that one that did harm can be sent again. A request is a sound one in which a few values
were exchanged, for values that may stand there or for any others; or a few bytes that are no sound HTTP.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import odd_values as odd


@dataclass(frozen=True)
class Request:
    """What is sent: a body to a path, or bytes over a connection as they are."""

    number: int
    path: str = ""
    body: bytes = b""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    raw: bytes | None = None
    leave: bool = False  # after the first bytes of the answer

    def __str__(self) -> str:
        what = f"{self.method} {self.path} {self.body[:300]!r}" if self.raw is None else f"raw {self.raw[:200]!r}"
        more = {name: text for name, text in self.headers.items() if text != "application/json"}
        return f"request {self.number}: {what}, {len(self.body)} bytes {more or ''}" + (", left" if self.leave else "")


Rng = random.Random
Make = Callable[[Rng], Any]
USER = {"role": "user", "content": "import os"}

# What stands in the body of any request that generates, and makers of what may stand there.
SAMPLING: dict[str, Make] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "top_n_sigma", "repeat_penalty", "presence_penalty", "dry_base",
         "frequency_penalty", "dry_multiplier", "xtc_probability", "xtc_threshold", "mirostat_tau", "mirostat_eta",
         "dynatemp_range", "dynatemp_exponent", "adaptive_target", "adaptive_decay"), odd.number),
    **dict.fromkeys(
        ("top_k", "repeat_last_n", "dry_allowed_length", "dry_penalty_last_n", "mirostat", "seed", "min_keep",
         "n_probs",
         "top_logprobs", "n", "n_cmpl", "max_tokens", "max_completion_tokens", "n_predict", "n_indent", "n_keep",
         "n_discard", "n_cache_reuse", "t_max_predict_ms", "id_slot", "sse_ping_interval", "best_of",
         "reasoning_budget_tokens", "thinking_budget_tokens", "reasoning_control", "chat_format"), odd.whole),
    **dict.fromkeys(
        ("cache_prompt", "ignore_eos", "stream", "return_tokens", "return_progress", "post_sampling_probs", "logprobs",
         "timings_per_token", "backend_sampling", "grammar_lazy", "parse_tool_calls", "echo", "verbose",
         "parallel_tool_calls", "add_generation_prompt"), odd.truth),
    **dict.fromkeys(("generation_prompt", "reasoning_format", "reasoning_effort", "user", "model", "grammar_type",
                     "reasoning_budget_message", "reasoning_budget_start_tag", "suffix"), odd.text),
    **dict.fromkeys(("preserved_tokens", "dry_sequence_breakers", "reasoning_budget_end_tags", "response_fields"),
                    odd.texts),
    "stop": odd.texts, "samplers": odd.samplers, "logit_bias": odd.logit_bias, "lora": odd.lora,
    "grammar": odd.grammar, "grammar_triggers": odd.triggers, "json_schema": odd.schema, "chat_parser": odd.parser,
    "stream_options": lambda rng: {"include_usage": odd.truth(rng)}, "message_delimiters": odd.anything,
    "continue_final_message": odd.truth,
}  # fmt: skip
CHAT: dict[str, Make] = {
    **SAMPLING, "messages": odd.messages, "tools": odd.tools, "tool_choice": odd.tool_choice,
    "response_format": odd.response_format, "chat_template_kwargs": odd.template_values, "metadata": odd.anything,
    "chat_template": odd.text, "functions": odd.tools,
}  # fmt: skip
RESPONSES: dict[str, Make] = {
    **CHAT, "input": odd.messages, "instructions": odd.text, "max_output_tokens": odd.whole,
    "text": lambda rng: {"format": {"type": "json_schema", "name": "x", "schema": odd.schema(rng)}},
    "reasoning": lambda rng: {"effort": odd.text(rng)}, "previous_response_id": odd.text,
}  # fmt: skip
MESSAGES: dict[str, Make] = {
    **CHAT, "system": odd.content, "stop_sequences": odd.texts, "thinking": odd.anything,
    "output_config": lambda rng: {"format": {"type": "json_schema", "schema": odd.schema(rng)}},
}  # fmt: skip
COMPLETION: dict[str, Make] = {**SAMPLING, "prompt": odd.prompt}
INFILL: dict[str, Make] = {
    **COMPLETION, "input_prefix": odd.text, "input_suffix": odd.text,
    "input_extra": lambda rng: [{"filename": odd.text(rng), "text": odd.text(rng)} for _ in range(rng.choice((1, 9)))],
}  # fmt: skip
TEXTS: dict[str, Make] = {
    "content": odd.content, "input": odd.prompt, "encoding_format": odd.text, "dimensions": odd.whole,
    "tokens": odd.ids,
    "add_special": odd.truth, "parse_special": odd.truth, "with_pieces": odd.truth, "embd_normalize": odd.whole,
    "query": odd.text, "documents": odd.texts, "top_n": odd.whole, "prompt": odd.prompt, "model": odd.text,
}  # fmt: skip
OTHERS: dict[str, Make] = {
    "filename": odd.text, "id": odd.whole, "scale": odd.number, "action": odd.text, "url": odd.text,
    "conversation_ids": odd.texts, "model": odd.text, "name": odd.text, "params": odd.anything,
}  # fmt: skip

FEW = {"max_tokens": 8, "temperature": 0}
# Where requests go: how often, a sound body, and makers of what may stand there.
PATHS: list[tuple[int, str, Any, dict[str, Make]]] = [
    (30, "/v1/chat/completions", {"messages": [USER], **FEW}, CHAT),
    (10, "/completion", {"prompt": "import os\n", "n_predict": 8}, COMPLETION),
    (6, "/v1/completions", {"prompt": "import os\n", **FEW}, COMPLETION),
    (6, "/v1/messages", {"messages": [USER], **FEW}, MESSAGES),
    (6, "/v1/responses", {"input": "import os", "max_output_tokens": 8}, RESPONSES),
    (4, "/apply-template", {"messages": [USER]}, CHAT),
    (3, "/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 8}, INFILL),
    (2, "/v1/messages/count_tokens", {"messages": [USER]}, MESSAGES),
    (1, "/v1/chat/completions/input_tokens", {"messages": [USER]}, CHAT),
    (1, "/v1/responses/input_tokens", {"input": "import os"}, RESPONSES),
    (2, "/v1/embeddings", {"input": "import os"}, TEXTS),
    (1, "/embedding", {"content": "import os"}, TEXTS),
    (3, "/tokenize", {"content": "import os"}, TEXTS),
    (3, "/detokenize", {"tokens": [5, 6]}, TEXTS),
    (1, "/v1/rerank", {"query": "a", "documents": ["a"]}, TEXTS),
    (1, "/v1/audio/transcriptions", {"prompt": "a"}, TEXTS),
    (1, "/lora-adapters", [], OTHERS),
    (1, "/props", {}, OTHERS),
    (1, "/slots/0?action=erase", {}, OTHERS),
    (1, "/slots/0?action=save", {"filename": "x"}, OTHERS),
    (1, "/slots/9999999999?action=restore", {"filename": "../x"}, OTHERS),
    (1, "/slots/x?action=", {}, OTHERS),
    (1, "/v1/chat/completions/control", {"id": "x", "action": "end_reasoning"}, OTHERS),
    (1, "/v1/streams/lookup", {"conversation_ids": ["x"]}, OTHERS),
    (1, "/cors-proxy?url=http://127.0.0.1:1/", {}, OTHERS),
    (1, "/models/load", {"model": "x"}, OTHERS),
]
ASKED = ("/health", "/v1/models", "/v1/models/x", "/v1/models/%2e%2e/%00", "/props", "/slots",
         "/slots?fail_on_no_slot=1",
         "/metrics", "/lora-adapters", "/v1/stream", "/v1/stream?conv_id=x&from=-1", "/", "/%2e%2e/%2e%2e/etc/passwd",
         "/../../etc/passwd", "//", "/index.html", "/tools", "/nothing", "/v1/chat/completions",
         "/completion")  # fmt: skip


def request(number: int) -> Request:
    """The request of a number."""
    rng = Rng(number)
    kind = rng.random()
    if kind < 0.04:
        return Request(number, raw=odd.http(rng))
    if kind < 0.07:
        method = rng.choice(("GET", "GET", "HEAD", "DELETE", "PUT", "OPTIONS", "PATCH", "FOO"))
        return Request(number, rng.choice(ASKED), method=method, headers=_headers(rng))
    _, path, sound, makers = rng.choices(PATHS, [each[0] for each in PATHS])[0]
    body = json.loads(json.dumps(sound))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        body = _changed(body, makers, rng)
    sent = odd.written(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.04:
        sent = _spoiled(sent, rng)
    return Request(number, path, sent, headers=_headers(rng), leave=rng.random() < 0.05)


def _changed(body: Any, makers: dict[str, Make], rng: Rng) -> Any:
    """A body in which one more value is odd."""
    if not isinstance(body, dict) or rng.random() < 0.02:
        return odd.anything(rng)
    chance = rng.random()
    name = rng.choice([*makers])
    if chance < 0.75:
        return body | {name: makers[name](rng)}
    if chance < 0.93:
        return body | {rng.choice([*body, name]): odd.anything(rng)}
    body.pop(rng.choice([*body, name]), None)
    return body


def _spoiled(sent: bytes, rng: Rng) -> bytes:
    """JSON that is none any more, or not in UTF-8, or another one."""
    at = rng.randrange(len(sent) + 1)
    return rng.choice((sent[:at], sent[:at] + bytes([rng.randrange(256)]) + sent[at:], sent + b"}", b"\xff\xfe" + sent,
                       sent.replace(b'"', b"'"), b"", b"null", b" " * 100_000 + sent, sent * 2))  # fmt: skip


def _headers(rng: Rng) -> dict[str, str]:
    plain = {"Content-Type": "application/json"}
    more = {
        0: {"Content-Type": "text/plain"}, 1: {"Content-Type": "multipart/form-data; boundary=x"},
            2: {"Accept": "x" * 4000},
        3: {"X-Conversation-Id": rng.choice(("a", "b", "", "/" * 100))}, 4: {"Range": "bytes=5-1"}, 5: {"Expect": "x"},
        6: {"Content-Encoding": "gzip"}, 7: {"Authorization": "Bearer x"},
    }  # fmt: skip
    return plain | more.get(rng.randrange(80), {})
