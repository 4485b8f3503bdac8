"""`make check-same-calls`: whether `Llama` gives one request one text, whatever was asked before and however.

Twenty prompts of 20 to 900 tokens, made of files that the bundled pair was not trained on, 64 tokens each, greedy and
at temperature 1 with a seed; weights of Q8_0 and Q4_K_M, KV caches of F16 and Q8_0. Each is asked of a fresh object
without MTP first, then in every way of `WAYS`: again, after prompts that share half or one token, after a state was
read, with caches, in batches of several sizes, with `echo` and logprobs, drafting any number of tokens. Counted are
texts that are those of the fresh object; the exit status is 1 unless all are.

    python tests/same_calls.py --prompts 5 --quant Q8_0
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing, redirect_stderr
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
from demo import PAIR, PROMPTS, held_out
from gemma_mtp.convert import convert_pair
from gemma_mtp.runtime import Llama

TOKENS, CONTEXT, LONGEST = 64, 2048, 2400  # tokens, tokens, characters
ASKED: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "temperature 1": {"temperature": 1.0, "seed": 7}}
KINDS = {"F16": 1, "Q8_0": 8}  # of KV caches, by ggml's number

Ask = Callable[..., str]


def prompts(count: int) -> list[str]:
    """The held-out prompts, each with more of those before it in front."""
    texts = held_out()
    return ["\n".join(texts[: place + 1])[-LONGEST:] for place in range(count)]


def opened(target: Path, kind: str, **options: Any) -> Llama:
    given = {"n_ctx": CONTEXT, "type_k": KINDS[kind], "type_v": KINDS[kind], "flash_attn": True, "verbose": False}
    return Llama(target, **{**given, **options})


def text(llm: Llama, prompt: str, **request: Any) -> str:
    made: Any = llm(prompt, max_tokens=TOKENS, **request)
    return str(made["choices"][0]["text"])


def after(other: Callable[[str], str]) -> Callable[[Llama, str, dict[str, Any]], str]:
    """What is answered after another prompt, made of this one."""

    def ask(llm: Llama, prompt: str, request: dict[str, Any]) -> str:
        text(llm, other(prompt), **request)
        return text(llm, prompt, **request)

    return ask


def drafting(length: Any) -> Callable[[Llama, str, dict[str, Any]], str]:
    return lambda llm, prompt, request: text(llm, prompt, draft_length=length, **request)


def reread(llm: Llama, prompt: str, request: dict[str, Any]) -> str:
    """The answer that follows a state which was saved in the midst of the prompt."""
    llm.reset()
    ids = llm.tokenize(prompt.encode())
    llm.eval(ids[: max(1, len(ids) * 2 // 3)])
    state = llm.save_state()
    text(llm, "def other():\n" + prompt[::-1][:400], **request)
    llm.load_state(state)
    return text(llm, prompt, **request)


def echoed(llm: Llama, prompt: str, request: dict[str, Any]) -> str:
    return text(llm, prompt, echo=True, logprobs=2, **request)[len(prompt) :]


def fresh(llm: Llama, prompt: str, request: dict[str, Any]) -> str:
    llm.reset()
    return text(llm, prompt, **request)


# Each with the options of its object. With a cache, every prompt is asked for twice, others in between.
WAYS: dict[str, tuple[dict[str, Any], Callable[[Llama, str, dict[str, Any]], str]]] = {
    "fresh": ({}, fresh),
    "again": ({}, after(lambda prompt: prompt)),
    "after half of it": ({}, after(lambda prompt: prompt[: len(prompt) // 2] + "\nclass Other:\n")),
    "after its first token": ({}, after(lambda prompt: prompt[:1] + " else")),
    "after another, without MTP": ({"drafter": None}, after(lambda prompt: prompt[::-1])),
    "after a state was read": ({}, reread),
    "RAM cache": ({"cache": "ram"}, after(lambda prompt: prompt[::-1][:200])),
    "disk cache": ({"cache": "disk"}, after(lambda prompt: prompt[::-1][:200])),
    "n_batch 16": ({"n_batch": 16}, fresh),
    "n_batch 32": ({"n_batch": 32, "n_ubatch": 16}, fresh),
    "n_batch 2048": ({"n_batch": 2048, "n_ubatch": 2048}, fresh),
    "three threads": ({"n_threads": 3, "n_threads_batch": 2}, fresh),
    "echo and logprobs": ({"logits_all": True}, echoed),
    **{f"drafts of {length}": ({}, drafting(length)) for length in (0, 1, 3, 8, 15, "auto")},
}


def with_cache(llm: Llama, kind: str | None, folder: Path) -> Llama:
    if kind is not None:
        llm.set_cache(llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(folder)))
    return llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--quant", action="append", help="several may be named [Q8_0 and Q4_K_M]")
    given = parser.parse_args()
    texts, failed = prompts(given.prompts), False
    for quant, kind in product(given.quant or ("Q8_0", "Q4_K_M"), KINDS):
        # llama-cpp-python's disk cache tells of each of its steps
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack, redirect_stderr(io.StringIO()):
            folder = Path(name)
            target = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", folder, quant).target
            wanted: dict[tuple[str, str], str] = {}
            for (asked, request), prompt in product(ASKED.items(), texts):
                with closing(opened(target, kind, drafter=None)) as llm:
                    wanted[asked, prompt] = text(llm, prompt, **request)
            print(f"\n{quant}, KV {kind}".ljust(32) + "".join(f"{asked:>16}" for asked in ASKED), flush=True)
            for way, (options, ask) in WAYS.items():
                options = dict(options)
                cache = options.pop("cache", None)
                llm = with_cache(stack.enter_context(closing(opened(target, kind, **options))), cache, folder / "cache")
                rounds = 2 if cache else 1
                row = ""
                for asked, request in ASKED.items():
                    found = [
                        ask(llm, prompt, request) == wanted[asked, prompt] for _ in range(rounds) for prompt in texts
                    ]
                    row += f"{sum(found)} of {len(found)}".rjust(16)
                    failed |= not all(found)
                print(way.ljust(31) + row, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
