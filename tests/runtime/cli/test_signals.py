"""Commands that are told to end, by SIGTERM where SIGINT is ignored, as in what a shell runs in the background."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from children import MAIN, STOPPING, Terminal, alone, ended, environment, said, started, until
from gemma_mtp.convert import Pair
from gemma_mtp.convert.staging import PREFIX
from hub import serving

BACKGROUND = (signal.SIGINT,)
CONVERT = ["-q", "F32", "--drafter-quant", "F32"]


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Any]:
    """Options of a program whose temporary files and cache lie below tmp_path."""
    (tmp_path / "temporary").mkdir()
    env = environment(tmp_path / "cache", TMPDIR=str(tmp_path / "temporary"))
    return {"env": env, "stdin": PIPE, "stdout": PIPE, "stderr": PIPE}


def told(number: signal.Signals | None, process: Any, temporary: Path) -> str:
    """The program ends as it should at a signal, or at the SIGTERM it sends itself; returns what it said before."""
    status, _, err = ended(process, number)
    *before, last = err.splitlines() or [""]
    assert (status, last) == ((129, "hung up") if number == signal.SIGHUP else (143, "terminated")), err
    assert alone(process)
    assert not list(temporary.iterdir())
    return "\n".join(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion(number: signal.Signals, tiny: dict[str, Path], tmp_path: Path, place: dict[str, Any]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = [sys.executable, "-c", STOPPING, "convert", tiny["target"], tiny["ordered"], "-o", out, *CONVERT]
    with started(command, BACKGROUND, **place) as process:
        said(process.stdout, "at work")
        assert list(out.glob(".gemma-mtp-*/*.gguf"))
        assert not told(number, process, tmp_path / "temporary")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_two_signals_are_one(tiny: dict[str, Path], tmp_path: Path, place: dict[str, Any]) -> None:
    """What is tidied up after the first is not left by the second."""
    again = f"os.path.basename(a[0]).startswith({PREFIX!r}) and os.kill(os.getpid(), signal.SIGTERM)"
    code = (
        "import os, shutil, signal; tidy = shutil.rmtree\n"
        f"shutil.rmtree = lambda *a, **k: ({again}, tidy(*a, **k))\n{STOPPING}"
    )
    command = [sys.executable, "-c", code, "convert", tiny["target"], tiny["ordered"], "-o", tmp_path / "out", *CONVERT]
    with started(command, **place) as process:
        said(process.stdout, "at work")
        assert not told(signal.SIGTERM, process, tmp_path / "temporary")
    assert not (tmp_path / "out").exists()


def test_between_two_files(tiny: dict[str, Path], tmp_path: Path, place: dict[str, Any]) -> None:
    """All are complete and one has its name: then the others get theirs."""
    code = (
        "import os, signal; from pathlib import Path; real = Path.replace\n"
        "def replace(self, to):\n"
        "    if self.name == 'tiny-target-F32.gguf': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(self, to)\n"
        "Path.replace = replace\n" + MAIN
    )
    command = [sys.executable, "-c", code, "convert", tiny["target"], tiny["ordered"], "-o", tmp_path / "out", *CONVERT]
    with started(command, BACKGROUND, **place) as process:
        assert not told(None, process, tmp_path / "temporary")
    names = ["Modelfile", "tiny-ordered-F32.gguf", "tiny-target-F32.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_what_is_ignored_stays_ignored(tiny: dict[str, Path], tmp_path: Path, place: dict[str, Any]) -> None:
    """As nohup does it: the conversion goes on when the terminal is closed."""
    command = [sys.executable, "-c", STOPPING, "convert", tiny["target"], tiny["ordered"], "-o", tmp_path / "out"]
    with started(command, (signal.SIGINT, signal.SIGHUP), **place) as process:
        said(process.stdout, "at work")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        status, out, err = ended(process)
    assert (status, err) == (0, "")
    assert "tiny-target-Q4_K_M.gguf" in out


def test_a_download(tiny: dict[str, Path], tmp_path: Path, place: dict[str, Any]) -> None:
    """huggingface_hub would wait for the end of the file, in a thread of its own."""
    names, come = ("google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"), threading.Event()
    with serving(dict(zip(names, (tiny["target"], tiny["ordered"]), strict=True))) as hub:
        hub.held["model.safetensors"] = come
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", MAIN, "convert", names[0], "-o", tmp_path / "out"]
        for number, status, words in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
            hub.requests.clear()
            with started(command, **place | {"env": place["env"] | settings}) as process:
                until(lambda: any("GET" in each and each[1].endswith(".safetensors") for each in hub.requests), process)
                found = ended(process, number)
                assert (found[0], found[2].split()) == (status, [words])
        come.set()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["link", "verify", "bench"])
def test_work_on_a_pair(command: str, demo: Pair, tmp_path: Path, place: dict[str, Any]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = {
        "link": ["link", demo.target, demo.drafter, "-o", out / "linked.gguf", "--force"],
        "verify": ["verify", demo.target],
        "bench": ["bench", demo.target, "-t", "1"],
    }[command]
    with started([sys.executable, "-c", STOPPING, *arguments], BACKGROUND, **place) as process:
        said(process.stdout, "at work")
        assert not told(signal.SIGTERM, process, tmp_path / "temporary")
    assert not list(out.iterdir())


def test_a_measurement_and_its_process(demo: Pair, tmp_path: Path, place: dict[str, Any]) -> None:
    """While bench waits for the process that measures."""
    code = (
        "from gemma_mtp.runtime.bench.worker import Worker as w; real = w.call\n"
        "w.call = lambda *a, **k: (print('measuring', flush=True), real(*a, **k))[1]\n" + MAIN
    )
    command = [sys.executable, "-c", code, "bench", demo.target, "-t", "1", "-n", "2000"]
    with started(command, BACKGROUND, **place) as process:
        said(process.stdout, "measuring")
        assert not told(signal.SIGTERM, process, tmp_path / "temporary")


def test_a_text(demo: Pair, tmp_path: Path, place: dict[str, Any]) -> None:
    command = [sys.executable, "-c", MAIN, "run", demo.target, "-p", "import os\n", "-t", "1", "-n", "4000"]
    with started(command, BACKGROUND, **place) as process:
        assert process.stdout is not None and process.stdout.read(1)
        assert not told(signal.SIGTERM, process, tmp_path / "temporary")


def test_a_model_that_is_being_loaded(demo: Pair, tmp_path: Path, place: dict[str, Any]) -> None:
    """llama.cpp calls Python then, for every line of its log, where an exception is dropped."""
    code = (
        "import llama_cpp._logger as l, os, signal; from llama_cpp import llama_cpp as lib; told = []\n"
        "@lib.llama_log_callback\n"
        "def callback(*_):\n"
        "    told.append(None)\n"
        "    len(told) == 5 and os.kill(os.getpid(), signal.{})\n"
        "lib.llama_log_set(callback, None)\n" + MAIN
    )
    for name, status, words in (("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")):
        command = [sys.executable, "-c", code.format(name), "run", demo.target, "-p", "import os\n", "-n", "4000"]
        with started(command, **place) as process:
            found = ended(process)
            assert (found[0], found[2].split()) == (status, [words])
            assert alone(process)


def test_a_conversation(demo: Pair, tmp_path: Path, place: dict[str, Any]) -> None:
    """In the middle of an answer."""
    command = [sys.executable, "-c", MAIN, "chat", demo.target, "-t", "1"]
    with started(command, BACKGROUND, **place) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("import os\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        assert not told(signal.SIGTERM, process, tmp_path / "temporary")


def test_a_conversation_in_a_terminal(demo: Pair, tmp_path: Path, place: dict[str, Any]) -> None:
    """At the prompt."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", MAIN, "chat", demo.target, "-t", "1"]
    try:
        with started(command, BACKGROUND, **place | {"stdin": theirs, "stdout": theirs}) as process:

            def asked_to_end() -> bool:
                process.send_signal(signal.SIGTERM)
                return process.poll() is not None

            Terminal(ours).until("> ")
            # Until the terminal is read, Python's readline notices no signal: then the next one is.
            until(asked_to_end)
            told(signal.SIGTERM, process, tmp_path / "temporary")
    finally:
        os.close(ours)
        os.close(theirs)
