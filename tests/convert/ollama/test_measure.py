"""A pair through Ollama's API: what is asked, and what the answers become; on a program that stands in, and real."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gemma_mtp.convert import Pair
from gemma_mtp.convert.errors import MtpError, MtpWarning
from gemma_mtp.convert.ollama import dispatch, measure, shadow
from gemma_mtp.convert.ollama.installation import Engine, Installation
from gemma_mtp.convert.ollama.measure import Run, Wanted
from gemma_mtp.runtime.cli.main import main

# Answers as a real Ollama does, and its llama-server. Its own engine makes 10 tokens a second, ours 20; a round of ours
# takes a tenth more, and in ten of them it drafts.
PROGRAM = """#!{python}
import http.server, json, os, subprocess, sys
ours = "ours" in sys.argv[0]
host, _, port = os.environ["OLLAMA_HOST"].rpartition(":")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "--port", port])
class Answer(http.server.BaseHTTPRequestHandler):
    def send(self, *bodies):
        text = "".join(json.dumps(body) + chr(10) for body in bodies).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_HEAD(self):
        self.send()
    def do_GET(self):
        if self.path != "/metrics":
            return self.send({{"version": "0.33.0"}})
        counts = {{"draft_tokens_total": 40, "accepted_tokens_total": 20}}  # two of four are accepted in ten rounds
        counts |= {{'draft_tokens_per_pos_total{{position="%d"}}' % place: 10 for place in range(4)}} if ours else {{}}
        text = "".join("llamacpp:spec_decode_num_%s %d%c" % (*each, 10) for each in counts.items()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = {{"asked": body, "synth": os.environ.get("LLAMA_ARG_SPEC_SYNTH_RATES")}}
        print(json.dumps(told), file=open({seen!r}, "a"))
        if self.path == "/api/create":
            return self.send({{"status": "success"}})
        n, drafts = body["options"]["num_predict"], body["options"]["draft_num_predict"]
        seconds = n / (20 if ours else 10)
        if drafts and n > 1:
            seconds = (n - 1 - 20) * 1.1 / 20
        done = {{"done": True, "prompt_eval_count": 90, "eval_count": n, "eval_duration": int(seconds * 1e9)}}
        self.send({{"response": "a"}}, done) if body.get("stream", True) else self.send(done)
try:
    http.server.HTTPServer((host, int(port)), Answer).serve_forever()
finally:
    child.kill()
"""


@pytest.fixture
def wanted(demo: Pair) -> Wanted:
    return Wanted(demo.target, demo.drafter, "Once", (0.5,), (4,), "", 61, 256, 1, 0.0, 7, 3)


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installations made of scripts; where they write what they were asked."""
    path = tmp_path / "seen"
    for name in ("theirs", "ours"):
        program = tmp_path / name / "bin" / "ollama"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM.format(python=sys.executable, seen=str(path)))
        program.chmod(0o755)
        (tmp_path / name / "lib").mkdir()
    (tmp_path / "ours" / "lib" / "libllama-common.so").write_bytes(b"--spec-synth-rates")
    found = Installation(tmp_path / "theirs" / "bin" / "ollama", Engine(tmp_path / "theirs" / "lib"))
    monkeypatch.setattr(measure, "installation", lambda: found)
    monkeypatch.setattr(measure, "our_engine", lambda: Engine(tmp_path / "ours" / "lib"))
    monkeypatch.setattr(shadow, "shadow", lambda found, ours: tmp_path / "ours")
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return path


def test_cases_take_turns_on_both_engines(wanted: Wanted, seen: Path) -> None:
    found = measure.measure(wanted)
    theirs, ours = (found["engines"][who]["cases"] for who in ("ollama", "ours"))
    assert list(theirs) == ["plain", "own, 4"]  # it cannot replay
    assert list(ours) == ["plain", "own, 4", "0.5, 4"]
    assert (theirs["plain"]["tokens_per_s"], ours["plain"]["tokens_per_s"]) == (10, 20)
    assert ours["own, 4"]["tokens_per_s"] == pytest.approx(61 / 40 / 1.1 * 20, abs=0.01)
    # .5 + .25 + .125 + .0625 tokens are expected of each of the ten drafts, whatever was accepted.
    assert ours["0.5, 4"]["tokens_per_s"] == pytest.approx((1 + 40 + 9.375) / 40 / 1.1 * 20, abs=0.01)
    assert ours["0.5, 4"]["acceptance"] == 0.5
    assert "acceptance" not in ours["plain"]
    assert found["prompt_tokens"] == 90
    told = [json.loads(line) for line in seen.read_text().splitlines()]
    create, timed = told[0]["asked"], [each for each in told[1:] if each["asked"].get("stream", True)]
    assert set(create) == {"model", "files", "draft_files", "stream"}
    assert len(timed) == 3 * 5
    assert len({each["asked"]["prompt"] for each in timed}) == 3  # of a visit, so that no cache knows it
    assert {each["asked"]["options"]["seed"] for each in timed} == {7, 8, 9}
    replayed = [each for each in timed if each["synth"]]
    assert [each["synth"] for each in replayed] == ["0.500000000,0.250000000,0.125000000,0.062500000"] * 3
    assert not [path for path in (seen.parent / "cache").iterdir() if path.name != "ollama"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_memory_is_that_of_its_llama_server(wanted: Wanted, seen: Path) -> None:
    cases = measure.measure(wanted)["engines"]["ours"]["cases"]
    assert cases["plain"]["memory_mb"] > 1


def test_an_answer_that_ends_at_once_is_told(wanted: Wanted, seen: Path) -> None:
    with pytest.raises(MtpError, match="after 5 tokens, too few to time; give other --prompts"):
        measure.measure(replace(wanted, tokens=5))
    assert not [path for path in (seen.parent / "cache").iterdir() if path.name != "ollama"]


def test_where_our_engine_is_in_front_ollamas_own_is_not_measured(wanted: Wanted, seen: Path) -> None:
    """It would be ours as well, for all that has drafts."""
    server = seen.parent / "theirs" / "lib" / "llama-server"
    server.write_bytes(dispatch.SCRIPT.read_bytes())
    with pytest.warns(MtpWarning, match="gemma-mtp ollama engine remove"):
        assert set(measure.measure(replace(wanted, repeat=1))["engines"]) == {"ours"}


def test_a_model_of_the_store_is_measured_as_it_is(wanted: Wanted, seen: Path) -> None:
    measure.measure(replace(wanted, model="gemma4:e4b", repeat=1))
    told = [json.loads(line)["asked"] for line in seen.read_text().splitlines()]
    assert {each["model"] for each in told} == {"gemma4:e4b"}
    assert all("files" not in each for each in told)


def test_tokens_of_a_replay_are_those_expected(wanted: Wanted) -> None:
    run = Run(read=9, made=101, seconds=5.0, first=0.1, drafted=60, accepted=50, places=(40, 20), engine="", memory=0)
    assert run.rate(None) == pytest.approx(20.2)
    assert run.rate(0.8) == pytest.approx((51 + 40 * 0.8 + 20 * 0.64) / 5)
    # Where it cannot be known how far it drafted, by the clock on the wall.
    assert replace(run, places=()).rate(0.8) == pytest.approx(20.2)


def test_another_build_is_none(demo: Pair) -> None:
    done = CliRunner().invoke(main, ["bench", str(demo.target), "--against", "mine"])
    assert done.exit_code == 2
    assert "'mine' is none of stock, patched-server, portable, ollama, ollama:MODEL" in done.stderr.replace("\n", " ")


@pytest.mark.ollama
@pytest.mark.usefixtures("real")
def test_the_table_of_a_real_one(demo: Pair) -> None:
    done = CliRunner().invoke(
        main, ["bench", str(demo.target), "--against", "ollama", "--acceptance", "0.8", "-n", "32", "--repeat", "1"]
    )
    assert done.exit_code == 0, done.stderr
    assert "through its API" in done.stdout
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["ollama"]["ollama"]
    cases = found["engines"]["ours"]["cases"]
    assert list(cases) == ["plain", "own, 4", "0.8, 4"]
    assert all(each["tokens_per_s"] > 0 and each["first_token_ms"] > 0 for each in cases.values())
    assert 0 < cases["own, 4"]["acceptance"] <= 1
