"""llama-server as a process: waited for while it loads, told to end.

As llama.cpp's router does it: a server that knows of one reports on stdout how far it has loaded and when it is ready,
and ends on a line on stdin.
"""

from __future__ import annotations

import json
import queue
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gemma_mtp.runtime.programs import LOOK, Line, Program, read_line

# What router and server say to each other.
STATE, EXIT = "cmd_child_to_router:state:", "cmd_router_to_child:exit\n"
# How its log is written, so that its errors can be told: with time and level before each message.
LOGGING = ("--log-prefix", "--log-timestamps", "--no-log-jsonl", "--log-colors", "off")
# Logged when a server that was told to end by somebody else begins to.
ENDING = "cleaning up before exit"
# Logged where a model has layers on other devices than the CPU.
PLACED = re.compile(r"(target|drafter): (layers .+ on .+)")


class Server(Program):
    """A running llama-server.

    Args:
        command: program and arguments.
        shown: called with every line of its log, from another thread, as it comes.
        environment: its variables; those of this process unless given.
        logging: arguments that say how its log is written.

    Attributes:
        placed: which layers of "target" and "drafter" lie on which device; empty if all are the CPU's.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        shown: Callable[[Line], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
        logging: Sequence[str] = LOGGING,
    ) -> None:
        self.placed: dict[str, str] = {}
        self._states: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        super().__init__([*command, *logging], shown, environment)

    def _take(self, written: str) -> None:
        """A line of its output: a state, or of its log."""
        if written.startswith(STATE):
            with suppress(ValueError):
                self._states.put(json.loads(written.removeprefix(STATE)))
        else:
            super()._take(written)
            if found := PLACED.fullmatch(read_line(written).text):
                self.placed[found[1]] = found[2]
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
                self.check()
                continue
            said = state.get("payload") or {}
            if state.get("state") == "loading":
                step(str(said.get("current")), float(said.get("value") or 0))
            elif state.get("state") == "ready":
                self.ready = True
                return dict(said)
        raise RuntimeError(f"llama-server was not ready after {seconds:g} seconds.")

    def _why(self) -> str:
        if any(ENDING in line.text for line in [*self._lines]) and not self.errors():
            return "somebody else told it to"
        return super()._why()

    def _ask(self) -> None:
        if not self.ready:
            super()._ask()  # while it loads it reads nothing
            return
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(EXIT)
            self._process.stdin.flush()
