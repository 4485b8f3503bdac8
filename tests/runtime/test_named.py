"""Models of Ollama by their name: loaded from its store with the drafter that they have there."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gemma_mtp.convert import Pair, link
from gemma_mtp.runtime import Llama, open_pair
from gemma_mtp.runtime.cli.bench import _pair
from ollamas import LIBRARY, keep, run
from prompts import PROMPT

OPTIONS: dict[str, Any] = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}


def test_a_model_is_loaded_by_its_name(demo: Pair, store: Path) -> None:
    kept = keep(store, f"{LIBRARY}/mine/latest", model=demo.target, draft=demo.drafter)
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        wanted = llm(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    with closing(Llama("mine", **OPTIONS)) as llm:
        assert llm.drafter is not None
        assert llm.model_path == str(kept["model"])
        assert llm(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"] == wanted
        assert llm.stats.drafted > 0
    with closing(Llama("mine:latest", drafter=None, **OPTIONS)) as llm:
        assert llm.drafter is None
    with open_pair("MINE", **OPTIONS) as llm:
        assert llm.drafter is not None
    assert _pair("mine", None) == (kept["model"], kept["draft"])
    assert _pair("mine", demo.drafter) == (kept["model"], demo.drafter)


def test_commands_generate_with_it(demo: Pair, store: Path) -> None:
    keep(store, "hf.co/me/mine/Q8_0", model=demo.target, draft=demo.drafter)
    done = run("run", "hf.co/me/mine:Q8_0", "-p", PROMPT, "-n", "8", "--temp", "0", "-t", "1", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["stats"]["drafted"] > 0


def test_a_model_without_a_drafter_says_how_it_gets_one(demo: Pair, store: Path) -> None:
    keep(store, f"{LIBRARY}/bare/e4b", model=demo.target)
    said = r"Ollama's store has no linked drafter for bare:e4b; run gemma-mtp ollama attach bare:e4b"
    with pytest.raises(link.PairError, match=said), open_pair("bare:e4b", **OPTIONS):
        pass
    with pytest.raises(ValueError, match="nothing does not exist, neither as a file nor as a model of Ollama's store"):
        Llama("nothing", **OPTIONS)
