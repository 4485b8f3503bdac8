"""gemma-mtp chat, in a terminal and without one."""

from __future__ import annotations

import os
import pty
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from children import GUARD, MAIN, Terminal, environment, started, until
from click.testing import CliRunner
from gemma_mtp.convert import Pair, modelfile
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.bench.machine import physical_cores
from gemma_mtp.runtime.cli.chat import chat
from gemma_mtp.runtime.cli.main import main
from gemma_mtp.runtime.cli.run import run
from gemma_mtp.runtime.request import SAMPLING

CHAT = ["-t", "1", "--temp", "0", "--draft", "3"]


def test_a_conversation_without_a_terminal(demo: Pair) -> None:
    """Answers on stdout, a line of statistics for each on stderr; a second turn has the first before it."""
    typed = "import os\n/help\n\ndef main(\n/new\nimport os\n"
    done = CliRunner().invoke(main, ["chat", str(demo.target), "-n", "16", *CHAT], input=typed)
    assert done.exit_code == 0, done.output
    llm = Llama(demo.target, n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, draft_length=3)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "import os"}]
    answers: list[str] = []
    for following in ("def main(", None):
        answer = llm.create_chat_completion(messages, max_tokens=16, temperature=0.0, top_k=64, min_p=0.0)
        answers.append(answer["choices"][0]["message"]["content"])
        messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": following}]
    llm.close()
    assert done.stdout == "".join(answer + "\n" for answer in [*answers, answers[0]])
    told = done.stderr.splitlines()
    assert sum("drafted" in line for line in told) == 3
    assert sum("unknown command /help" in line for line in told) == 1


def test_the_defaults_of_sampling_are_those_of_the_modelfile() -> None:
    """One set of values for both mouths, as Gemma 4's generation_config.json has them."""
    assert {name: SAMPLING[name] for name in modelfile.SAMPLING} == modelfile.SAMPLING
    for command in (run, chat):
        defaults = {option.name: option.default for option in command.params}
        assert [defaults[name] for name in ("temp", "top_k", "top_p", "min_p")] == list(SAMPLING.values())


def test_threads_are_for_drafts_and_prompts_too(demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over a draft is a batch to llama.cpp, so -t sets both numbers; without it there is one for each core."""
    given: list[tuple[Any, Any]] = []

    def refusing(*arguments: Any, **options: Any) -> None:
        given.append((options.get("n_threads"), options.get("n_threads_batch")))
        raise ValueError("seen")

    monkeypatch.setattr("gemma_mtp.runtime.llama.Llama", refusing)
    for arguments in (["-t", "3"], []):
        CliRunner().invoke(main, ["run", str(demo.target), "-p", "x", *arguments])
    assert given == [(3, 3), (physical_cores(), physical_cores())]


def test_a_conversation_that_fills_the_context(demo: Pair) -> None:
    typed = "import os\n" + "x = 1 " * 300 + "\nimport os\n/exit\nnever read\n"
    done = CliRunner().invoke(main, ["chat", str(demo.target), "-n", "4", "-c", "256", *CHAT], input=typed)
    assert done.exit_code == 0, done.output
    assert len([line for line in done.stderr.splitlines() if "drafted" in line]) == 2
    assert "context window" in done.stderr
    assert "/new" in done.stderr


def test_interrupt_stops_the_answer_and_not_the_program(demo: Pair, tmp_path: Path) -> None:
    """In a terminal: Ctrl-C in an answer, Ctrl-C at the prompt, and it still answers."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", MAIN, "chat", demo.target, *CHAT]
    terminal = Terminal(ours)
    try:
        with started(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(tmp_path)) as process:

            def interrupted() -> bool:
                process.send_signal(signal.SIGINT)
                return terminal.until("> ", seconds=10)

            terminal.until("> ")
            terminal.type("def first(\n")
            terminal.until("first(")
            terminal.until("\n")
            terminal.until("\n")  # of the answer
            process.send_signal(signal.SIGINT)
            terminal.until("tokens/s")
            terminal.until("> ")
            # The prompt stands there before the terminal is read, and only then Python's readline notices a signal.
            until(interrupted, process)
            terminal.type("/exit\n")
            assert process.wait(GUARD) == 0
    finally:
        os.close(theirs)
        os.close(ours)
