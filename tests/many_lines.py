"""`make check-many-lines`: `gemma-mtp run --jsonl` over 10,000 lines, killed twice in the midst of them.

Short prompts and chats to the bundled pair, 16 tokens each at temperature 1. The program is sent SIGKILL once it has
answered a fifth of the lines and again at two fifths; the third run ends. Each line must have one answer, in the order
of the lines, without an error; the memory of the process must not grow from where the first tenth of its lines is
answered; and every hundredth answer must be what `Llama` says to that line alone. Prints a row for each of the looks at
the process; the exit status is 1 if anything was wrong.

    python tests/many_lines.py --prompts 500
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, NamedTuple

from children import MAIN, environment, started, until
from demo import PAIR
from fuzz_server import memory
from gemma_mtp.convert import convert_pair
from gemma_mtp.runtime import Llama
from prompts import held_out

LINES, TOKENS, PARALLEL, CONTEXT = 10_000, 16, 4, 512
KILLED_AT = (0.2, 0.4)  # of the lines
WARM, GROWTH = 0.1, 16  # the part of a run's lines that warms it up; MiB that it may have more after that
LOOKS = 20  # at all runs together
ASKED_AGAIN = 100  # every so many lines
DRAWN = {"max_tokens": TOKENS, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Look(NamedTuple):
    """At a running program: the lines that have answers, and its memory in MiB."""

    lines: int
    memory: int


def asked(count: int) -> list[dict[str, Any]]:
    """The lines: beginnings of the held-out prompts, each with its number, each fourth as a chat."""
    texts, lines = held_out(), []
    for place in range(count):
        text = f"# {place}\n{texts[place % len(texts)][: 20 + place % 60]}"
        ask = {"messages": [{"role": "user", "content": text}]} if place % 4 == 3 else {"prompt": text}
        lines.append({"id": place, **ask, "seed": place})
    return lines


def answered(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def run(target: Path, lines: Path, out: Path, count: int, stop: int) -> list[Look]:
    """Run the command until so many lines have answers, then kill it, or up to its end; returns what it looked like."""
    options = ["-n", TOKENS, "--temp", 1, "--top-k", 0, "--top-p", 1, "-c", CONTEXT, "--parallel", PARALLEL]
    command = [sys.executable, "-c", MAIN, "run", target, "--jsonl", lines, "--out", out, *options]
    looks, every = [], max(1, count // LOOKS)
    before = answered(out)

    def further(process: subprocess.Popen[str], least: int) -> bool:
        return answered(out) >= least or process.poll() is not None

    with started(command, env=environment(lines.parent), stdout=DEVNULL, stderr=PIPE) as process:
        for least in range(before + every, stop + (stop < count), every):
            until(partial(further, process, least))
            try:
                looks.append(Look(answered(out), memory(process.pid)))
            except (OSError, AssertionError):  # it has ended
                break
            print(f"{looks[-1].lines:8} lines{looks[-1].memory:6} MiB", flush=True)
        if stop < count:
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    print("killed" if stop < count else said.strip().splitlines()[-1], f"({answered(out)} lines)", flush=True)
    if process.returncode != (-signal.SIGKILL if stop < count else 0):
        raise SystemExit(f"FAULT: status {process.returncode}: {said[-2000:]}")
    return looks


def grown(looks: list[Look]) -> int:
    """MiB that a run had more of at its end than where it was warm."""
    warm = [look for look in looks if look.lines - looks[0].lines >= WARM * (looks[-1].lines - looks[0].lines)]
    return max(look.memory for look in warm) - warm[0].memory


def wrong(lines: list[dict[str, Any]], out: Path) -> list[str]:
    """What is wrong with the file of answers."""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    said = []
    if [each["line"] for each in found] != list(range(1, len(lines) + 1)):
        said.append(f"{len(found)} answers to {len({each['line'] for each in found})} of {len(lines)} lines")
    if [each.get("id") for each in found] != [line["id"] for line in lines]:
        said.append("answers are not those of their lines, or not in their order")
    failed = [each for each in found if "error" in each]
    return [*said, *(f"line {each['line']}: {each['error']}" for each in failed[:5])]


def texts_alone(target: Path, lines: list[dict[str, Any]], out: Path) -> tuple[int, int]:
    """How many of some answers are those of `Llama` to the line alone, and how many these are."""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    same = 0
    places = range(0, len(lines), ASKED_AGAIN - 1)  # prompts and chats
    with closing(Llama(target, n_ctx=CONTEXT, verbose=False)) as llm:
        for place in places:
            line = {key: value for key, value in lines[place].items() if key != "id"}
            ask = llm.create_chat_completion if "messages" in line else llm.create_completion
            (choice,) = ask(**line, **DRAWN)["choices"]
            same += choice.get("text", choice.get("message")) == found[place].get("text", found[place].get("message"))
    return same, len(places)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=LINES, help=f"how many lines ({LINES})")
    count = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", folder / "pair", "Q8_0").target
        lines, source, out = asked(count), folder / "in.jsonl", folder / "out.jsonl"
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        faults, begun = [], time.monotonic()
        for stop in (*(int(part * count) for part in KILLED_AT), count):
            more = grown(run(target, source, out, count, stop))
            print(f"grown by {more} MiB once warm", flush=True)
            faults += [f"memory grew by {more} MiB"] if more > GROWTH else []
        faults += wrong(lines, out)
        same, looked = texts_alone(target, lines, out)
        took = time.monotonic() - begun
        print(f"{count} lines in {took:.0f} s; {same} of {looked} texts are those of the line alone")
        faults += [f"{looked - same} texts are not those of the line alone"] if same < looked else []
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
