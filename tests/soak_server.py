"""Clients of all sorts at `gemma-mtp serve` for minutes, then SIGTERM in the midst of them (`make soak`).

Whole answers, streams, streams that are left, tools, schemas, long prompts, several answers at once, and requests that
are refused, from eight clients. Each answer must be sound, none may take longer than a minute and a half, and memory,
descriptors and threads of the server must not grow once it is warm. At the end it must be gone five seconds after
SIGTERM, with all that it started. Prints a table, a row each time the server was looked at; the status is 1 if anything
was wrong.

    python tests/soak_server.py --minutes 10
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from children import alone
from fuzz_server import bundled, memory
from serves import Served, served

CLIENTS, LOOKS = 8, 20
# Seconds for an answer, which is short, and for the end.
PATIENCE, END = 90.0, 5.0
# The share of the looks that warms the server up, and MiB, descriptors and threads that it may have more after that.
WARM, GROWTH, MORE = 0.25, 48, 12
# What prompts of earlier requests may keep, MiB: it is full before anything is measured.
OPTIONS = ("-c", 4096, "--", "--cache-ram", 32)
WHERE = {"type": "object", "required": ["deep"],
         "properties": {"deep": {"type": "boolean"}, "at": {"enum": ["home", "sea"]}}}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": WHERE}}
SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}, "n": {"type": "integer"}}, "required": ["good"]}

Rng = random.Random


@dataclass
class Soak:
    """What clients share: where the server is, what became of requests, and when they are to stop."""

    host: str
    port: int
    ending: threading.Event = field(default_factory=threading.Event)
    told: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def ask(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> http.client.HTTPResponse:
        """The answer to a request, its body yet to be read; the connection ends with it."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def client(self, number: int) -> None:
        """Ask one thing after the other until the end."""
        rng = Rng(number)
        while not self.ending.is_set():
            kind = rng.choice(KINDS)
            try:
                kind(self, rng)
                self.told[kind.__name__] += 1
            except Exception as problem:  # any is told of, at the end
                if not self.ending.is_set():
                    self.faults.append(f"{kind.__name__}: {problem!r:.300}")


def talk(rng: Rng, **more: Any) -> dict[str, Any]:
    words = "import os " * rng.choice((1, 1, 5, 40))
    sampled = {"temperature": rng.choice((0, 1)), "seed": rng.randrange(99), "max_tokens": rng.choice((1, 16, 60))}
    return {"messages": [{"role": "user", "content": words}], **sampled, **more}


def message(answer: http.client.HTTPResponse) -> dict[str, Any]:
    told = json.loads(answer.read())
    assert answer.status == 200, told
    first: dict[str, Any] = told["choices"][0]
    return first


def whole(soak: Soak, rng: Rng) -> None:
    assert message(soak.ask(talk(rng)))["finish_reason"] in ("stop", "length")


def several(soak: Soak, rng: Rng) -> None:
    answer = json.loads(soak.ask(talk(rng, n=2)).read())
    assert len(answer["choices"]) == 2, answer


def stream(soak: Soak, rng: Rng) -> None:
    text = soak.ask(talk(rng, stream=True)).read().decode()
    assert '"finish_reason":"' in text and text.rstrip().endswith("data: [DONE]"), text[-200:]


def left(soak: Soak, rng: Rng) -> None:
    """A stream that nobody listens to any more."""
    answer = soak.ask(talk(rng, stream=True, ignore_eos=True) | {"max_tokens": 1500})
    for _ in range(rng.randrange(9)):
        assert answer.readline() is not None
    answer.close()


def hung_up(soak: Soak, rng: Rng) -> None:
    """A whole answer that nobody waits for."""
    connection = http.client.HTTPConnection(soak.host, soak.port, timeout=PATIENCE)
    body = talk(rng, ignore_eos=True) | {"max_tokens": 1500}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(rng.random() / 4)
    connection.close()


def tool(soak: Soak, rng: Rng) -> None:
    choice = message(soak.ask(talk(rng, tools=[TOOL], tool_choice="required") | {"max_tokens": 120}))
    for call in choice["message"].get("tool_calls") or () if choice["finish_reason"] == "tool_calls" else ():
        assert isinstance(json.loads(call["function"]["arguments"])["deep"], bool), call


def schema(soak: Soak, rng: Rng) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    choice = message(soak.ask(talk(rng, response_format=wanted) | {"max_tokens": 120}))
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"])["good"], bool), choice


def completion(soak: Soak, rng: Rng) -> None:
    body = {"prompt": "def f(x):\n" * rng.choice((1, 30)), "n_predict": 24, "n_probs": rng.choice((0, 3))}
    assert "content" in json.loads(soak.ask(body, "/completion").read())


def refused(soak: Soak, rng: Rng) -> None:
    body = rng.choice(({"messages": 3}, {}, talk(rng, tools=3), talk(rng, grammar="root ::= ("), talk(rng, n=-1)))
    answer = soak.ask(body)
    assert 400 <= answer.status < 500, (body, answer.status, answer.read()[:200])


KINDS: list[Callable[[Soak, Rng], None]] = [
    whole,
    whole,
    stream,
    stream,
    left,
    hung_up,
    several,
    tool,
    schema,
    completion,
    refused,
]


def look(pid: int) -> dict[str, int]:
    """Memory in MiB, open descriptors and threads of a process."""
    folder = Path(f"/proc/{pid}")
    count = {name: sum(1 for _ in (folder / what).iterdir()) for name, what in (("files", "fd"), ("threads", "task"))}
    return {"MiB": memory(pid), **count}


def grown(looks: list[dict[str, int]]) -> list[str]:
    """What the server had more of in the last quarter of the looks than in the first after it was warm, at best."""
    warm = looks[int(len(looks) * WARM) :]
    quarter = max(1, len(warm) // 4)
    said = []
    for name, limit in (("MiB", GROWTH), ("files", MORE), ("threads", MORE)):
        before, after = (min(each[name] for each in part) for part in (warm[:quarter], warm[-quarter:]))
        if after - before > limit:
            said.append(f"{name} grew from {before} to {after}")
    return said


def soaked(found: Served, minutes: float) -> list[str]:
    """Ask a server for minutes, then end it; returns what was wrong."""
    place = urlsplit(found.root)
    assert place.hostname and place.port
    soak, looks, pid = Soak(place.hostname, place.port), [], found.facts["pid"]
    threads = [threading.Thread(target=soak.client, args=(number,), daemon=True) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    print(f"{'minute':>8}{'requests':>10}{'faults':>8}{'MiB':>8}{'files':>8}{'threads':>9}", flush=True)
    began = time.monotonic()
    for number in range(1, LOOKS + 1):
        time.sleep(max(0.0, began + minutes * 60 * number / LOOKS - time.monotonic()))
        if found.process.poll() is not None:
            return [*soak.faults, f"the server ended: {found.errors.read_text()[-2000:]}"]
        looks.append(look(pid))
        row = [minutes * number / LOOKS, sum(soak.told.values()), len(soak.faults), *looks[-1].values()]
        print("{:8.1f}{:10}{:8}{:8}{:8}{:9}".format(*row), flush=True)
    soak.ending.set()
    return [*soak.faults, *grown(looks), *ended(found, pid, threads), *unasked(soak)]


def unasked(soak: Soak) -> list[str]:
    print(", ".join(f"{times} {name}" for name, times in sorted(soak.told.items())))
    return [f"no request of the kind {kind.__name__} came to its end" for kind in KINDS if not soak.told[kind.__name__]]


def ended(found: Served, pid: int, threads: list[threading.Thread]) -> list[str]:
    """Send SIGTERM while clients wait for answers; returns what was wrong with that."""
    began = time.monotonic()
    found.process.send_signal(signal.SIGTERM)
    found.process.wait()
    took = time.monotonic() - began
    for thread in threads:
        thread.join(PATIENCE)
    print(f"ended {took:.1f} seconds after SIGTERM, with status {found.process.returncode}")
    said = [f"it took {took:.1f} seconds to end"] if took > END else []
    if Path(f"/proc/{pid}").exists() or not alone(found.process):
        said.append("something is left of it")
    if any(thread.is_alive() for thread in threads):
        said.append("clients wait for ever")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask gemma-mtp serve for minutes, then end it.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (10)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so end the server
    with (
        tempfile.TemporaryDirectory() as folder,
        bundled(Path(folder) / "pair") as target,
        served(target, Path(folder), *OPTIONS) as found,
    ):
        faults = soaked(found, given.minutes)
    for fault, times in Counter(faults).items():
        print(f"FAULT, {times} times: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
