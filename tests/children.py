"""Programs that tests start, signal and wait for. What is waited for is an event, never a moment."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

# Seconds after which something hangs. It is no judgement of speed: beside two busy programs ggml is forty times slower.
GUARD = 900
MAIN = "from gemma_mtp.runtime.cli.main import main; main()"
# The same, and wherever a command tells of its progress it says so and stops in its work until it is sent a line.
STOPPING = (
    "import rich.progress as p, sys; real = p.Progress.update\n"
    "p.Progress.update = lambda *a, **k: (print('at work', flush=True), sys.stdin.readline(), real(*a, **k))\n" + MAIN
)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a program finds around it whose cache is a folder: what it learns of costs stays out of the user's."""
    return {**os.environ, "GEMMA_MTP_CACHE": str(folder), **more}


def until(found: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """Ask again and again for what nothing tells of, until it is true; returns that.

    Args:
        found: what is asked.
        process: the program that shall bring it about; it must not end before.
    """
    last = time.monotonic() + GUARD
    while not (value := found()):
        assert process is None or process.poll() is None, f"it ended with status {process.returncode}"
        assert time.monotonic() < last, "it never happened"
        time.sleep(0.02)
    return value


def gone(pid: int) -> bool:
    """Whether a process is no more; one that nobody has waited for yet does nothing more either."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return True


@contextmanager
def started(
    command: Sequence[object], ignored: Sequence[signal.Signals] = (), **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A program in a process group of its own; afterwards it is gone, and with it whatever it has started.

    Args:
        command: program and arguments.
        ignored: signals that are ignored when it starts. A shell ignores SIGINT in what it runs in the background, and
            that is inherited, by the tests too: here a signal is ignored where this says so, and not otherwise.
        options: of Popen.
    """
    kept = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    try:
        for each in kept:
            signal.signal(each, signal.SIG_IGN if each in ignored else signal.SIG_DFL)
        process = subprocess.Popen([*map(str, command)], text=True, start_new_session=True, **options)
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
    kill = partial(os.killpg, process.pid, signal.SIGKILL)
    guard = threading.Timer(GUARD, kill)
    guard.start()
    with process:
        try:
            yield process
        finally:
            guard.cancel()
            with suppress(ProcessLookupError):
                kill()


def ended(process: subprocess.Popen[str], number: signal.Signals | None = None) -> tuple[int, str, str]:
    """Status, output and errors of a program that comes to its end, or is sent a signal for that."""
    if number is not None:
        process.send_signal(number)
    out, err = process.communicate()
    return process.returncode, out, err


def alone(process: subprocess.Popen[str]) -> bool:
    """Whether nothing that a program has started outlives it."""
    assert process.poll() is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        return False
    return True


def said(stream: IO[str] | None, wanted: str) -> str:
    """Read lines of a program's output up to the one that holds something; returns that line."""
    assert stream is not None
    for line in stream:
        if wanted in line:
            return line
    raise AssertionError(f"it ended without saying {wanted!r}")


@contextmanager
def server(program: Path, log: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A llama-server that has loaded its model, and its address; it takes a free port of its own choice.

    Args:
        program: the server.
        log: file to write its output to.
        arguments: of the server; later ones win.
    """
    command = [program, "--host", "127.0.0.1", "--port", "0", "-np", "1", "-t", "1", *arguments]
    with log.open("w") as out, started(command, stdout=out, stderr=out) as process:
        try:
            yield process, until(lambda: re.search(r"listening on (http://\S+)\n", log.read_text()), process)[1]
        finally:
            print(log.read_text()[-3000:])


@contextmanager
def serving(program: Path, log: Path, *arguments: object) -> Iterator[str]:
    """The address of such a server."""
    with server(program, log, *arguments) as (_, url):
        yield url


def post(url: str, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """What a server answers to JSON, which is JSON too.

    Args:
        url: where to.
        body: what is asked.
        key: sent as a bearer token.

    Raises:
        urllib.error.HTTPError: another status than 200.
    """
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=GUARD) as said:
        answer: dict[str, Any] = json.load(said)
    return answer


class Terminal:
    """Our end of a terminal."""

    def __init__(self, end: int) -> None:
        self.end, self.seen = end, ""

    def until(self, wanted: str, seconds: float = GUARD) -> bool:
        """Read until something stands there, or not for so long; what comes after it is left for the next call."""
        last = time.monotonic() + seconds
        while wanted not in self.seen:
            if not select.select([self.end], [], [], max(last - time.monotonic(), 0))[0]:
                assert seconds < GUARD, self.seen
                return False
            self.seen += os.read(self.end, 4096).decode(errors="replace")
        self.seen = self.seen.split(wanted, 1)[1]
        return True

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())
