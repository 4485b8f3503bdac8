"""`gemma-mtp serve` as a process, for tests: started, ready, asked, ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import GUARD, MAIN, environment, started


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of an answer, whatever the status."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the last, which says that it is done."""
        *events, last = [line.removeprefix("data: ") for line in self.text.split("\n") if line.startswith("data: ")]
        assert last == "[DONE]"
        return [json.loads(event) for event in events]


@dataclass(frozen=True)
class Served:
    """A running server: the process of the command, and what it said when it was ready."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    errors: Path

    @property
    def root(self) -> str:
        return str(self.facts["base_url"]).removesuffix("/v1")

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """What it answers at a path; a body is sent as JSON, bytes as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        request = urllib.request.Request(self.root + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=GUARD) as said:
                return Answer(said.status, dict(said.headers), said.read().decode())
        except urllib.error.HTTPError as refused:
            return Answer(refused.code, dict(refused.headers), refused.read().decode())

    def chat(self, text: str = "import os", **body: Any) -> Answer:
        given = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0} | body
        return self.ask("/v1/chat/completions", given)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", MAIN, "serve", *map(str, arguments)]


@contextmanager
def served(target: Path, folder: Path, *arguments: object, **variables: str) -> Iterator[Served]:
    """A server of a target, ready, at a free port.

    Args:
        target: what is served.
        folder: for the cache, and for what the command says on stderr.
        arguments: of the command.
        variables: of its environment.
    """
    words = command(target, "--port", 0, "-t", 1, "--json", *arguments)
    errors = folder / "stderr"
    with errors.open("w") as err:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": err, "stdin": subprocess.DEVNULL}
        with started(words, env=environment(folder, **variables), **options) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, errors.read_text()
            try:
                yield Served(process, json.loads(line), errors)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(GUARD)
