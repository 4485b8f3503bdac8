"""llama.cpp's refusals, in words and with the next step."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gemma_mtp.convert import link
from gemma_mtp.runtime.arguments import OPTIONS
from gemma_mtp.runtime.checks import checked
from gemma_mtp.runtime.grammar import grammar_sampler
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import Choose, NoTokenLeft, readable
from jinja2 import TemplateSyntaxError
from llama_cpp import llama_cpp as lib

# In stock's words for a file that llama.cpp did not take.
LOADING = "load model from file"
CLOSED = "this Llama is closed; load the model again."
FORKED = (
    "this Llama was loaded before a fork, which does not take along the threads that compute; load it in the process "
    'that uses it, or start that one with multiprocessing.get_context("spawn").'
)
NAN = (
    "the model's logits are no numbers (nan): its weights are damaged, or a computation overflowed; check the file "
    "with gemma-mtp verify, and convert it again."
)
# What llama_decode returns (include/llama.h), and what helps.
DECODE = {
    1: "the KV cache has no room for the batch; raise n_ctx, or shorten the prompt or max_tokens",
    2: "it was aborted; the tokens before are kept, ask again",
    -1: "it refused the batch; pass token ids between 0 and n_vocab() - 1",
    -2: "memory ran out; lower n_ctx, n_batch or n_ubatch, or quantize the KV cache (type_k, type_v, flash_attn=True)",
    -3: "a computation failed; verbose=True shows llama.cpp's reason",
}
# What a KV cache can hold: number in ggml.h, and how many values a block has. Any other type ends the process in an
# assertion, as ggml cannot make it from floats on the fly, or not read it back.
PLAIN_TYPES = {"F32": (0, 1), "F16": (1, 1), "BF16": (30, 1)}
CACHE_TYPES = PLAIN_TYPES | {
    "Q8_0": (8, 32), "Q5_1": (7, 32), "Q5_0": (6, 32), "Q4_1": (3, 32), "Q4_0": (2, 32), "IQ4_NL": (20, 32),
    "MXFP4": (39, 32), "NVFP4": (40, 64), "Q2_0": (42, 64), "Q1_0": (41, 128), "Q6_K": (14, 256), "Q5_K": (13, 256),
    "Q4_K": (12, 256), "Q3_K": (11, 256), "Q2_K": (10, 256), "IQ4_XS": (23, 256), "TQ1_0": (34, 256),
    "TQ2_0": (35, 256),
}  # fmt: skip
BY_NUMBER = {number: (name, block) for name, (number, block) in CACHE_TYPES.items()}
SMALL_BLOCK = 32  # of which the heads of every Gemma 4 are multiples


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of llama_cpp.Llama as they may be.

    Raises:
        ValueError: naming the argument and what it may be.
    """
    for name in ("type_k", "type_v"):
        value = options.get(name)
        if value is not None and (type(value) is not int or value not in BY_NUMBER):
            known = ", ".join(f"{number} ({each})" for each, (number, _) in CACHE_TYPES.items())
            raise ValueError(f"{name} is {value!r}; a KV cache holds these types of ggml, by number: {known}.")
    return checked(OPTIONS, options)


def check_grammar(model: Any, grammar: Any) -> None:
    """Refuse a grammar that llama.cpp cannot read; a sampler chain would take the null pointer and crash.

    Raises:
        ValueError: it is not GBNF, or has no root rule.
    """
    lib.llama_sampler_free(grammar_sampler(model, grammar))


class Closed:
    """Stands where a freed model was: llama.cpp would read freed memory."""

    ctx = None

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(CLOSED)


def keep_for_good(thing: Any) -> None:
    """Never free something, not even as the process ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def naming_nan(choose: Choose) -> Choose:
    """A choice that tells when there is none because the logits are no numbers."""

    def chosen(logits: Floats, position: int) -> int:
        try:
            token = choose(logits, position)
        except (ValueError, NoTokenLeft) as problem:
            if np.isnan(logits).any():
                raise RuntimeError(NAN) from problem
            raise
        if np.isnan(logits[token]):
            raise RuntimeError(NAN)
        return token

    return chosen


class Careful:
    """Logits processors whose exception is kept: between C frames, where they are called, ctypes would drop it.

    Args:
        processors: llama_cpp's LogitsProcessorList, or any callables.
    """

    def __init__(self, processors: Iterable[Callable[[Any, Any], Any]]) -> None:
        self._processors = list(processors)
        self._raised: BaseException | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._raised is None:
            try:
                for processor in self._processors:
                    scores = processor(readable(input_ids), scores)
            except BaseException as problem:
                self._raised = problem
        return scores

    def check(self) -> None:
        """Raise what a processor raised."""
        problem, self._raised = self._raised, None
        if problem is not None:
            raise problem


def explain_decode(problem: RuntimeError) -> RuntimeError:
    """An error of llama_decode with its meaning; any other error as it is."""
    found = re.search(r"(llama_decode[^,;:]*) returned (-?\d+)", str(problem))
    if found is None:
        return problem
    meaning = DECODE.get(int(found[2]), "verbose=True shows llama.cpp's reason")
    if "drafter" in found[1]:
        meaning += "; mtp=False goes on without the drafter"
    return RuntimeError(f"{found[1]} returned {found[2]}: {meaning}.")


@contextmanager
def explaining_decode() -> Iterator[None]:
    """Raise what llama.cpp refuses within a block with the next step; any other error as it is."""
    try:
        yield
    except RuntimeError as problem:
        explained = explain_decode(problem)
        if str(explained) == str(problem):
            raise
        raise explained from problem


@contextmanager
def explaining_load(path: str | PathLike[str], options: Mapping[str, Any]) -> Iterator[None]:
    """Give stock's errors at load, which name no cause, the next step; their types stay.

    Args:
        path: the file that is loaded.
        options: the arguments of llama_cpp.Llama.

    Raises:
        ValueError, RuntimeError: as llama_cpp.Llama raises them; what is wrong with the file, where that can be seen,
            is a gemma_mtp.convert.link.MtpError, which is a ValueError.
    """
    try:
        yield
    except (ValueError, RuntimeError) as problem:
        if LOADING in str(problem):
            try:
                link.read_parts(link.read_header(Path(path)))
            except link.MtpError as seen:
                raise seen from problem
        hint = _load_hint(str(problem), options)
        if hint is None:
            raise
        raise type(problem)(f"{problem}; {hint}.") from problem
    except TemplateSyntaxError as problem:
        raise ValueError(
            f"the chat template of the file is no Jinja (line {problem.lineno}: {problem.message}); mend it in the "
            "checkpoint, and convert that again."
        ) from problem


def _load_hint(text: str, options: Mapping[str, Any]) -> str | None:
    if "create llama_context" in text:
        types = {key: BY_NUMBER[options[key]] for key in ("type_k", "type_v") if options.get(key) is not None}
        if "type_v" in types and types["type_v"][0] not in PLAIN_TYPES and not options.get("flash_attn"):
            return "a quantized V cache (type_v) needs flash_attn=True"
        for key, (name, block) in types.items():
            if block > SMALL_BLOCK:
                return f"{key} {name} has blocks of {block} values, of which the heads must be multiples"
        return "if memory is short, lower n_ctx or n_batch; verbose=True shows llama.cpp's reason"
    if LOADING in text:
        return "the file is damaged, or of an architecture this llama.cpp does not know; verbose=True shows which"
    if "LoRA adapter" in text:
        return "pass a GGUF adapter made for this model (llama.cpp's convert_lora_to_gguf.py); verbose=True shows more"
    return None
