"""Our files and our runtime where our patches are not: the pinned llama.cpp as upstream ships it.

`make check-stock` builds it (minutes, once) and runs these; without that build they skip.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from children import environment, post, serving
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.patches import stock
from prompts import PROMPT
from tiny import SIZES

STOCK = stock.stock_dir()
pytestmark = [
    pytest.mark.stock,
    pytest.mark.skipif(not STOCK.exists(), reason="no unpatched llama.cpp here; make check-stock builds it"),
]


def drafting(pair: Pair, log: Path, *options: str) -> AbstractContextManager[str]:
    """The unpatched llama-server, started with the arguments that Ollama gives it for a model with a drafter."""
    files = "-m", pair.target, "--spec-draft-model", pair.drafter
    drafts = "--spec-type", "draft-mtp", "--spec-draft-backend-sampling", "--spec-draft-n-max", "4"
    return serving(STOCK / "llama-server", log, *files, *drafts, *options)


@pytest.fixture(scope="module")
def server(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with drafting(demo, tmp_path_factory.mktemp("server") / "log", "-c", "2048") as url:
        yield url


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("size", [*SIZES, "E2B with a dense drafter"])
def test_every_size_drafts(
    size: str, quant: str, sizes: dict[str, tuple[Path, Path]], tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Random pairs of every kind load with their drafter, draft, and give as many tokens as they are asked for."""
    folders = sizes[size] if size in sizes else (tiny["target"], tiny["dense"])
    pair = convert_pair(*folders, tmp_path, quant, quant)
    body = {"prompt": PROMPT, "n_predict": 24, "temperature": 0, "ignore_eos": True}
    with drafting(pair, tmp_path / "log", "-c", "512") as url:
        answer = post(f"{url}/completion", body)
    assert answer["tokens_predicted"] == 24
    assert answer["timings"]["draft_n"] > 0


def test_a_chat_request_is_answered_with_accepted_drafts(server: str) -> None:
    message = "Continue this file:\ndef main(argv):\n    parser = "
    body = {"messages": [{"role": "user", "content": message}], "max_tokens": 64, "temperature": 0}
    answer = post(f"{server}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"]
    timings = answer["timings"]
    assert timings["draft_n"] > 0
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
    print(json.dumps({"draft_n": timings["draft_n"], "draft_n_accepted": timings["draft_n_accepted"]}))


def test_the_runtime_works_on_the_unpatched_library(demo: Any, tmp_path: Path) -> None:
    """In its own process, where llama_cpp loads the unpatched libllama: same tokens, drafts accepted, one notice."""
    code = """
import json, sys, warnings
from gemma_mtp.runtime import Llama, native
assert not native.patched()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    llm = Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, draft_length=3, verbose=False)
    Llama(sys.argv[1], n_ctx=512, verbose=False).close()
made = llm(sys.argv[2], max_tokens=64, temperature=0.0)["choices"][0]["text"]
told = [str(w.message) for w in said if "patches" in str(w.message)]
print(json.dumps({"text": made, "accepted": llm.stats.accepted, "notices": len(told)}))
"""
    made = {}
    for name, env in (("stock", {"LLAMA_CPP_LIB_PATH": str(STOCK)}), ("ours", {})):
        text = code if env else code.replace("assert not", "assert")
        command = [sys.executable, "-c", text, demo.target, PROMPT]
        around = environment(tmp_path, **env)
        done = subprocess.run(command, env=around, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made[name] = json.loads(done.stdout.splitlines()[-1])
    assert made["stock"]["text"] == made["ours"]["text"]
    assert min(made["stock"]["accepted"], made["ours"]["accepted"]) > 0  # by another head of the drafter
    assert (made["stock"]["notices"], made["ours"]["notices"]) == (1, 0)


def test_stock_dir_is_the_unpatched_build() -> None:
    done = subprocess.run(["nm", "-D", Path(STOCK) / "libllama.so"], capture_output=True, text=True, check=True)
    assert " llama_get_ctx_other\n" not in done.stdout
    assert "_Z19llama_get_ctx_otherP13llama_context" in done.stdout
