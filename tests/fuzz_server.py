"""Odd requests against `gemma-mtp serve` on the bundled pair (`make fuzz-server`).

None may end the server, keep a slot busy, or take memory without bound; what is wrong with a request must be told by a
status of 400 to 499 with an error object as OpenAI has it. After each batch every slot answers a plain request with the
text that it gave at first. Where the server ended, the requests under way are sent one by one to a fresh one, to see
which it was; --first and --count send a stretch of them again.

    python tests/fuzz_server.py --count 5000
    python tests/fuzz_server.py --first 1234 --count 1
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from children import until
from gemma_mtp.convert import convert_pair
from odd_requests import Request, request
from serves import Served, served

HERE = Path(__file__).resolve().parent
BATCH, CLIENTS, SLOTS = 50, 8, 4
# Seconds for an answer, after which the client leaves, for what comes over a raw connection, and for a process to end.
PATIENCE, RAW, GONE = 20.0, 2.0, 5.0
# What prompts of earlier requests may keep, MiB, and how far the server may grow beyond that while odd requests run.
KEPT, GROWTH = 64, 1500
# What is no fault: what the server was not started for, and requests that together fill the context that all share.
NO_FAULT = 501, 503
OPTIONS = ("-c", 2048, "--", "--cache-ram", KEPT)
PLAIN = {"prompt": "import os\n", "n_predict": 16, "temperature": 0, "cache_prompt": False}


@dataclass(frozen=True)
class Outcome:
    """What became of a request: a status, or why there is none; and what is wrong with that, if anything."""

    told: str
    fault: str | None = None


def send(address: str, sent: Request) -> Outcome:
    """Send a request and read its answer."""
    place = urlsplit(address)
    assert place.hostname and place.port
    try:
        if sent.raw is not None:
            return _raw(place.hostname, place.port, sent.raw)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=PATIENCE)
        try:
            connection.request(sent.method, sent.path, sent.body or None, sent.headers)
            answer = connection.getresponse()
            if sent.leave:
                answer.read(1)
                return Outcome("left")
            return judged(sent, answer.status, answer.read())
        finally:
            connection.close()
    except TimeoutError:
        return Outcome("no answer in time")
    except (OSError, http.client.HTTPException) as problem:
        # a body that is too long, or packed in a way that is not known, is not read to its end
        hung_up = sent.raw is not None or isinstance(problem, BrokenPipeError)
        return Outcome(type(problem).__name__, None if hung_up else f"the connection broke: {problem!r}")


def _raw(host: str, port: int, data: bytes) -> Outcome:
    with (
        socket.create_connection((host, port), RAW) as connection,
        suppress(OSError),
    ):  # it may hang up before all is sent
        connection.sendall(data)
        connection.recv(65536)
    return Outcome("raw")


def judged(sent: Request, status: int, body: bytes) -> Outcome:
    """Whether an answer is one that OpenAI's clients understand."""
    if status >= 500 and status not in NO_FAULT:
        return Outcome(str(status), f"status {status}: {body[:300]!r}")
    if status >= 400 and sent.method != "HEAD":
        try:
            error = json.loads(body)["error"]
            sound = isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
        except (ValueError, TypeError, KeyError):
            sound = False
        return Outcome(str(status), None if sound else f"status {status} without an error object: {body[:300]!r}")
    return Outcome(str(status))


def memory(pid: int, what: str = "VmRSS") -> int:
    """Resident memory of a process in MiB, or its peak (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) >> 10


def alive(found: Served) -> bool:
    return found.process.poll() is None and Path(f"/proc/{found.facts['pid']}").exists()


def busy(found: Served) -> bool:
    return any(slot["is_processing"] for slot in found.ask("/slots").json)


def texts(found: Served) -> list[str]:
    """What every slot says to a plain request, once it is free."""
    until(lambda: not busy(found), found.process)
    answers = [found.ask("/completion", PLAIN | {"id_slot": slot}) for slot in range(SLOTS)]
    assert [answer.status for answer in answers] == [200] * SLOTS, answers
    return [answer.json["content"] for answer in answers]


@contextmanager
def bundled(folder: Path) -> Iterator[Path]:
    """The bundled pair, converted."""
    pair = HERE / "pair"
    yield convert_pair(pair / "gemma-4-demo", pair / "gemma-4-demo-assistant", folder, "Q8_0").target


class Run:
    """A server that is sent batches, and started again where it ended."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.told: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slow: list[str] = []

    def over(self, batches: Sequence[Sequence[int]]) -> None:
        """Send requests by their numbers, each beside others of its batch."""
        left, done = [*batches], 0
        while left:
            with served(self.target, self.folder, *OPTIONS, GGML_NO_BACKTRACE="1") as found:
                first, base = texts(found), memory(found.facts["pid"])
                while left:
                    batch = [*map(request, left.pop(0))]  # made now: together they would fill the memory
                    self._send(found, batch)
                    done += len(batch)
                    if done % (10 * BATCH) == 0:
                        print(f"{done} sent, up to number {batch[-1].number}", flush=True)
                    why = self._sound(found, first, base)
                    if why is None:
                        continue
                    log = found.errors.read_text()[-700:]
                    self.fault(f"{why} in requests {batch[0].number} to {batch[-1].number}: {log}")
                    if len(batch) > 1:
                        left[:0] = [[each.number] for each in batch]
                    break

    def late(self, what: str) -> None:
        self.slow.append(what)
        print(f"slow: {what}", flush=True)

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"FAULT: {what}", flush=True)

    def _send(self, found: Served, batch: Sequence[Request]) -> None:
        with ThreadPoolExecutor(CLIENTS) as clients:
            for sent, outcome in zip(batch, clients.map(lambda each: send(found.root, each), batch), strict=True):
                self.told[outcome.told] += 1
                if outcome.told == "no answer in time":
                    self.late(str(sent))
                if outcome.fault and alive(found):
                    self.fault(f"{outcome.fault}\n    {sent}")

    def _sound(self, found: Served, first: list[str], base: int) -> str | None:
        """What is wrong with a server after a batch, if anything."""
        began = time.monotonic()
        try:
            said = texts(found)
        except (AssertionError, OSError, http.client.HTTPException, ValueError) as problem:
            with suppress(subprocess.TimeoutExpired):  # the connection breaks before the process is gone
                found.process.wait(GONE)
            return "a slot hangs" if alive(found) else f"the server ended ({problem!r:.200})"
        if time.monotonic() - began > PATIENCE:
            self.late(f"slots were free after {time.monotonic() - began:.0f} s")
        if said != first:
            return f"another text: {said} instead of {first}"
        pid = found.facts["pid"]
        if (grown := memory(pid, "VmHWM") - base) > GROWTH:
            return f"grew by {grown} MiB"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Send odd requests to gemma-mtp serve.")
    parser.add_argument("--count", type=int, default=5000, help="requests (5000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (0)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"requests between two looks at the server ({BATCH})")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so end the server
    numbers = range(given.first, given.first + given.count)
    batches = [numbers[at : at + given.batch] for at in range(0, given.count, given.batch)]
    with tempfile.TemporaryDirectory() as folder, bundled(Path(folder) / "pair") as target:
        run = Run(target, Path(folder))
        run.over(batches)
    for told, times in sorted(run.told.items()):
        print(f"{times:6} {told}")
    print(f"{given.count} requests, {len(run.slow)} slow, {len(run.faults)} faults")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
