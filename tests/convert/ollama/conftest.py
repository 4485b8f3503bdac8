"""Ollama as the tests have it: one that stands in, and a real one where there is one."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from children import started, until
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.ollama import trial
from gemma_mtp.convert.ollama.api import Client
from ollama_standin import PROGRAM, Standin, standing_in
from ollamas import Ollama

REAL = os.environ.get("OLLAMA", "")


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """What stands in, its program on the PATH."""
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    with standing_in(tmp_path / "store") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.host)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        monkeypatch.setattr(trial, "_command_lines", server.command_lines)
        yield server


@pytest.fixture
def program() -> Path:
    """The program of a real one."""
    if not REAL:
        pytest.skip("no Ollama here; make check-ollama OLLAMA=/path/to/ollama runs this with one")
    return Path(REAL)


@pytest.fixture
def around(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a real one shall listen, with a store of its own; it is the one that commands find."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("OLLAMA_HOST", host)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("OLLAMA_NO_CLOUD", "1")
    return host


@pytest.fixture
def real(
    program: Path, around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Mapping[str, str]]:
    """A real one that runs; with settings of its own in its environment where a test asks for some."""
    settings: Mapping[str, str] = getattr(request, "param", {})
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "log").open("w") as log, started([program, "serve"], stdout=log, stderr=log) as process:

        def answers() -> bool:
            try:
                return bool(Client(around).version())
            except MtpError:
                return False

        until(answers, process)
        yield settings


@pytest.fixture
def ours(program: Path) -> bool:
    """Whether the engine that lies beside a real one is our llama-server."""
    folder = program.resolve().parent
    places = [near / "libllama.so" for near in (folder.parent / "lib" / "ollama", folder / "lib" / "ollama", folder)]
    return any(b"llama_mtp_draft" in path.read_bytes() for path in places if path.exists())


@pytest.fixture(params=["standin", pytest.param("real", marks=pytest.mark.ollama)])
def ollama(request: pytest.FixtureRequest, tmp_path: Path) -> Ollama:
    request.getfixturevalue(request.param)
    return Ollama(Client(), tmp_path)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Takes programs off the PATH, or what listens where Ollama ought to."""

    def without(what: str) -> None:
        if what == "program":
            monkeypatch.setenv("PATH", str(tmp_path))
        else:
            monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")

    return without
