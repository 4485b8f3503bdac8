"""Which web pages may ask `gemma-mtp serve`, and by which names: a browser runs pages of others on this machine."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from children import GUARD
from gemma_mtp.convert import Pair
from serves import Answer, Served, served

BODY = json.dumps({"messages": [{"role": "user", "content": "import os"}], "max_tokens": 2}).encode()
CHAT, OTHER = "https://chat.example.org", "https://other.example.org"


@pytest.fixture(scope="module")
def running(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(demo.target, tmp_path_factory.mktemp("running")) as found:
        yield found


@pytest.fixture(scope="module")
def allowing(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that two pages of others may use."""
    with served(demo.target, tmp_path_factory.mktemp("allowing"), "--cors", f"localhost, {CHAT}/,{OTHER}") as found:
        yield found


def asked(found: Served, method: str = "POST", path: str = "/v1/chat/completions", **headers: str) -> Answer:
    """What a browser is answered; Host is 127.0.0.1 with the port unless it is given."""
    place = urlsplit(found.root)
    assert place.hostname and place.port
    given = {"Host": place.netloc, "Content-Type": "text/plain"} | {
        name.replace("_", "-"): text.format(port=place.port) for name, text in headers.items()
    }
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=GUARD)
    try:
        connection.request(method, path, BODY if method == "POST" else None, given)
        said = connection.getresponse()
        return Answer(said.status, dict(said.headers), said.read().decode())
    finally:
        connection.close()


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", "http://127.evil.example:{port}", "null"]
)
@pytest.mark.parametrize("method", ["POST", "OPTIONS", "GET"])
def test_a_page_of_somebody_else_is_refused(method: str, origin: str, running: Served) -> None:
    """What it sends as plain text too, of which a browser asks nobody beforehand."""
    path = "/v1/models" if method == "GET" else "/v1/chat/completions"
    answer = asked(running, method, path, Origin=origin)
    assert answer.status == 403
    assert answer.json["error"]["type"] == "permission_error"
    assert "--cors" in answer.json["error"]["message"]
    assert "\n" not in answer.json["error"]["message"]
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:{port}", "http://[::1]:5", "HTTP://LocalHost"]
)
def test_a_page_of_this_machine_is_answered(origin: str, running: Served) -> None:
    answer = asked(running, Origin=origin)
    assert answer.status == 200
    port = urlsplit(running.root).port
    assert answer.headers["Access-Control-Allow-Origin"] == origin.format(port=port)
    assert asked(running, "OPTIONS", Origin=origin).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "192.168.1.5:{port}"]
)
@pytest.mark.parametrize("origin", [{}, {"Origin": "http://evil.example:{port}"}])
def test_another_name_of_this_machine_is_refused(origin: dict[str, str], host: str, running: Served) -> None:
    """A name that leads elsewhere when a page is loaded, and here afterwards."""
    answer = asked(running, Host=host, **origin)
    assert answer.status == 403
    assert "--cors" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:{port}", "127.0.0.1", "[::1]:{port}", "LOCALHOST:1", "127.1.2.3"]
)
def test_names_of_this_machine_are_its_own(host: str, running: Served) -> None:
    assert asked(running, Host=host).status == 200


def test_programs_are_answered_as_ever(running: Served) -> None:
    """They name no origin."""
    for path in ("/v1/models", "/health", "/props"):
        assert asked(running, "GET", path).status == 200
    assert running.chat().status == 200
    assert "Access-Control-Allow-Origin" not in running.chat().headers


@pytest.mark.parametrize("origin", [CHAT, OTHER, CHAT.upper(), "http://localhost:1"])
def test_the_origin_that_asked_is_the_one_that_is_told(origin: str, allowing: Served) -> None:
    for method in ("POST", "OPTIONS"):
        answer = asked(allowing, method, Origin=origin)
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Vary"] == "Origin"
    assert asked(allowing, Origin="https://example.org").status == 403


def test_a_name_of_an_allowed_origin_leads_here(allowing: Served) -> None:
    """As behind a proxy that hands the name on."""
    assert asked(allowing, Host=urlsplit(CHAT).netloc, Origin=CHAT).status == 200
    assert asked(allowing, Host="example.org").status == 403


def test_who_needs_a_key_may_call_it_by_any_name(demo: Pair, tmp_path: Path) -> None:
    with served(demo.target, tmp_path, "--api-key", "secret") as found:
        key = {"Authorization": "Bearer secret"}
        assert asked(found, Host="chat.lan", **key).status == 200
        assert asked(found, Host="chat.lan", Origin="http://chat.lan", **key).status == 200  # its own page
        assert asked(found, Host="chat.lan", Origin="http://evil.example", **key).status == 403
        assert asked(found, Host="chat.lan").status == 401


def test_all_are_answered_where_that_is_wanted(demo: Pair, tmp_path: Path) -> None:
    with served(demo.target, tmp_path, "--cors", "*") as found:
        answer = asked(found, Host="chat.lan", Origin=OTHER)
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, OTHER)
