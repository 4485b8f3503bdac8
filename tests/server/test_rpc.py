"""Machines that lend their memory: gemma-mtp rpc-server, and what serve, run and `Llama` do with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from children import GUARD, MAIN, environment, gone, said, started, until
from click.testing import CliRunner
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.runtime import Llama, programs, rpc
from gemma_mtp.runtime.cli import serve
from gemma_mtp.runtime.cli.main import main
from serves import Served, served
from tiny import PAIR

PROMPTS = ("import os", "def fib(n):", "class Node:\n    def", "for i in range(10):\n")


@contextmanager
def lent(folder: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A machine that lends its memory, ready, at a free port: the process of the command, and what it said."""
    words = [sys.executable, "-c", MAIN, "rpc-server", "--port", "0", "-t", "1", "--json", *map(str, arguments)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with started(words, env=environment(folder), **options) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(lent(tmp_path))[1] for _ in range(2)]


def names(machines: list[dict[str, Any]]) -> str:
    return ",".join(each["rpc"] for each in machines)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The bundled pair in blocks that a CPU multiplies in another layout than the file's."""
    folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
    return convert_pair(*folders, tmp_path_factory.mktemp("quantized"), "Q4_0")


def generated(server: Served) -> list[tuple[list[int], int]]:
    """Tokens of some prompts, greedy and sampled, and how many of them were drafted."""
    found = []
    for prompt, temperature in [(prompt, temperature) for prompt in PROMPTS for temperature in (0, 1)]:
        body = {"prompt": prompt, "n_predict": 48, "temperature": temperature, "seed": 7, "return_tokens": True}
        answer = server.ask("/completion", body).json
        found.append((answer["tokens"], answer["timings"].get("draft_n_accepted", 0)))
    return found


def test_a_pair_on_two_machines_says_what_it_says_on_one(
    quantized: Pair, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    with served(quantized.target, tmp_path, "--draft", 3) as found:
        assert found.facts["placed"] == {}
        alone = generated(found)
    with served(quantized.target, tmp_path, "--draft", 3, "--rpc", names(two)) as found:
        placed = found.facts["placed"]
        together = generated(found)
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    assert sum(accepted for _, accepted in together) > 0
    # Layers from the first on whose KV cache the drafter reads lie on one machine, the drafter beside them.
    for machine, name in zip(two, ("RPC0", "RPC1"), strict=True):
        assert f"{name} ({machine['rpc']})" in placed["target"]
    assert placed["target"].startswith("layers 0 on RPC0 (") and ", 1-5 and output on RPC1 (" in placed["target"]
    assert placed["drafter"] == f"layers 0-3 and output on RPC1 ({two[1]['rpc']})"
    for machine in two:
        assert rpc.devices(machine["rpc"])  # free for the next one


def test_layers_that_stay_here(demo: Pair, two: list[dict[str, Any]], tmp_path: Path) -> None:
    """The first ones do; a drafter whose KV cache is here is here too."""
    with served(demo.target, tmp_path, "--draft", 3, "--rpc", two[0]["rpc"], "-ngl", "3") as found:
        assert found.chat(max_tokens=16).json["timings"]["draft_n_accepted"] > 0
        assert found.facts["placed"]["target"] == f"layers 0-3 on CPU, 4-5 and output on RPC0 ({two[0]['rpc']})"
        assert "drafter" not in found.facts["placed"]


def test_llama_on_two_machines(quantized: Pair, two: list[dict[str, Any]], tmp_path: Path) -> None:
    """In a process of its own: ggml keeps the connections."""
    words = ["run", quantized.target, "-p", PROMPTS[1], "-n", "48", "--temp", "0", "--draft", "3", "--json"]
    texts = []
    for more in ([], ["--rpc", names(two)], ["--rpc", names(two), "--no-mtp"]):
        command = [sys.executable, "-c", MAIN, *map(str, words), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), check=True)
        found = json.loads(done.stdout)
        texts.append(found["text"])
        if "--no-mtp" not in more:
            assert found["stats"]["accepted"] > 0
        if more:
            assert f"RPC1 ({two[1]['rpc']})" in done.stderr.splitlines()[-2]
    assert len(set(texts)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(number: signal.Signals, tmp_path: Path) -> None:
    """Also where the command itself is killed: the server's stdin is closed then."""
    with lent(tmp_path) as (process, facts):
        process.send_signal(number)
        status = process.wait(GUARD)
        until(lambda: gone(facts["pid"]))
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -signal.SIGKILL)


def test_the_line_on_a_lost_machine_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the loss was noticed in sending or in receiving; what else goes wrong is shown."""
    ready = threading.Event()
    ready.set()
    show = serve._shown(ready, verbose=False, log=None)
    for text in (
        "0.00.252.227 E send failed (bytes_sent=0, size_to_send=8)",
        "0.00.252.227 E recv failed (bytes_recv=0, size_to_recv=8)",
        "ggml-rpc.cpp:300: Remote RPC server crashed or returned malformed response",
        "0.00.252.227 E srv load_model: failed to load",
    ):
        show(programs.read_line(text))
    assert capsys.readouterr().err == "0.00.252.227 E srv load_model: failed to load\n"


def test_a_machine_that_is_lost_is_told_of(demo: Pair, two: list[dict[str, Any]], tmp_path: Path) -> None:
    """In the middle of an answer, with one line."""
    body = {"prompt": "import os\n", "n_predict": 1900, "ignore_eos": True, "stream": True}
    with served(demo.target, tmp_path, "--rpc", names(two)) as found:
        host, _, port = found.root.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), GUARD) as asking:
            text = json.dumps(body)
            asking.sendall(f"POST /completion HTTP/1.0\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
            assert asking.recv(1)
            os.kill(two[1]["pid"], signal.SIGKILL)
            assert found.process.wait(GUARD) == 1
    told = found.errors.read_text().splitlines()
    assert told[1:] == [
        f"error: the model's layers at {two[1]['rpc']} are gone: nobody listens at {two[1]['rpc']}; start one there "
        "with: gemma-mtp rpc-server. Then start this again."
    ]


def test_a_process_that_loses_a_machine_says_so(demo: Pair, two: list[dict[str, Any]], tmp_path: Path) -> None:
    words = ["run", demo.target, "-p", "import os\n", "-n", "1900", "--rpc", names(two), "-c", "2048"]
    command = [sys.executable, "-c", MAIN, *map(str, words)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(tmp_path)}
    with started(command, **options) as process:
        said(process.stderr, "RPC1")
        os.kill(two[1]["pid"], signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGABRT
    assert [line for line in err.splitlines() if line] == [
        f"error: the model's layers at {two[1]['rpc']} are gone: nobody listens at {two[1]['rpc']}; start one there "
        "with: gemma-mtp rpc-server. Then start this again."
    ]


def test_what_is_lent(tmp_path: Path) -> None:
    with lent(tmp_path, "--memory", 100, "--cache") as (_, facts):
        assert facts["cache"] == str(tmp_path / "rpc")
        assert not facts["open"]
        assert [each["free"] for each in facts["devices"]] == [100 << 20]
        assert facts["devices"][0]["total"] > 100 << 20


def refused(*arguments: object) -> str:
    """The line that a command ends with."""
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code in (1, 2), done.output
    return done.output.splitlines()[-1]


def test_what_rpc_server_refuses(tmp_path: Path) -> None:
    assert "RPC asks nobody for a key; pass --let-anyone-in" in refused("rpc-server", "--host", "0.0.0.0")
    assert "cannot listen at 192.0.2.1" in refused("rpc-server", "--host", "192.0.2.1", "--let-anyone-in")
    assert "is no IPv4 address" in refused("rpc-server", "--host", "::1")
    assert refused("rpc-server", "--port", "0", "-d", "nosuch").endswith("unknown device: nosuch (there are: CPU).")


@contextmanager
def standin(answer: bytes) -> Iterator[str]:
    """A server that takes one connection after the other, and answers all of them the same."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection = listening.accept()[0]
                except OSError:
                    return
                with connection, suppress(OSError):  # who asks may be gone before
                    connection.recv(64)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(64)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


HELLO = struct.pack("<Q4B24x", 28, 6, 1, 0, 0)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (HELLO, "speaks version 6.1 of the protocol, not 7.0; run the same gemma-mtp"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no RPC server of this llama.cpp"),
        (b"", "is no RPC server of this llama.cpp"),
    ],
)
def test_servers_that_serve_refuses(answer: bytes, why: str, demo: Pair) -> None:
    """Before the model is loaded; ggml's own client would end in an assertion."""
    with standin(answer) as address:
        assert why in refused("serve", demo.target, "--rpc", address)
        with pytest.raises(RuntimeError, match=why):
            Llama(demo.target, rpc_servers=address)


def test_what_serve_refuses(demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    assert f"nobody listens at 127.0.0.1:{free}; start one there" in refused(
        "serve", demo.target, "--rpc", f"127.0.0.1:{free}"
    )
    for wrong in ("here", "here:", "here:0", "here:70000", "a:1,,b:2", "::1:1"):
        assert "is no HOST:PORT" in refused("serve", demo.target, "--rpc", wrong)
    assert "is named twice" in refused("serve", demo.target, "--rpc", "a:1,a:1")
    assert "--rpc is not passed on" in refused("serve", demo.target, "--", "--rpc", "a:1")
    monkeypatch.setattr(rpc, "PATIENCE", 0.2)
    with lent(tmp_path) as (_, facts), rpc.connected(facts["rpc"]) as other:
        rpc.hello(other, facts["rpc"])
        assert "serves one program at a time" in refused("serve", demo.target, "--rpc", facts["rpc"])


def test_the_protocol_is_the_build_s(two: list[dict[str, Any]]) -> None:
    for machine in two:
        with rpc.connected(machine["rpc"]) as connection:
            assert rpc.hello(connection, machine["rpc"]) == rpc.VERSION
