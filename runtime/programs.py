"""Programs of the installed llama-cpp-python as processes: started, listened to, ended.

llama.cpp's router runs llama-servers itself, and tells them so by a variable of the environment (`server_child` in its
tools/server/server-models.cpp). What it tells so ends at once when stdin is closed, so also when its parent is killed.
The same is done here, for ggml-rpc-server too, which a patch of ours taught it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# What says that there is somebody who watches.
SUPERVISED = {"LLAMA_SERVER_ROUTER_PORT": "0"}
# How llama.cpp's log is written where it is told to write time and level before each message.
LOGGED = re.compile(r"\d+(?:\.\d+){3} ([A-Z]) (?:(?:srv|cmn|slot) +\S+: )?(.*)")
# Errors of loading that are none: the drafter's memory cannot be measured without its target.
NO_ERROR = "normal during memory fitting"
# Of what is no message of the log: what tells why it ended.
FATAL = re.compile(r"error|ASSERT|what\(\)|abort|Remote RPC server|[Ff]ailed to")
# Seconds that a program has to end by itself, and after which it is told again; those between two looks at it.
GRACE, AGAIN, LOOK = 5.0, 1.0, 0.5
# Lines kept of its output.
KEPT = 200


@dataclass(frozen=True)
class Line:
    """A line of a program's log: as it was written, its level ("" for what is no message), and the message."""

    whole: str
    level: str
    text: str

    @property
    def wrong(self) -> bool:
        """Whether it tells of an error, or is no message of the log, such as a failed assertion."""
        return self.level in ("E", "") and NO_ERROR not in self.whole


def read_line(written: str) -> Line:
    """A line of a program's output, its level read."""
    found = LOGGED.fullmatch(written)
    return Line(written, found[1], found[2]) if found else Line(written, "", written)


def program(name: str) -> Path:
    """A program of the installed llama-cpp-python.

    Raises:
        RuntimeError: there is none of that name.
    """
    package = find_spec("llama_cpp")
    for folder in package.submodule_search_locations or () if package else ():
        for file in (name, f"{name}.exe"):
            if (path := Path(folder) / "lib" / file).is_file():
                return path
    raise RuntimeError(f"there is no {name} in this environment; build it, with llama-cpp-python: gemma-mtp build")


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


class Program:
    """A running program. Within a `with` block it is there, afterwards it is gone.

    Args:
        command: program and arguments.
        shown: called with every line of its output, from another thread, as it comes.
        environment: its variables; those of this process unless given.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        shown: Callable[[Line], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = Path(command[0]).name.removesuffix(".exe")
        self.ready = False
        self._shown, self._lines = shown, deque[Line](maxlen=KEPT)
        # Ctrl-C in a terminal goes to its process group: a program in another one is told by this process alone.
        alone: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {"creationflags": 0x200}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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
        assert self._process.stdout is not None
        for written in self._process.stdout:
            self._take(written.rstrip())

    def _take(self, written: str) -> None:
        """A line of its output."""
        if written:
            line = read_line(written)
            self._lines.append(line)
            with suppress(OSError, ValueError):  # a terminal that is gone, a file system that is full
                self._shown(line)

    def check(self) -> None:
        """Raises RuntimeError: it has ended."""
        if self._process.poll() is not None:
            raise self.died()

    def join(self) -> None:
        """Stay until it ends.

        Raises:
            RuntimeError: it has ended, which nobody told it to through this object.
        """
        self._process.wait()
        raise self.died()

    def died(self) -> RuntimeError:
        """The error that says how it ended, and why if its output tells."""
        self._reader.join(LOOK)
        status = self._process.returncode
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        return RuntimeError(f"{self.name} ended {'' if self.ready else 'while it loaded, '}{how}: {self._why()}")

    def _why(self) -> str:
        lines = [*self._lines]
        told = [*self.errors(), *(line for line in lines if not line.level and FATAL.search(line.text))]
        if not told and not self.ready:
            told = lines[-1:]
        # What fails while it loads fails again in those who called; what ends it later is the last that it tells.
        return told[-1 if self.ready else 0].text.removeprefix("error: ") if told else "it said nothing"

    def _hang_up(self) -> None:
        with suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ask(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def stop(self) -> None:
        """End it: asked first, killed after some seconds, or at once if another exception comes meanwhile."""
        try:
            if self._process.poll() is None:
                self._ask()
                # One that has just begun to serve forgets what it was told before, so it is told again.
                if not self._ends_within(AGAIN) and os.name == "posix":
                    self._process.terminate()
                self._ends_within(GRACE - AGAIN)
        finally:
            self._process.kill()
            self._process.wait()
            self._hang_up()
            self._reader.join(GRACE)  # what it has started itself may hold its output open
