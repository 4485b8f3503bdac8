"""llama-server as a process: started, watched while it loads, ended.

llama.cpp's router runs such servers itself, and tells them so by a variable of the environment (`server_child` in its
tools/server/server-models.cpp). A server that it tells so reports on stdout how far it has loaded and when it is ready,
ends on a line on stdin, and at once when stdin is closed, so also when its parent is killed. The same is done here.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# What router and server say to each other.
SUPERVISED = {"LLAMA_SERVER_ROUTER_PORT": "0"}
STATE, EXIT = "cmd_child_to_router:state:", "cmd_router_to_child:exit\n"
# How llama-server's log is written, so that its errors can be told: with time and level before each message.
LOGGING = ("--log-prefix", "--log-timestamps", "--no-log-jsonl", "--log-colors", "off")
LOGGED = re.compile(r"\d+(?:\.\d+){3} ([A-Z]) (?:(?:srv|cmn|slot) +\S+: )?(.*)")
# Logged when a server that was told to end by somebody else begins to.
ENDING = "cleaning up before exit"
# Seconds that a server has to end by itself; between two looks at one that loads.
GRACE, LOOK = 5.0, 0.5
# Lines kept of its log.
KEPT = 200


@dataclass(frozen=True)
class Line:
    """A line of a server's log: as it was written, its level ("" for what is no message), and the message."""

    whole: str
    level: str
    text: str

    @property
    def wrong(self) -> bool:
        """Whether it tells of an error, or is no message of the log, such as a failed assertion."""
        return self.level in ("E", "")


def read_line(written: str) -> Line:
    """A line of a server's output, its level read."""
    found = LOGGED.fullmatch(written)
    return Line(written, found[1], found[2]) if found else Line(written, "", written)


def program() -> Path:
    """llama-server of the installed llama-cpp-python.

    Raises:
        RuntimeError: there is none.
    """
    package = find_spec("llama_cpp")
    for folder in package.submodule_search_locations or () if package else ():
        for name in ("llama-server", "llama-server.exe"):
            if (path := Path(folder) / "lib" / name).is_file():
                return path
    raise RuntimeError("there is no llama-server in this environment; build it, with llama-cpp-python: gemma-mtp build")


def free_port(host: str, port: int) -> int:
    """The port to listen at: the one wanted, or one that is free for 0.

    Raises:
        RuntimeError: somebody else listens there, or the address is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            if os.name == "posix":  # elsewhere it would share a port that is taken
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            return int(trial.getsockname()[1])
    except OSError as problem:
        raise RuntimeError(
            f"cannot listen at {host}:{port} ({problem.strerror}); pass another --port or --host."
        ) from None


class Server:
    """A running llama-server. Within a `with` block it is there, afterwards it is gone.

    Args:
        command: program and arguments.
        shown: called with every line of its log, from another thread, as it comes.
        environment: its variables; those of this process unless given.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        shown: Callable[[Line], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._shown, self._loaded = shown, False
        self._lines: deque[Line] = deque(maxlen=KEPT)
        self._states: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # Ctrl-C in a terminal goes to its process group: a server in another one is told by this process alone.
        alone: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {"creationflags": 0x200}
        self._process = subprocess.Popen(
            [*command, *LOGGING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**(os.environ if environment is None else environment), **SUPERVISED}, encoding="utf-8",
            errors="replace", **alone,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def errors(self) -> list[Line]:
        """What its log told of errors lately."""
        return [line for line in [*self._lines] if line.level == "E" and line.wrong]

    def _read(self) -> None:
        """Take the output apart into states and the log, to its end."""
        assert self._process.stdout is not None
        for written in self._process.stdout:
            written = written.rstrip()
            if written.startswith(STATE):
                with suppress(ValueError):
                    self._states.put(json.loads(written.removeprefix(STATE)))
            elif written:  # an empty line goes before each state
                line = read_line(written)
                self._lines.append(line)
                with suppress(OSError, ValueError):  # a terminal that is gone, a file system that is full
                    self._shown(line)
                if ENDING in written:
                    self._hang_up()  # or it would wait for its parent

    def wait(
        self, step: Callable[[str, float], None] = lambda part, share: None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Wait until it is ready.

        Args:
            step: called with what is being loaded, and how much of that is.
            seconds: to wait at most.

        Returns:
            What it says of its model: "id", and under "meta" the context of a slot ("n_ctx") and sizes.

        Raises:
            RuntimeError: it ended, or the time is over.
        """
        last = None if seconds is None else time.monotonic() + seconds
        while last is None or time.monotonic() < last:
            try:
                state = self._states.get(timeout=LOOK)
            except queue.Empty:
                if self._process.poll() is not None:
                    raise self.died() from None
                continue
            said = state.get("payload") or {}
            if state.get("state") == "loading":
                step(str(said.get("current")), float(said.get("value") or 0))
            elif state.get("state") == "ready":
                self._loaded = True
                return dict(said)
        raise RuntimeError(f"llama-server was not ready after {seconds:g} seconds.")

    def join(self) -> None:
        """Stay until it ends.

        Raises:
            RuntimeError: it has ended, which nobody told it to through this object.
        """
        self._process.wait()
        raise self.died()

    def died(self) -> RuntimeError:
        """The error that says how it ended, and why if its log tells."""
        self._reader.join(LOOK)
        lines = [*self._lines]
        other = [line for line in lines if not line.level and re.search(r"error|ASSERT|what\(\)|abort", line.text)]
        told = [*self.errors(), *other] or lines[-1:]
        # What fails while it loads fails again in those who called; what ends it later is the last that it tells.
        said = told[-1 if self._loaded else 0].text.removeprefix("error: ") if told else "it said nothing"
        if any(ENDING in line.text for line in lines) and not self.errors():
            said = "somebody else told it to"
        status = self._process.returncode
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        return RuntimeError(f"llama-server ended {'' if self._loaded else 'while it loaded, '}{how}: {said}")

    def _hang_up(self) -> None:
        with suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def stop(self) -> None:
        """End it: asked first, killed after some seconds, or at once if another exception comes meanwhile."""
        try:
            if self._process.poll() is None:
                if self._loaded:
                    with suppress(OSError, ValueError):
                        assert self._process.stdin is not None
                        self._process.stdin.write(EXIT)
                        self._process.stdin.flush()
                else:
                    self._process.terminate()  # while it loads it reads nothing
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE)
        finally:
            self._process.kill()
            self._process.wait()
            self._hang_up()
            self._reader.join(GRACE)  # what it has started itself may hold its output open
