"""llama-server ends when it is told to, whatever it does meanwhile, and nobody waits for what does not come."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import llama_cpp
import pytest
from children import GUARD, ended, post, server, until
from gemma_mtp.convert import Pair
from prompts import PROMPT

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
CONTEXT = 200_000  # an answer of minutes, of a model that would be held to the 2048 tokens that it was trained for
LONG = "-c", CONTEXT, "--override-kv", f"gemma4.context_length=int:{CONTEXT}"
ENDLESS = {"prompt": PROMPT, "n_predict": CONTEXT, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def status(answer: Future[Any]) -> tuple[int, str]:
    """Status and message of an error that a request came to."""
    with pytest.raises(urllib.error.HTTPError) as told:
        answer.result(GUARD)
    return told.value.code, json.load(told.value)["error"]["message"]


def slots(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/slots", timeout=GUARD) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [ENDLESS, {**ENDLESS, "prompt": [5] * (CONTEXT - 9)}], ids=["answer", "prompt"])
def test_a_whole_answer_is_given_up(
    body: dict[str, Any], number: signal.Signals, demo: Pair, elsewhere: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Also while its prompt is read, in passes of two thousand tokens."""
    with server(SERVER, tmp_path / "log", "-m", demo.target, *LONG) as (process, url):
        answer = elsewhere.submit(post, f"{url}/completion", body)
        until(lambda: slots(url)[0]["is_processing"], process)
        assert ended(process, number)[0] == 0
        assert status(answer) == (503, "The server is shutting down")
        assert "cleaning up" in (tmp_path / "log").read_text()


def test_those_that_wait_for_a_slot_are_told(demo: Pair, elsewhere: ThreadPoolExecutor, tmp_path: Path) -> None:
    with server(SERVER, tmp_path / "log", "-m", demo.target, *LONG) as (process, url):
        answers = [elsewhere.submit(post, f"{url}/completion", ENDLESS) for _ in range(3)]
        until(lambda: slots(url)[0]["is_processing"], process)
        assert ended(process, signal.SIGTERM)[0] == 0
        assert {status(answer)[0] for answer in answers} <= {503}


@pytest.mark.parametrize("headers", [{}, {"X-Conversation-Id": "7"}], ids=["plain", "kept for its client"])
def test_a_stream_ends(headers: dict[str, str], demo: Pair, tmp_path: Path) -> None:
    with server(SERVER, tmp_path / "log", "-m", demo.target, *LONG) as (process, url):
        body = json.dumps({**ENDLESS, "stream": True}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/completion", body, headers), timeout=GUARD
        ) as stream:
            assert stream.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            try:
                rest = stream.read()
            except IncompleteRead as cut:  # httplib ends without the last chunk if it is told to between two
                rest = cut.partial
        assert ended(process)[0] == 0
    assert b'"stop":true' not in rest
    assert b"[DONE]" not in rest


def unread(url: str) -> socket.socket:
    """A client that asks for a stream and does not read it."""
    place = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((place.hostname, place.port))
    body = json.dumps({**ENDLESS, "stream": True, "n_probs": 100})
    client.sendall(f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def test_a_client_that_does_not_read_holds_nothing_up(demo: Pair, tmp_path: Path) -> None:
    with server(SERVER, tmp_path / "log", "-m", demo.target, *LONG) as (process, url), unread(url):
        until(lambda: slots(url)[0]["is_processing"], process)
        made = [-1]
        while made[-1] != made[0] or not made[0]:  # until what it makes is not taken any more
            made = [slots(url)[0]["next_token"][0]["n_decoded"] for _ in range(200)]
        assert ended(process, signal.SIGTERM)[0] in (0, 1)


def test_a_second_signal_ends_it_at_once(demo: Pair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(SERVER, log, "-m", demo.target, *LONG) as (process, _):
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            os.kill(process.pid, number)
        assert ended(process)[0] == 1
    assert "Received second interrupt" in log.read_text()
