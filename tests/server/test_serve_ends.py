"""How the command serve ends, and llama-server with it."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from children import GUARD, environment, gone, started, until
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import programs, server
from serves import Served, command, served


def busy(found: Served) -> threading.Thread:
    """A long whole answer under way."""

    def ask() -> None:
        body = {"prompt": "import os\n", "n_predict": 1900, "ignore_eos": True}
        with suppress(OSError, ValueError):
            found.ask("/completion", body)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    until(lambda: any(slot["is_processing"] for slot in found.ask("/slots").json), found.process)
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_nothing_is_left(number: signal.Signals, state: str, demo: Pair, tmp_path: Path) -> None:
    """Also where the command itself is killed: llama-server's stdin is closed then."""
    with served(demo.target, tmp_path) as found:
        asking = busy(found) if state == "busy" else None
        found.process.send_signal(number)
        status = found.process.wait(GUARD)
        until(lambda: gone(found.facts["pid"]))
    if asking:
        asking.join(GUARD)
    lines = found.errors.read_text().splitlines()
    last = lines[-1]
    assert not [line for line in lines if " E " in line]  # an answer that is broken off is no error then
    wanted = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (129, "hung up")}
    assert (status, last) == wanted.get(number, (-signal.SIGKILL, last))


def test_it_is_asked_before_it_is_killed(demo: Pair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(demo.target, tmp_path, "--log", log) as found:
        assert found.chat().status == 200  # or it might be asked before it listens to that
    assert server.ENDING in log.read_text()


def test_a_second_interrupt_ends_it_at_once(demo: Pair, tmp_path: Path) -> None:
    """A server that does not end by itself is stopped here, and killed when Ctrl-C comes again."""
    with served(demo.target, tmp_path) as found:
        os.kill(found.facts["pid"], signal.SIGSTOP)
        found.process.send_signal(signal.SIGINT)
        until(lambda: "Ctrl-C again" in found.errors.read_text(), found.process)
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(GUARD) == 130
        assert gone(found.facts["pid"])


def test_a_server_that_hangs_is_killed(demo: Pair, tmp_path: Path) -> None:
    with served(demo.target, tmp_path) as found:
        os.kill(found.facts["pid"], signal.SIGSTOP)
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(GUARD) == 143
        assert gone(found.facts["pid"])


def test_ctrl_c_in_a_terminal(demo: Pair, tmp_path: Path) -> None:
    """Which sends it to all programs in the foreground: llama-server is told once, by the command."""
    ours, theirs = pty.openpty()
    words = command(demo.target, "--port", 0, "-t", 1, "--json")
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    options: dict[str, Any] = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        with started([words[0], "-c", code, *words], env=environment(tmp_path), **options) as process:
            assert process.stdout is not None
            facts = json.loads(process.stdout.readline())
            os.write(ours, b"\x03")
            _, err = process.communicate()
            assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted")
            assert gone(facts["pid"])
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_server_that_dies_is_told_of(demo: Pair, tmp_path: Path) -> None:
    """Killed, or told to end by somebody else."""
    for number, said in ((signal.SIGKILL, "ended by SIGKILL"), (signal.SIGTERM, "somebody else told it to")):
        with served(demo.target, tmp_path) as found:
            assert found.chat().status == 200  # before that it may not notice SIGTERM
            os.kill(found.facts["pid"], number)
            assert found.process.wait(GUARD) == 1
        assert said in found.errors.read_text().splitlines()[-1]


def test_while_it_loads(demo: Pair, tmp_path: Path) -> None:
    """The projector is a FIFO: llama-server waits for its other end and is not ready."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    words = command(demo.target, "--port", 0, "-t", 1, "--", "--grammar-file", fifo)
    with started(words, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        handle = until(lambda: opened(fifo), process)  # once llama-server has opened it for reading
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        assert (process.returncode, err.splitlines()) == (143, [f"loading {demo.target.name}", "terminated"])
        with pytest.raises(BrokenPipeError):
            os.write(handle, b"x")
        os.close(handle)


def opened(fifo: Path) -> int | None:
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def standin(tmp_path: Path, *lines: str) -> list[str]:
    """A program that says some lines and ends."""
    path = tmp_path / "standin"
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)
    return [str(path)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["echo '0.00.000.001 E srv    load_model: first'", "echo '0.00.000.002 E second'", "exit 3"],
         "ended while it loaded, with status 3: first"),
        (["echo '/x.c:1: GGML_ASSERT(x) failed'", "kill -ABRT $$"], "by SIGABRT: /x.c:1: GGML_ASSERT(x) failed"),
        (["exit 0"], "with status 0: it said nothing"),
        (["echo 'cmd_child_to_router:state:{oops'", "echo plain", "exit 1"], "with status 1: plain"),
    ],
)  # fmt: skip
def test_why_it_ended(lines: list[str], said: str, tmp_path: Path) -> None:
    with server.Server(standin(tmp_path, *lines)) as found, pytest.raises(RuntimeError) as refused:
        found.wait()
    assert str(refused.value).endswith(said)


def test_states_are_told(tmp_path: Path) -> None:
    """As llama-server's own router has them."""

    def state(name: str, **payload: Any) -> str:
        return f"echo; echo '{server.STATE}{json.dumps({'state': name, 'payload': payload})}'"

    seen: list[tuple[str, float]] = []
    loading = [state("loading", current="text_model", value=share) for share in (0.0, 0.5)]
    steps: Callable[[str, float], None] = lambda part, share: seen.append((part, share))  # noqa: E731
    with server.Server(standin(tmp_path, *loading, state("ready", id="x"), "read line; exit 0")) as found:
        assert found.wait(steps) == {"id": "x"}
    assert seen == [("text_model", 0.0), ("text_model", 0.5)]
    with server.Server(standin(tmp_path, "exec sleep 1000")) as found, pytest.raises(RuntimeError, match="not ready"):
        found.wait(seconds=0.1)


def test_free_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"cannot listen at 127.0.0.1:{port}"):
            programs.free_port("127.0.0.1", port)
        assert programs.free_port("127.0.0.1", 0) not in (0, port)
    with pytest.raises(RuntimeError, match="cannot listen at"):
        programs.free_port("192.0.2.1", 0)
