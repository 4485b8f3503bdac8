"""What we take from llama-cpp-python beyond its documented API: signatures, and members that it keeps to itself.

Only here, so that a new release can be looked through in one place; tests look for each in the pinned one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

# Members that begin with an underscore: where each is, and what we do with it.
PRIVATE = {
    "llama_cpp.Llama": {
        "_ctx": "LlamaContext: decode, cut, ask for its memory",
        "_batch": "LlamaBatch: filled with tokens and a draft, with logits for all",
        "_model": "LlamaModel: its vocabulary, size and window; replaced when closed",
        "_stack": "frees drafter, context and model, in this order",
        "_n_ctx": "cells of the KV cache, as llama.cpp rounded them",
        "_n_vocab": "length of a row of logits",
        "_logits_all": "whether `scores` are kept",
        "_seed": "of the object; a request's own while its sampler chain is made",
        "_input_ids": "the tokens so far",
        "_requires_eval": "set by a roll-back: stock must not choose from the rows of the last decode",
        "_lora_adapter": "empty where llama.cpp could not read the file, which stock lets pass",
        "_chat_handlers": "the chat templates of the file",
        "_init_sampler": "the chain of a request, whose last stage we replace",
    },
    "llama_cpp.LlamaGrammar": {
        "_grammar": "its text",
        "_root": "the name of its first rule",
    },
    "llama_cpp.llama_chat_format": {
        "_convert_text_completion_logprobs_to_chat": "log-probabilities in the shape of a chat's",
    },
    "llama_cpp.llama_cpp": {
        "_lib": "the loaded libllama, for functions without a binding",
    },
    "llama_cpp": {
        "_internals": "LlamaModel and LlamaSampler, for the drafter; LlamaContext, for several sequences",
        "_utils": "suppress_stdout_stderr",
    },
}

signature = functools.cache(inspect.signature)


def bind(method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments as a method of stock's takes them, by name and with its defaults; without `self`.

    Raises:
        TypeError: it does not take them.
    """
    bound = signature(method).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def like(stock: Callable[..., Any], **ours: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show a method with the name and the signature of stock's, and with the latter's text if it has none of its own.

    Args:
        stock: the method of llama_cpp's class.
        ours: keyword arguments that ours has beside, None by default, each with its annotation.
    """
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in ours.items()
    ]

    def shown(method: Callable[..., Any]) -> Callable[..., Any]:
        text = method.__doc__ or stock.__doc__
        functools.update_wrapper(method, stock)
        theirs = signature(stock)
        method.__doc__ = text
        method.__signature__ = theirs.replace(  # type: ignore[attr-defined]
            parameters=[*theirs.parameters.values(), *added]
        )
        return method

    return shown
