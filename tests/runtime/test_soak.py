"""A thousand requests of every kind: nothing grows after the first hundred. And what loading a pair takes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
import pytest
from children import environment
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama
from llama_cpp import llama_cpp as lib
from prompts import held_out

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
# Requests of every kind twice, how often that is done, and how often before anything is measured.
TURN, TURNS, WARM = 24, 42, 6
# Bytes that a request, and an object opened and closed, may leave behind. One row of logits has 12 KiB.
LEFT, LEFT_OPEN = 2 << 10, 128 << 10
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
GRAMMARS = [
    llama_cpp.LlamaGrammar.from_string('root ::= ("ab" | "cd" | "e")+ "\\n"', verbose=False),
    llama_cpp.LlamaGrammar.from_json_schema(SCHEMA, verbose=False),
]


def resident() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def raising(ids: Any, scores: Any) -> Any:
    if len(ids) % 7 == 0:
        raise ValueError("from a processor")
    return scores


def request(llm: Llama, number: int, text: str) -> None:
    """One of a dozen kinds of request, some of which fail, with a prompt of some length."""
    settings: dict[str, Any] = {"max_tokens": 4 + number % 9, "temperature": (number % 3) / 2, "seed": number}
    prompt = text[: 1 + number * 37 % len(text)]
    kind = number % 12
    if kind < 3:
        llm(prompt, **settings, stop=["self", "\n"][: number % 3])
    elif kind == 3:
        stream = llm(prompt, stream=True, **settings)  # abandoned in mid-draft
        next(stream, None)
        next(stream, None)
    elif kind == 4:
        stream = llm.generate(llm.tokenize(prompt.encode()), temp=0.0)
        next(stream)
        stream.close()
    elif kind in (5, 6):
        llm(prompt, grammar=GRAMMARS[kind - 5], **settings)
    elif kind == 7:
        llm(prompt, logprobs=2, echo=number % 24 == 7, **settings)
    elif kind == 8:
        with suppress(ValueError):
            llm(prompt, logits_processor=llama_cpp.LogitsProcessorList([raising]), **settings)
    elif kind == 9:
        messages = [{"role": "user", "content": prompt}]
        list(llm.create_chat_completion(messages, stream=True, mtp=number % 2 == 0, logit_bias={5: 1.0}, **settings))
    elif kind == 10:
        llm.load_state(llm.save_state())
        with suppress(RuntimeError):
            llm.eval([5] * 600)
    else:
        llm(prompt, mirostat_mode=2, repeat_penalty=1.1, **settings)


def growth(sizes: list[int]) -> float:
    """The median step from one size to the next. A leak is in every step; what the allocator takes at once, in one."""
    return median(after - before for before, after in pairwise(sizes))


def test_nothing_grows(demo: Pair) -> None:
    texts = held_out()
    llm = Llama(demo.target, draft_length=3, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    sizes, files = [], []
    for turn in range(TURNS):
        for number in range(turn * TURN, (turn + 1) * TURN):
            request(llm, number, texts[number % len(texts)])
        gc.collect()
        sizes.append(resident())
        files.append(open_files())
    llm.close()
    shown = [round(size / 2**20, 1) for size in sizes]
    print(json.dumps({"requests": TURN * TURNS, "resident_mib": shown, "files": sorted(set(files))}))
    assert llm.total_stats.accepted > TURN * TURNS
    assert len(set(files)) == 1
    assert growth(sizes[WARM:]) < LEFT * TURN


def test_opening_and_closing_leaks_nothing(demo: Pair) -> None:
    sizes, files = [], []
    for _ in range(16):
        with suppress(ValueError):
            Llama(demo.target, type_v=8, n_ctx=256, verbose=False)
        llm = Llama(demo.target, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
        llm("import os", max_tokens=4)
        llm.close()
        gc.collect()
        sizes.append(resident())
        files.append(open_files())
    print(json.dumps({"resident_mib": [round(size / 2**20, 1) for size in sizes]}))
    assert len(set(files)) == 1
    assert growth(sizes[3:]) < LEFT_OPEN


LOADING = """
import sys
from pathlib import Path
if sys.argv[2] == "stock":
    from llama_cpp import Llama
else:
    from gemma_mtp.runtime import Llama
from llama_cpp import llama_cpp as lib
llm = Llama(sys.argv[1], n_ctx=int(sys.argv[3]), n_threads=1, n_threads_batch=1, verbose=False)
llm("import os", max_tokens=8, temperature=0.0)
print([line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0])
"""


def peak(target: Path, which: str, n_ctx: int, cache: Path) -> int:
    """Peak resident memory of loading a target and asking it once, in bytes."""
    command = [sys.executable, "-c", LOADING, target, which, str(n_ctx)]
    done = subprocess.run([*map(str, command)], env=environment(cache), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def test_a_drafter_has_no_vocabulary(demo: Pair) -> None:
    """A second one would take more memory than the drafter itself."""
    llm = Llama(demo.target, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    assert llm.drafter is not None
    model = lib.llama_get_model(llm.drafter.ctx)
    vocab = lib.llama_model_get_vocab(model)
    assert lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE
    assert lib.llama_vocab_n_tokens(vocab) == llm.n_vocab()
    llm.close()


def test_a_pair_takes_little_more_than_its_target(demo: Pair, tmp_path: Path) -> None:
    """At most the drafter's file and 100 MiB; a second KV cache, or scores of every position, would be more."""
    ours, stock = (peak(demo.target, which, 2048, tmp_path) for which in ("ours", "stock"))
    more = ours - stock - demo.drafter.stat().st_size
    print(json.dumps({name: round(size / 2**20, 1) for name, size in {"ours": ours, "stock": stock}.items()}))
    assert more < 100 << 20
