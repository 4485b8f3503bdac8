"""Ctrl-C in the middle of native calls that take long: they end, and what the signal means is raised."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.interrupt import interruptible
from llama_cpp import llama_cpp as lib
from llamas import OPTIONS
from prompts import PROMPT


def interrupted(function: Callable[..., Any], made: list[Any]) -> Callable[..., Any]:
    """A native function that is called when a SIGINT is on its way, and what it returns."""

    def call(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        made.append(function(*args))
        return made[-1]

    return call


@pytest.fixture(autouse=True)
def handler() -> Any:
    """As Python has it, whatever this program was started from."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


def test_while_a_model_is_loaded(demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(lib, "llama_model_load_from_file", interrupted(lib.llama_model_load_from_file, made))
    with pytest.raises(KeyboardInterrupt):
        Llama(demo.target, **OPTIONS)
    assert made == [None]  # llama.cpp gave up
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        assert llm.drafter is not None


def test_in_the_middle_of_a_prompt(demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the batch; the prompt's beginning stays, and the next request answers as ever."""
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        wanted = llm(PROMPT * 8, temperature=0.0)["choices"][0]["text"]
        llm.reset()
        made: list[Any] = []
        monkeypatch.setattr(lib, "llama_decode", interrupted(lib.llama_decode, made))
        with pytest.raises(KeyboardInterrupt):
            llm(PROMPT * 8, temperature=0.0)
        assert made == [2]  # aborted (include/llama.h)
        monkeypatch.undo()
        assert lib.llama_memory_seq_pos_max(lib.llama_get_memory(llm.ctx), 0) == llm.n_tokens - 1
        assert llm(PROMPT * 8, temperature=0.0)["choices"][0]["text"] == wanted


def test_a_handler_of_the_program_s_own_is_called() -> None:
    """Once, with the signal; and where it raises nothing, nothing is raised."""
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with interruptible() as ended:
        assert not ended()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended()
        assert not seen
    assert seen == [signal.SIGINT]


def test_where_sigint_is_ignored_it_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible() as ended:
        os.kill(os.getpid(), signal.SIGINT)
        assert not ended()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
