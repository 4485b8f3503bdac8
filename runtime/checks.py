"""What each argument of `Llama` and of its requests may be: one table for each, and one message for all.

llama.cpp and llama-cpp-python take most of what they are given: a number that does not fit wraps around, one that makes
no sense ends the process, or changes the text in silence.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

INT32 = 2**31 - 1
THREADS = 512  # GGML_MAX_N_THREADS; llama.cpp has no room for more
KEY_BYTES = 127  # of a key of metadata, llama_model_kv_override

# Gives the value as llama_cpp takes it; raises ValueError, TypeError or OverflowError.
Check = Callable[[Any], Any]


class Rule:
    """What an argument may be.

    Args:
        check: gives the value, or raises.
        words: what may be given, for the message.
    """

    def __init__(self, check: Check, words: str) -> None:
        self._check, self.words = check, words

    def __call__(self, name: str, value: Any) -> Any:
        """The value of an argument.

        Raises:
            ValueError: it is not what it may be; says what that is.
        """
        try:
            return self._check(value)
        except (ValueError, TypeError, OverflowError) as problem:
            raise ValueError(f"{name} is {_shown(value)}; give {self.words}.") from problem

    def or_none(self, words: str = "") -> Rule:
        """The same, or None."""
        return Rule(lambda value: None if value is None else self._check(value), f"{self.words}, or None{words}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def refused() -> ValueError:
    """What a check raises; `Rule` says the rest."""
    return ValueError()


def whole(least: int = -INT32, most: int = INT32, words: str = "") -> Rule:
    """A whole number within bounds; a bool is none."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise refused()
        return int(value)

    return Rule(check, f"a whole number from {least} to {most}{words}")


def number(least: float = -math.inf, most: float = math.inf, above: float | None = None, words: str = "") -> Rule:
    """A finite number within bounds, which are allowed, or above one, which is not."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise refused()
        made = float(value)
        if not math.isfinite(made) or not least <= made <= most or (above is not None and made <= above):
            raise refused()
        return made

    bounds = (
        f" from {least:g} to {most:g}"
        if math.isfinite(most)
        else f" of {least:g} at least"
        if least > -math.inf
        else ""
    )
    return Rule(check, f"a finite number{bounds if above is None else f' above {above:g}'}{words}")


def _flag(value: Any) -> bool:
    if not isinstance(value, Integral | np.bool_) or value not in (0, 1):
        raise refused()
    return bool(value)


def one_of(*values: int, words: str) -> Rule:
    """One of some whole numbers."""
    inner = whole(min(values), max(values))

    def check(value: Any) -> int:
        made: int = inner("", value)
        if made not in values:
            raise refused()
        return made

    return Rule(check, words)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise refused()
    return value


def _stops(value: Any) -> list[str]:
    if value is None:
        return []
    return [_text(each) for each in ([value] if isinstance(value, str) else value if _listed(value) else [None])]


def _listed(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not _listed(value):
        raise refused()
    return [whole()("", token) for token in value]


def _called(value: Any) -> Any:
    if not callable(value):
        raise refused()
    return value


def _processors(value: Any) -> list[Any]:
    return [_called(each) for each in (value if _listed(value) else [value])]


def _criteria(value: Any) -> Any:
    if callable(value):
        return value
    found = [_called(each) for each in value]
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
    if not isinstance(value, Mapping) or "messages" in value:
        raise refused()
    return {_text(name): each for name, each in value.items()}


def _seed(value: Any) -> int:
    if not isinstance(value, Integral):
        raise refused()
    return int(value)


FLAG = Rule(_flag, "True or False")
SHARE = number(0.0, 1.0)
COUNT = whole(0)
SEED = Rule(_seed, "a whole number, or -1 to have one drawn").or_none()
MAX_TOKENS = whole(words=": 0 for none, below 0 for as many as the context holds").or_none(" for the same")

REQUEST: dict[str, Rule] = {
    "prompt": Rule(_prompt, "a text, or a list of token ids; several prompts are several calls"),
    "suffix": Rule(_text, "a text").or_none(),
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
    "model": Rule(_text, "a text").or_none(),
    "stopping_criteria": Rule(_criteria, "a StoppingCriteriaList, or a function of ids and logits").or_none(),
    "logits_processor": Rule(_processors, "a LogitsProcessorList, or functions of ids and logits").or_none(),
    "grammar": Rule(_grammar, "a LlamaGrammar, for instance LlamaGrammar.from_string(text)").or_none(),
    "logit_bias": Rule(_bias, "a number for each of some token ids, none of them nan or inf").or_none(),
}
CHAT: dict[str, Rule] = {name: rule for name, rule in REQUEST.items() if name != "prompt"} | {
    "logprobs": FLAG.or_none(),
    "top_logprobs": COUNT.or_none(),
}
CHAT_TEMPLATE = Rule(_variables, "a dict of variables for the chat template").or_none()
GENERATE = REQUEST | {"temp": REQUEST["temperature"], "reset": FLAG, "penalize_nl": FLAG}


def checked(table: Mapping[str, Rule], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they may be; those that the table does not name as they are.

    Raises:
        ValueError: one of them is not what it may be.
    """
    return {name: table[name](name, value) if name in table else value for name, value in given.items()}


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


def check_messages(messages: Any, sees: bool) -> None:
    """Refuse a chat that a template would take for another one.

    Args:
        messages: as OpenAI has them.
        sees: whether there is a chat handler, which may know what to do with an image or a sound.

    Raises:
        ValueError: naming the message and what is wrong with it.
    """
    if not _listed(messages) or not messages:
        raise ValueError(f"messages is {_shown(messages)}; give a list of messages, one at least.")
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where} is {_shown(message)}; give a dict with a "role" and "content".')
        content = message.get("content")
        if not (content is None or isinstance(content, str) or _listed(content)):
            raise ValueError(f"{where} has the content {_shown(content)}; give a text, or a list of parts.")
        for part in () if content is None or isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str):
                raise ValueError(f'{where} has the part {_shown(part)}; give a dict with a "type".')
            if kind != "text" and not sees:
                raise ValueError(
                    f"{where} has a part of type {kind!r}, and this Llama reads text alone; load it with a "
                    "chat_handler that has the model's projector (llama_cpp.llama_chat_format), or leave the part out."
                )


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
    if not _listed(value):
        raise refused()
    return [number(0.0)("", each) for each in value]


def _overrides(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise refused()
    for key, each in value.items():
        text = each.encode() if isinstance(each, str) else b""
        if not isinstance(each, bool | int | float | str) or not len(_text(key).encode()) <= KEY_BYTES >= len(text):
            raise refused()
    return dict(value)


def _tokenizer(value: Any) -> Any:
    return value if _called(value.tokenize) and _called(value.detokenize) else None


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
    "lora_base": Rule(_text, "a path").or_none(),
    "lora_scale": NUMBER,
    "lora_path": Rule(_file, "the path of a GGUF adapter that exists").or_none(),
    "numa": Rule(_numa, "True, False, or a GGML_NUMA_STRATEGY, 0 to 4"),
    "chat_format": Rule(_text, "the name of a chat format").or_none(" for the file's own"),
    "chat_handler": Rule(_called, "a chat handler, which is called with the messages").or_none(),
    "draft_model": Rule(_called, "a LlamaDraftModel, which is called with token ids").or_none(),
    "tokenizer": Rule(_tokenizer, "a tokenizer, with tokenize and detokenize").or_none(),
    "spm_infill": FLAG,
    "verbose": FLAG,
}
OURS: dict[str, Rule] = {
    "model_path": Rule(_path, "the path of a GGUF file, a folder with one, or the name of a model of Ollama"),
    "drafter": Rule(_path, 'the path of a GGUF file, "auto", or None for none').or_none(),
    "rpc_servers": Rule(_text, "HOST:PORT,... of machines where gemma-mtp rpc-server runs").or_none(),
}


def unknown(options: Mapping[str, Any], known: Iterable[str]) -> str | None:
    """What to say of arguments that llama_cpp.Llama swallows without a word; None if there are none."""
    names = [*known]
    strange = [name for name in options if name not in names]
    if not strange:
        return None
    near = [difflib.get_close_matches(name, names, 1) for name in strange]
    told = [f"{name} (do you mean {close[0]}?)" if close else name for name, close in zip(strange, near, strict=True)]
    return f"Llama has no argument {', '.join(told)}; it is left out"
