"""`gemma-mtp bench`: what it prints, what it replays, and the random weights it makes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gemma_mtp.convert import Pair, link, random_pair, sizes
from gemma_mtp.convert.integrity import verify_files
from gemma_mtp.patches import stock
from gemma_mtp.runtime import native
from gemma_mtp.runtime.bench import machine, measure, server
from gemma_mtp.runtime.bench.rates import expected_tokens
from gemma_mtp.runtime.bench.replay import Replay, Replaying
from gemma_mtp.runtime.bench.settings import Chance, Settings
from gemma_mtp.runtime.bench.speed import best_length
from gemma_mtp.runtime.bench.worker import Measure, Worker
from gemma_mtp.runtime.cli.main import main
from gemma_mtp.runtime.draft.policy import Policy
from gemma_mtp.runtime.programs import program
from gemma_mtp.runtime.request import MOST, DraftLength
from llamas import paying

STOCK = stock.stock_dir()
needs_stock = pytest.mark.skipif(not STOCK.exists(), reason="no unpatched llama.cpp here; make check-stock builds it")
TESTS = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n"


def run(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    parsed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return parsed


def test_bench_ends_with_one_json_line(demo: Pair, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    replay = ["--acceptance", "0.6,1,0/1:16", "--draft", "2,3", "--warm-tokens", 50, "--plot", picture]
    found = run(demo.target.parent, "-n", 48, "--repeat", 1, "--ctx-filled", 40, "-t", 1, *replay)
    assert found["target"] == demo.target.name
    assert found["weights"] == "from the file"
    assert list(found["target_pass_ms"]) == ["1", "2", "3", "4", "5", "6", "7", "8", "9", "12"]
    assert list(found["draft_round_ms"]) == ["1", "2", "3", "4", "5", "6", "7", "8"]
    assert min(*found["target_pass_ms"].values(), *found["draft_round_ms"].values()) > 0
    assert set(found["tokens_per_s"]["mtp"]) == set(found["speedup"]) == {"0.6", "1", "0/1:16", "own"}
    assert found["tokens_per_s"]["plain"] > 0
    assert found["replayed"] == found["flags"]["acceptance"] == ["0.6", "1", "0/1:16"]
    assert set(found["speedup_by_length"]["own"]) == {"2", "3"}
    assert found["draft_length"]["own"] in (2, 3)
    assert found["acceptance"]["0.6"] == pytest.approx(0.6, abs=0.08)
    # As many tokens at 0, one a round, as at 1, three or four a round.
    assert found["acceptance"]["0/1:16"] == pytest.approx(3 / (4 + 3) if found["draft_length"]["0/1:16"] == 3 else
                                                          2 / (3 + 2), abs=0.15)  # fmt: skip
    assert set(found["auto"]) == set(found["speedup"])
    for auto in found["auto"].values():
        assert auto["best_fixed"] in (0, 2, 3)
        assert min(auto[key] for key in ("tokens_per_s", "speedup", "over_best_fixed", "learning")) > 0
    assert found["flags"]["warm_tokens"] == 50
    assert found["identical"] is True
    assert 0 < found["overhead"]["share"] < 1
    assert found["machine"]["threads"] == 1 and found["machine"]["cpu"]
    assert found["versions"]["patched"] is True
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.stock
def test_passes_alone(demo: Pair) -> None:
    found = run(demo.target, "--repeat", 1, "--ctx-filled", 40, "-t", 1, "--passes")
    assert found["target_pass_ms"]["9"] > 0
    assert found["draft_round_ms"]["8"] > 0
    assert "tokens_per_s" not in found


def test_speeds_alone(demo: Pair) -> None:
    settings = Settings(
        demo.target, demo.drafter, acceptance=(Chance((0.8,)),), own=False, draft=(3,), tokens=16, warm_tokens=16,
        repeat=1, ctx_filled=40, threads=1, speeds=True,
    )  # fmt: skip
    found = measure.measure(settings)
    assert "target_pass_ms" not in found
    assert min(found["tokens_per_s"]["plain"], found["auto"]["0.8"]["speedup"]) > 0
    assert found["left_record"] == 0


@needs_stock
def test_bench_beside_stock(demo: Pair, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    small = ["-n", 24, "--repeat", 1, "--ctx-filled", 40, "-t", 1, "--acceptance", "0.8", "--plot", picture]
    found = run(demo.target, *small, "--against", "stock", "--against", "patched-server")
    stock, ours = found["against"]["stock"], found["against"]["patched-server"]
    assert set(stock["ratio"]["target_pass_ms"]) == set(found["target_pass_ms"])
    assert set(stock["ratio"]["draft_round_ms"]) == set(found["draft_round_ms"])
    for other in (stock, ours):
        assert set(other["server"]["speedup"]) == {"0.8", "own"}
        assert set(other["server"]["ours_over_it"]) == {"plain", "0.8", "own"}
        assert other["server"]["draft_length"]["own"] in (1, 2, 3, 4)
    assert picture.read_bytes().startswith(PNG)


def check_prompts(read: dict[str, Any], *lengths: str) -> None:
    assert list(read) == list(lengths)
    for length, figures in read.items():
        assert figures["tokens_per_s"] == pytest.approx(int(length) / figures["first_token_ms"] * 1e3, rel=0.1)


def test_prompts(demo: Pair) -> None:
    """Also longer than the context that anything else needs, and than a batch."""
    found = run(demo.target, "--repeat", 1, "--ctx-filled", 40, "-t", 1, "--passes", "--prompt", "20,700")
    check_prompts(found["prompt"], "20", "700")
    assert found["flags"]["n_batch"] == 512
    assert not {"prompt_server", "prompt_speedup", "against"} & set(found)


def test_prompts_beside_a_server_by_its_path(demo: Pair) -> None:
    binary = str(program("llama-server"))
    small = ["--repeat", 2, "--ctx-filled", 40, "-t", 1, "--passes", "--prompt", "20,90"]
    found = run(demo.target, *small, "--against", binary, "--against", "patched-server")
    check_prompts(found["prompt_server"], "20", "90")
    theirs = found["against"][binary]
    check_prompts(theirs["prompt"], "20", "90")
    assert theirs["left_out"] == []
    assert found["prompt_speedup"] == theirs["prompt_speedup"]
    assert min(found["prompt_speedup"].values()) > 0
    assert found["against"]["patched-server"]["prompt"] == found["prompt_server"]
    assert "prompt_speedup" not in found["against"]["patched-server"]


@pytest.fixture
def old_server(tmp_path: Path) -> Path:
    path = tmp_path / "old-server"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {TESTS / "server_standin.py"} "$@"\n')
    path.chmod(0o755)
    return path


def test_a_server_that_knows_few_flags(demo: Pair, old_server: Path) -> None:
    """It is measured with those that it knows, without drafts, and one line names the others."""
    small = ["-n", 8, "--repeat", 1, "--ctx-filled", 40, "-t", 1, "--warm-tokens", 8, "--acceptance", "0.8"]
    arguments = [demo.target, *small, "--prompt", "20", "--against", old_server]
    done = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    theirs = json.loads(done.stdout.splitlines()[-1])["against"][str(old_server)]
    assert {"-np", "-b", "-ub", "--spec-type", "--log-colors"} <= set(theirs["left_out"])
    assert not {"-m", "-c", "-t", "-ngl", "-fa", "on", "512", "off"} & set(theirs["left_out"])
    assert f"old-server does not know {', '.join(theirs['left_out'])}: left out" in " ".join(done.stdout.split())
    check_prompts(theirs["prompt"], "20")
    # Eight tokens in eight milliseconds, of which the first is the prompt's.
    assert theirs["server"]["mtp"] == {} and theirs["server"]["plain"] == 875.0


def test_arguments_are_those_that_a_server_knows(old_server: Path, tmp_path: Path) -> None:
    given = ["-m", "x.gguf", "-b", "512", "-c", "64", "--log-prefix", "--no-log", "a", "b", "-t", "2"]
    kept, unknown = server.understood(old_server, given)
    assert kept == ["-m", "x.gguf", "-c", "64", "-t", "2"]
    assert unknown == ["-b", "--log-prefix", "--no-log"]
    assert server.attention(old_server, True) == ["-fa"] and server.attention(old_server, False) == []
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho '-fa, --flash-attn [on|off|auto]'; echo '-m --host --port -c'")
    other.chmod(0o755)
    assert server.attention(other, False) == ["-fa", "off"]
    assert not server.can_draft(old_server, chance=False)


class Guesses:
    """A drafter that always proposes zeros, and counts how often it ran."""

    runs = 0

    def allow(self, mask: Any) -> None:
        pass

    def draft(self, token: int, hidden: Any, position: int, length: int, choose: Any) -> list[int]:
        del token, hidden
        self.runs += 1
        return [choose(np.eye(1, 16)[0], position + 1 + step) if choose else 0 for step in range(length)]


@pytest.mark.parametrize("choose", [None, lambda logits, position: int(logits.argmax())])
@pytest.mark.parametrize("chance", [0.0, 0.35, 0.6, 0.95, 1.0])
def test_replay_is_right_with_the_chance_asked_for(chance: float, choose: Any) -> None:
    record, rounds, length = list(range(1, 9)), 400, 4
    drafter = Guesses()
    replay = Replay(drafter, record, Chance((chance,)), seed=3, begin=0)
    right = np.zeros(length + 1)
    for _ in range(rounds):
        drafted = replay.draft(2, np.zeros(1, np.float32), 1, length, choose)
        hits = [token == truth for token, truth in zip(drafted, record[2:], strict=False)]
        count = hits.index(False) if False in hits else length
        assert not any(hits[count:])  # a wrong token ends what can be accepted
        right[: count + 1] += 1
    assert drafter.runs == rounds
    for place in range(1, length + 1):
        # The numbers lie evenly, so the deviation is of the order of 1 / rounds, not of its square root.
        assert right[place] / rounds == pytest.approx(chance**place, abs=0.01)


def test_replay_without_a_chance_proposes_what_the_drafter_does() -> None:
    replay = Replay(Guesses(), [5, 6, 7], None, seed=0, begin=0)
    assert replay.draft(6, np.zeros(1, np.float32), 1, 3, None) == [0, 0, 0]


def test_chances_take_turns() -> None:
    chance = Chance.parse("0.1/0.9:4")
    assert chance == Chance((0.1, 0.9), 4)
    assert [chance.at(made) for made in (0, 3, 4, 7, 8)] == [0.1, 0.1, 0.9, 0.9, 0.1]
    assert [chance.tokens(n) for n in (1, 8, 9)] == [8, 8, 16]
    assert Chance.parse("0.35").tokens(9) == 9
    assert [Chance.parse(text).name for text in ("0", "0.35", "0.1/0.9")] == ["0", "0.35", "0.1/0.9:64"]
    record = list(range(1, 40))
    replay = Replay(Guesses(), record, Chance((0.0, 1.0), 4), seed=0, begin=10)
    for position in range(10, 30):
        right = replay.draft(0, np.zeros(1, np.float32), position, 2, None) == record[position + 1 : position + 3]
        assert right == ((position - 10) // 4 % 2 == 1)


@pytest.mark.parametrize("length", [0, 2, "auto"])
def test_replays_end_between_rounds_and_keep_to_the_record(length: DraftLength, demo: Pair) -> None:
    """Whatever the draft length; "auto" is made to draft, and what the text so far holds is no help."""
    options: dict[str, Any] = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
    with closing(Replaying(demo.target, **options)) as llm:
        measure = Measure(llm)
        measure.fill(measure.tokenize("import os\nimport sys\n" * 4))
        record = measure.record(60)
        llm._costs = paying()
        llm._policy = Policy(llm._costs, MOST)
        found = measure.replay(40, length, "0.5/1:10", 0)
    assert found["left_record"] == 0
    assert 40 <= found["generated"] + 1 < 40 + MOST + 1
    assert set(found["stats"]["drafted_from"]) == (set() if length == 0 else {"mtp"})
    assert len(record) == 60
    assert llm.rehearsal is None


def test_best_length_weighs_cost_and_acceptance() -> None:
    assert expected_tokens(Chance((0.5,)), 2) == 1.75
    assert expected_tokens(Chance((0.0, 1.0)), 2) == 1.5  # 2 tokens in 4/3 rounds, 1 alone and 1 of a round of three
    dear = {"target_pass_ms": {str(n): 10.0 * n for n in range(1, 10)}, "draft_round_ms": dict.fromkeys("12345678", 0)}
    cheap = {"target_pass_ms": dict.fromkeys("123456789", 10.0), "draft_round_ms": dict.fromkeys("12345678", 0.0)}
    assert best_length(Chance((0.6,)), dear) == 1
    assert best_length(Chance((0.6,)), cheap) == 8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """E2B's shape cut to five layers, 800 MB."""
    target, drafter = random_pair.write_pair("E2B", tmp_path_factory.mktemp("shapes"), layers=5)
    yield target, drafter
    target.unlink()


def test_random_weights_are_a_linked_pair_at_true_shape(small: tuple[Path, Path], tmp_path: Path) -> None:
    target, drafter = (link.read_header(path) for path in small)
    verify_files(small[0])  # every block finite, the link checked
    assert link.find_drafter(target.path) == drafter.path
    assert target.metadata[link.KEY_SEED] == 0
    assert target.tensors["token_embd.weight"].shape == (1536, 262144)
    assert target.tensors["blk.4.ffn_down.weight"].shape == (6144, 1536)
    assert drafter.metadata[link.KEY_N_CENTROIDS] == 2048
    assert sorted(drafter.metadata[link.KEY_ORDERING][:8]) != list(range(8))
    # The same seed gives the same bytes; a file that is there already is not made again.
    again = tmp_path / small[0].parent.name / small[0].name
    again.parent.mkdir()
    again.touch()
    made = random_pair.write_pair("E2B", tmp_path, layers=5)
    assert made[0].stat().st_size == 0
    assert made[1].read_bytes() == small[1].read_bytes()


def test_killed_while_making_random_weights(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Half a file takes room until the next run, and never stands under the name of a whole one."""
    folder = tmp_path / small[0].parent.name
    folder.mkdir()
    (folder / small[0].name).touch()
    code = (
        "import os, signal, sys; from pathlib import Path; from gemma_mtp.convert import random_pair\n"
        "random_pair.put_hashes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "random_pair.write_pair('E2B', Path(sys.argv[1]), layers=5)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    (left,) = [path for path in folder.iterdir() if path.name != small[0].name]
    assert left.name.startswith(".")
    random_pair.write_pair("E2B", tmp_path, layers=5)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in small)


@pytest.mark.parametrize("library", [None, pytest.param(STOCK, marks=[pytest.mark.stock, needs_stock])])
def test_random_weights_generate_with_mtp(small: tuple[Path, Path], library: Path | None) -> None:
    with closing(Worker(*small, library, n_ctx=256, n_threads=1, n_threads_batch=1)) as worker:
        assert worker.library["patched"] is (library is None)
        worker.call("fill", tokens=list(range(1000, 1016)))
        record = worker.call("record", n=24)
        assert len(set(record)) > 12  # no loop
        found = worker.call("replay", n=12, length=3, chance="1", seed=0)
        assert found["generated"] >= 11
        stats = found["stats"]
        assert stats["target_passes"] < found["generated"]
        assert found["seconds"] >= stats["pass_seconds"] + stats["draft_seconds"] > 0


@pytest.mark.parametrize("shape", list(sizes.SIZES))
def test_every_shape_is_planned_whole_and_shortened(shape: str) -> None:
    spec = sizes.SIZES[shape]
    for layers in (None, spec.period, 2 * spec.period):
        target, drafter = sizes.configs(shape, layers)
        text = target["text_config"]
        assert len(text["layer_types"]) == text["num_hidden_layers"]
        assert (text["num_hidden_layers"] - text["num_kv_shared_layers"]) % spec.period == 0
        assert drafter["backbone_hidden_size"] == text["hidden_size"]
    with pytest.raises(link.MtpError, match=f"multiple of {spec.period}"):
        sizes.configs(shape, spec.period + 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a PAIR"),
        (["--shape", "E2B", "--layers", "7"], "multiple of 5"),
        (["--shape", "E2B", "-q", "Q9"], "unknown format 'Q9'"),
        (["--shape", "E2B", "--acceptance", "1.2"], "between 0 and 1"),
        (["--shape", "E2B", "--draft", "a"], "not a list of numbers"),
        (["--shape", "E2B", "--draft", "3,16"], "15 at most"),
        (["--shape", "E2B", "--prompt", "0"], "1 token at least"),
        (["--shape", "E2B", "--against", "none/llama-server"], "the path of a llama-server"),
        (["--shape", "E2B", "--draft", "0"], "plain generation is measured anyway"),
        (["--shape", "E2B", "--acceptance", "0.5:8"], "take turns"),
        (["."], "must hold one target"),
        (["--shape", "E2B", "--plot", "none/bench.png"], "there is no folder"),
    ],
)
def test_bad_arguments_get_one_clear_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path / "cache"))
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code != 0
    assert said in done.output.splitlines()[-1]
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not exist"):
        Worker(tmp_path / "none.gguf", tmp_path / "none.gguf", n_ctx=64)


def test_too_little_memory_is_refused_before_anything_is_loaded(demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    monkeypatch.setattr(native, "has_gpu", lambda: False)
    settings = Settings(demo.target, demo.drafter)
    with pytest.raises(RuntimeError, match="processes need about"):
        measure.measure(settings)


def test_the_machine_is_described() -> None:
    found = machine.describe(1)
    assert found["cpu"] and found["cores"] >= 1
    assert found["read_gb_per_s"] is None or found["read_gb_per_s"] >= 0


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo usage: other", "no llama-server: its --help does not name -m"), (None, "Exec format error")],
)
def test_what_is_no_llama_server(script: str | None, said: str, demo: Pair, tmp_path: Path) -> None:
    """Told before anything is loaded."""
    path = tmp_path / "program"
    path.write_text("\0" if script is None else f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    settings = Settings(demo.target, demo.drafter, against=(str(path),))
    with pytest.raises(RuntimeError, match=said):
        measure.measure(settings)
