"""The user's own Ollama on our engine, from a folder in the cache: on a program that stands in, and on a real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from children import MAIN, alone, ended, environment, said, started, until
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io import blobs
from gemma_mtp.convert.ollama import api, shadow
from gemma_mtp.convert.ollama.installation import Engine, Installation, installation
from ollama_standin import ANSWERS
from ollamas import run

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="links and locks of POSIX")

# Answers as a real Ollama does when asked for its version, and says what it found around it.
PROGRAM = """#!{python}
import http.server, json, os, pathlib, sys
home = pathlib.Path(sys.argv[0]).resolve().parents[1]
around = {{key: value for key, value in os.environ.items() if key.startswith("OLLAMA_")}}
print(json.dumps({{"engine": str(home / "lib/ollama/llama-server"), "arguments": sys.argv[1:], **around}}), flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {version!r}.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
host, _, port = os.environ["OLLAMA_HOST"].rpartition(":")
http.server.HTTPServer((host, int(port)), Answer).serve_forever()
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Home:
    """An installed Ollama, an engine of ours, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.program = folder / "prefix" / "bin" / "ollama"
        self.install()
        program(folder / "prefix" / "lib" / "ollama" / "llama-server", "#!/bin/sh\n")
        for name in ("llama-server", "llama-quantize"):
            program(folder / "ours" / name, "#!/bin/sh\necho version: of ours\n")
        (folder / "ours" / "libllama.so").write_bytes(b"llama_mtp_draft")
        self.host = f"127.0.0.1:{free_port()}"
        self.around = environment(
            self.cache, OLLAMA_HOST=self.host, LLAMA_CPP_LIB_PATH=str(folder / "ours"), HOME=str(folder)
        )
        self.around.pop("OLLAMA_MODELS", None)

    def install(self, more: str = "") -> None:
        """Ollama, or an update of it."""
        self.program.unlink(missing_ok=True)
        version = json.dumps(json.loads(ANSWERS.read_text())["version"])
        program(self.program, PROGRAM.format(python=sys.executable, version=version) + more)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-c", MAIN, "ollama", "serve", "--ollama", str(self.folder / "prefix"), *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), env=self.around, capture_output=True, text=True, check=False)

    @property
    def shadows(self) -> list[Path]:
        return [path for path in (self.cache / "ollama").iterdir() if path.is_dir()]

    @property
    def seen(self) -> dict[str, Any]:
        """What Ollama found around it."""
        found: dict[str, Any] = json.loads((self.cache / "ollama" / "serve.log").read_text().splitlines()[0])
        return found

    @contextmanager
    def detached(self) -> Iterator[int]:
        """The process number of one in the background; afterwards it is gone."""
        done = self.run("-d")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Ollama 0.33.0 (")
        pid = int(json.loads((self.cache / "ollama" / "serve.json").read_text())["pid"])
        try:
            yield pid
        finally:
            self.run("--stop")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"  # nobody waits for it in a container


def test_in_the_background(home: Home) -> None:
    before = home.program.stat()
    assert "none runs" in home.run("--status").stdout
    with home.detached() as pid:
        assert not gone(pid)
        (prefix,) = home.shadows
        assert home.seen["engine"] == str(prefix / "lib" / "ollama" / "llama-server")
        assert home.seen["arguments"] == ["serve"]
        assert home.seen["OLLAMA_HOST"] == home.host
        assert home.seen["OLLAMA_MODELS"] == str(home.folder / ".ollama" / "models")
        assert "OLLAMA_NOPRUNE" not in home.seen
        names = sorted(path.name for path in (prefix / "lib" / "ollama").iterdir())
        assert names == ["libllama.so", "llama-quantize", "llama-server"]
        for name in names:
            assert (prefix / "lib" / "ollama" / name).read_bytes() == (home.folder / "ours" / name).read_bytes()
        told = home.run("--status").stdout
        for part in ("Ollama 0.33.0", str(home.program), "version", f"http://{home.host}", f"process {pid}"):
            assert part in told.replace("of ours", "version"), part
        second = home.run("-d")
        assert second.returncode == 1
        assert f"one runs already at http://{home.host}; end it with gemma-mtp ollama serve --stop" in second.stderr
        assert home.run("--stop").stdout == f"ended the one at http://{home.host}\n"
        until(lambda: gone(pid))
    assert "none runs" in home.run("--status").stdout
    assert "none runs" in home.run("--stop").stdout
    after = home.program.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_size) == (before.st_mtime_ns, before.st_mode, before.st_size)


def test_one_that_was_killed_does_not_run(home: Home) -> None:
    with home.detached() as pid:
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid))
        until(lambda: "none runs" in home.run("--status").stdout)
        with home.detached() as other:
            assert other != pid


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_in_the_foreground_it_ends_with_the_command(home: Home, number: signal.Signals, status: int) -> None:
    with started(home.command(), env=home.around, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said(process.stdout, "Ollama 0.33.0")
        pid = int(json.loads((home.cache / "ollama" / "serve.json").read_text())["pid"])
        assert f"process {pid}" in home.run("--status").stdout
        code, _, _ = ended(process, number)
        assert code == status
        assert alone(process)
    until(lambda: gone(pid))
    assert not (home.cache / "ollama" / "serve.json").exists()


def test_its_end_is_the_commands_end(home: Home) -> None:
    with started(home.command(), env=home.around, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        said(process.stdout, "Ollama 0.33.0")
        assert "ended the one" in home.run("--stop").stdout
        process.communicate()
        assert process.returncode == 128 + signal.SIGTERM


def test_an_update_gets_a_new_shadow(home: Home) -> None:
    with home.detached():
        (first,) = home.shadows
    with home.detached():
        assert home.shadows == [first]
    home.install("# newer\n")
    with home.detached():
        (second,) = home.shadows
        assert second != first
        assert (second / "bin" / "ollama").read_text().endswith("# newer\n")
    with (home.folder / "ours" / "libllama.so").open("ab") as file:
        file.write(b"newer")
    with home.detached():
        (third,) = home.shadows
        assert third not in (first, second)
        assert (third / "lib" / "ollama" / "libllama.so").read_bytes().endswith(b"newer")


def test_a_shadow_in_use_stays(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with home.detached() as pid:
        (first,) = home.shadows
        home.install("# newer\n")
        monkeypatch.setenv("GEMMA_MTP_CACHE", str(home.cache))
        second = shadow.shadow(installation(home.folder / "prefix"), Engine(home.folder / "ours"))
        assert {*home.shadows} == {first, second}
        assert not gone(pid)
    third = shadow.shadow(installation(home.folder / "prefix"), Engine(home.folder / "ours"))
    assert home.shadows == [second] == [third]


def test_without_hard_links_it_is_copied(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv("GEMMA_MTP_CACHE", str(home.cache))
    monkeypatch.setattr(os, "link", refused)
    prefix = shadow.shadow(installation(home.folder / "prefix"), Engine(home.folder / "ours"))
    assert (prefix / "bin" / "ollama").read_bytes() == home.program.read_bytes()
    assert os.access(prefix / "bin" / "ollama", os.X_OK)


def test_what_fails_leaves_no_shadow(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("GEMMA_MTP_CACHE", str(home.cache))
    found, ours = Installation(home.program, Engine(home.folder)), Engine(home.folder / "ours")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        patch.setattr(shutil, "copy2", fail)
        with pytest.raises(MtpError, match=r"cannot be written \(No space left on device\); set GEMMA_MTP_CACHE"):
            shadow.shadow(found, ours)
    assert home.shadows == []
    assert shadow.shadow(found, ours) == home.shadows[0]


@pytest.mark.parametrize("words", [("-d",), ()])
def test_one_that_ends_at_once_says_why(home: Home, words: tuple[str, ...]) -> None:
    program(home.program, "#!/bin/sh\necho Error: the store is damaged >&2\nexit 3\n")
    done = home.run(*words)
    assert done.returncode == 1
    assert "Error: the store is damaged" in done.stderr
    assert "Ollama ended with status 3" in done.stderr
    assert not (home.cache / "ollama" / "serve.json").exists()


def test_one_that_is_too_old_is_ended(home: Home) -> None:
    text = home.program.read_text().replace("0.33.0", "0.29.0")
    home.program.unlink()
    program(home.program, text)
    done = home.run("-d")
    assert done.returncode == 1
    assert "is Ollama 0.29.0, and drafters of Gemma 4 need" in done.stderr
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(("127.0.0.1", int(home.host.rpartition(":")[2])))


def test_where_ollama_host_is_taken_nothing_starts(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(home.host.rpartition(":")[2])))
        taken.listen()
        done = home.run("-d")
    assert done.returncode == 1
    assert f"OLLAMA_HOST is {home.host}, where this cannot listen" in done.stderr


def test_the_usual_port_or_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    for name in ("OLLAMA_HOST", "OLLAMA_NOPRUNE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for module in (shadow, api):
            monkeypatch.setattr(module, "PORT", port)
        monkeypatch.setattr(shadow, "PORTS", 65536 - port)
        taken.listen()
        found = shadow.plan()
        assert found.host != f"127.0.0.1:{port}"
        assert f"port {port} is taken" in found.notes[0]
        assert f"export OLLAMA_HOST={found.host}" in found.notes[0]
        assert found.env["OLLAMA_NOPRUNE"] == "1"
        monkeypatch.setattr(shadow, "PORTS", 1)
        with pytest.raises(MtpError, match="no port is free"):
            shadow.plan()
    found = shadow.plan()
    assert (found.host, found.notes) == (f"127.0.0.1:{port}", ())
    assert found.env["OLLAMA_MODELS"] == str(tmp_path)
    assert "OLLAMA_NOPRUNE" not in found.env


def test_the_store_is_the_one_with_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, service = tmp_path / "mine", tmp_path / "service"
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free_port()}")
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(blobs, "FOLDERS", (str(mine), str(service)))
    assert shadow.plan().store == mine
    (service / "manifests").mkdir(parents=True)
    assert shadow.plan().store == service
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).exists() and mode != os.W_OK)
    found = shadow.plan()
    assert f"{service} is not this user's to change" in found.notes[0]
    assert found.env["OLLAMA_NOPRUNE"] == "1"  # Ollama would clear away what it does not know, and end


@pytest.mark.parametrize("words", [("serve",), ("engine", "install"), ("engine", "remove"), ("engine", "status")])
def test_other_systems(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    done = run("ollama", *words)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: gemma-mtp ollama {words[0]} works on Linux")
