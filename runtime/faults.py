"""llama.cpp's refusals, in words and with the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# What llama_decode returns (include/llama.h), and what helps.
DECODE = {
    1: "the KV cache has no room for the batch; raise n_ctx, or shorten the prompt or max_tokens",
    2: "it was aborted; the tokens before are kept, ask again",
    -1: "it refused the batch; pass token ids between 0 and n_vocab() - 1",
    -2: "memory ran out; lower n_ctx, n_batch or n_ubatch, or quantize the KV cache (type_k, type_v, flash_attn=True)",
    -3: "a computation failed; verbose=True shows llama.cpp's reason",
}
# The quantized ggml types, by their numbers in ggml.h, begin after F32 and F16 and leave out the plain numbers.
PLAIN_TYPES = {0, 1, 24, 25, 26, 27, 28, 30}


def explain_decode(problem: RuntimeError) -> RuntimeError:
    """An error of llama_decode with its meaning; any other error as it is."""
    found = re.search(r"(llama_decode[^,;:]*) returned (-?\d+)", str(problem))
    if found is None:
        return problem
    meaning = DECODE.get(int(found[2]), "verbose=True shows llama.cpp's reason")
    return RuntimeError(f"{found[1]} returned {found[2]}: {meaning}.")


@contextmanager
def explaining_load(options: Mapping[str, Any]) -> Iterator[None]:
    """Give stock's errors at load, which name no cause, the next step; their types stay.

    Args:
        options: the arguments of llama_cpp.Llama.

    Raises:
        ValueError, RuntimeError: as llama_cpp.Llama raises them.
    """
    try:
        yield
    except (ValueError, RuntimeError) as problem:
        hint = _load_hint(str(problem), options)
        if hint is None:
            raise
        raise type(problem)(f"{problem}; {hint}.") from problem


def _load_hint(text: str, options: Mapping[str, Any]) -> str | None:
    if "create llama_context" in text:
        if options.get("type_v") not in {None, *PLAIN_TYPES} and not options.get("flash_attn"):
            return "a quantized V cache (type_v) needs flash_attn=True"
        return "if memory is short, lower n_ctx or n_batch; verbose=True shows llama.cpp's reason"
    if "load model from file" in text:
        return "the file is damaged, or of an architecture this llama.cpp does not know; verbose=True shows which"
    if "LoRA adapter" in text:
        return "pass a GGUF adapter made for this model (llama.cpp's convert_lora_to_gguf.py); verbose=True shows more"
    return None
