"""What each argument of `Llama` and of its requests may be, in tables; `checked` goes by them.

llama.cpp and llama-cpp-python take most of what they are given: a number that does not fit wraps around, one that makes
no sense ends the process, or changes the text in silence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from gemma_mtp.runtime.checks import (
    COUNT,
    FLAG,
    INT32,
    SHARE,
    Rule,
    called,
    listed,
    number,
    one_of,
    refused,
    shown,
    text_of,
    whole,
)

THREADS = 512  # GGML_MAX_N_THREADS; llama.cpp has no room for more
KEY_BYTES = 127  # of a key of metadata, llama_model_kv_override


def _stops(value: Any) -> list[str]:
    if value is None:
        return []
    return [text_of(each) for each in ([value] if isinstance(value, str) else value if listed(value) else [None])]


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not listed(value):
        raise refused()
    return [whole()("", token) for token in value]


def _processors(value: Any) -> list[Any]:
    return [called(each) for each in (value if listed(value) else [value])]


def _criteria(value: Any) -> Any:
    if callable(value):
        return value
    found = [called(each) for each in value]
    return lambda ids, logits: any(criterion(ids, logits) for criterion in found)


def _grammar(value: Any) -> Any:
    if not hasattr(value, "_grammar"):
        raise refused()
    return value


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise refused()
    made = {int(token): float(by) for token, by in value.items()}
    if any(math.isnan(by) or by == math.inf for by in made.values()):
        raise refused()
    return made


def _variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise refused()
    return {text_of(name): each for name, each in value.items()}


def _tools(value: Any) -> list[dict[str, Any]]:
    made = list(value) if listed(value) else [value]
    if not all(isinstance(each, Mapping) for each in made):
        raise refused()
    return made


def _choice(value: Any) -> Any:
    if not isinstance(value, str | Mapping):
        raise refused()
    return value


def _typed(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise refused()
    return dict(value)


def _seed(value: Any) -> int:
    if not isinstance(value, Integral):
        raise refused()
    return int(value)


SEED = Rule(_seed, "a whole number, or -1 to have one drawn").or_none()
MAX_TOKENS = whole(words=": 0 for none, below 0 for as many as the context holds").or_none(" for the same")

REQUEST: dict[str, Rule] = {
    "prompt": Rule(_prompt, "a text, or a list of token ids; several prompts are several calls"),
    "suffix": Rule(text_of, "a text").or_none(),
    "max_tokens": MAX_TOKENS,
    "min_tokens": COUNT.or_none(),
    "temperature": number(words=": 0 for the most likely token, below 0 to draw from all of them"),
    "top_p": SHARE,
    "min_p": SHARE,
    "typical_p": SHARE,
    "logprobs": COUNT.or_none(),
    "echo": FLAG,
    "stop": Rule(_stops, "a text, or several"),
    "frequency_penalty": number(),
    "presence_penalty": number(),
    "repeat_penalty": number(above=0.0),
    "top_k": whole(words=", 0 for all tokens"),
    "stream": FLAG,
    "seed": SEED,
    "tfs_z": number(),
    "mirostat_mode": one_of(0, 1, 2, words="0, 1 or 2"),
    "mirostat_tau": number(0.0),
    "mirostat_eta": number(0.0),
    "model": Rule(text_of, "a text").or_none(),
    "stopping_criteria": Rule(_criteria, "a StoppingCriteriaList, or a function of ids and logits").or_none(),
    "logits_processor": Rule(_processors, "a LogitsProcessorList, or functions of ids and logits").or_none(),
    "grammar": Rule(_grammar, "a LlamaGrammar, for instance LlamaGrammar.from_string(text)").or_none(),
    "logit_bias": Rule(_bias, "a number for each of some token ids, none of them nan or inf").or_none(),
}
CHAT: dict[str, Rule] = {name: rule for name, rule in REQUEST.items() if name != "prompt"} | {
    "logprobs": FLAG.or_none(),
    "top_logprobs": COUNT.or_none(),
    "tools": Rule(_tools, "a list of tools, each a dict as OpenAI has it").or_none(),
    "tool_choice": Rule(_choice, '"none", "auto", "required", or a dict that names a tool').or_none(),
    "functions": Rule(_tools, "a list of functions, each a dict as OpenAI has it").or_none(),
    "function_call": Rule(_choice, '"none", "auto", or a dict that names a function').or_none(),
    "response_format": Rule(_typed, 'a dict with a "type"').or_none(),
    "chat_template_kwargs": Rule(_variables, "a dict of variables for the chat template").or_none(),
    "parallel_tool_calls": FLAG.or_none(),
    "reasoning_effort": Rule(text_of, 'a text, "none" for no thinking').or_none(),
}
GENERATE = REQUEST | {"temp": REQUEST["temperature"], "reset": FLAG, "penalize_nl": FLAG}


def check_tokens(tokens: Sequence[int], count: int) -> None:
    """Refuse ids that no token has; those below 0 stand for an image or a sound.

    Raises:
        ValueError: naming the first.
    """
    if max(tokens, default=0) >= count:
        wrong = next(token for token in tokens if token >= count)
        raise ValueError(f"{wrong} is no token of this model; its ids go from 0 to {count - 1}.")


def check_bias(bias: Mapping[int, float], count: int) -> None:
    """Refuse a bias for what is no token.

    Raises:
        ValueError: naming the first.
    """
    for token in bias:
        if not 0 <= token < count:
            raise ValueError(
                f"logit_bias names {token}, which is no token of this model; ids go from 0 to {count - 1}."
            )


def check_variables(variables: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse variables for a chat template that are arguments of a chat.

    Raises:
        ValueError: naming them.
    """
    if twice := sorted(variables.keys() & given.keys()):
        raise ValueError(f"chat_template_kwargs has {', '.join(twice)}; give that as an argument of its own.")


def check_messages(messages: Any, reads: Sequence[str] | None) -> None:
    """Refuse a chat that a template would take for another one.

    Args:
        messages: as OpenAI has them.
        reads: types of parts that are read beside text; None where a chat handler knows.

    Raises:
        ValueError: naming the message and what is wrong with it.
    """
    if not listed(messages) or not messages:
        raise ValueError(f"messages is {shown(messages)}; give a list of messages, one at least.")
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where} is {shown(message)}; give a dict with a "role" and "content".')
        content = message.get("content")
        if not (content is None or isinstance(content, str) or listed(content)):
            raise ValueError(f"{where} has the content {shown(content)}; give a text, or a list of parts.")
        for part in () if content is None or isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str):
                raise ValueError(f'{where} has the part {shown(part)}; give a dict with a "type".')
            if kind == "text" and reads is not None and not isinstance(part.get("text"), str):
                raise ValueError(f'{where} has the part {shown(part)}; give its "text".')
            if kind != "text" and reads is not None and kind not in reads:
                known = (
                    f"the types {', '.join(('text', *reads))}; leave the part out"
                    if reads
                    else "text alone, as its chats are llama-cpp-python's own; load it without chat_format, with the "
                    "patched build (gemma-mtp build), or leave the part out"
                )
                raise ValueError(f"{where} has a part of type {kind!r}, and this Llama reads {known}.")


def _path(value: Any) -> str | os.PathLike[str]:
    if not isinstance(value, str | os.PathLike):
        raise refused()
    return value


def _file(value: Any) -> str:
    path = os.fspath(_path(value))
    if path and not Path(path).is_file():
        raise refused()
    return path


def _split(value: Any) -> list[float]:
    if not listed(value):
        raise refused()
    return [number(0.0)("", each) for each in value]


def _overrides(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise refused()
    for key, each in value.items():
        text = each.encode() if isinstance(each, str) else b""
        if not isinstance(each, bool | int | float | str) or not len(text_of(key).encode()) <= KEY_BYTES >= len(text):
            raise refused()
    return dict(value)


def _tokenizer(value: Any) -> Any:
    if not hasattr(value, "tokenize") or not hasattr(value, "detokenize"):
        raise refused()
    return value


def _numa(value: Any) -> bool | int:
    return value if isinstance(value, bool) else int(whole(0, 4)("", value))


POSITIONS = whole(1, INT32, " (tokens)")
LAYERS = whole(-1, words=", -1 for all")
NUMBER = number()
OPTIONS: dict[str, Rule] = {
    "n_gpu_layers": LAYERS,
    "split_mode": one_of(0, 1, 2, 3, words="a LLAMA_SPLIT_MODE, 0 to 3"),
    "main_gpu": COUNT,
    "tensor_split": Rule(_split, "a share of 0 at least for each device").or_none(),
    "vocab_only": FLAG,
    "seed": SEED,
    "use_mmap": FLAG,
    "use_mlock": FLAG,
    "kv_overrides": Rule(
        _overrides, f"a bool, a number or a text for each key of metadata, {KEY_BYTES} bytes at most"
    ).or_none(),
    "n_ctx": whole(0, INT32, " (tokens), 0 for what the model was trained with"),
    "n_batch": POSITIONS,
    "n_ubatch": whole(0, INT32, " (tokens)"),
    "n_threads": whole(0, THREADS).or_none(" for as many as suit the machine"),
    "n_threads_batch": whole(0, THREADS).or_none(" for as many as suit the machine"),
    "rope_scaling_type": whole(-1, 3).or_none(),
    "pooling_type": whole(-1, 4),
    "attention_type": whole(-1, 1),
    "rope_freq_base": NUMBER,
    "rope_freq_scale": NUMBER,
    "yarn_ext_factor": NUMBER,
    "yarn_attn_factor": NUMBER,
    "yarn_beta_fast": NUMBER,
    "yarn_beta_slow": NUMBER,
    "yarn_orig_ctx": COUNT,
    "logits_all": FLAG,
    "embedding": FLAG,
    "offload_kqv": FLAG,
    "flash_attn": FLAG,
    "op_offload": FLAG.or_none(),
    "swa_full": FLAG.or_none(),
    "no_perf": FLAG,
    "last_n_tokens_size": COUNT,
    "lora_base": Rule(text_of, "a path").or_none(),
    "lora_scale": NUMBER,
    "lora_path": Rule(_file, "the path of a GGUF adapter that exists").or_none(),
    "numa": Rule(_numa, "True, False, or a GGML_NUMA_STRATEGY, 0 to 4"),
    "chat_format": Rule(text_of, "the name of a chat format").or_none(" for the file's own"),
    "chat_handler": Rule(called, "a chat handler, which is called with the messages").or_none(),
    "draft_model": Rule(called, "a LlamaDraftModel, which is called with token ids").or_none(),
    "tokenizer": Rule(_tokenizer, "a tokenizer, with tokenize and detokenize").or_none(),
    "spm_infill": FLAG,
    "verbose": FLAG,
}
OURS: dict[str, Rule] = {
    "model_path": Rule(_path, "the path of a GGUF file, a folder with one, or the name of a model of Ollama"),
    "drafter": Rule(_path, 'the path of a GGUF file, "auto"').or_none(" for none"),
    "mmproj": Rule(_path, 'the path of a GGUF file, "auto"').or_none(" or False for none"),
    "rpc_servers": Rule(text_of, "HOST:PORT,... of machines where gemma-mtp rpc-server runs").or_none(),
}
