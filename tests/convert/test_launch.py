"""`gemma-mtp launch`: the check of the pair, the command, and an engine's life, with real processes in its place."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import pytest
import shapes
from children import MAIN, ended, environment, said, started, until
from click.testing import CliRunner, Result
from gemma_mtp.convert import engines, launch
from gemma_mtp.convert.engines import ENGINES, VLLM, SGLang
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.runtime.cli.main import main
from hub import run_against, serving
from tiny import PAIR, SIZES, edit_json

FOLDERS = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
BOTH = pytest.mark.parametrize("engine", ENGINES)
STANDIN = Path(__file__).parents[1] / "engine_standin.py"
Started = Callable[..., Any]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["launch", *map(str, arguments)])


def sparse_pair(root: Path, size: str) -> tuple[Path, Path]:
    """Folders of a target and its drafter at a published size, their weights a hole."""
    folders = root / f"gemma-4-{size}-it", root / f"gemma-4-{size}-it-assistant"
    for folder, config in zip(folders, (shapes.target_json(size), shapes.drafter_json(size)), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(FOLDERS[0] / "tokenizer.json", folder)
        shapes.sparse_safetensors(folder / "model.safetensors", shapes.index(shapes.parsed(config)))
    return folders


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("published sizes")  # a name that a shell has to see quoted
    return {size: sparse_pair(root, size) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_print_for_vllm(size: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    target, drafter = pairs[size]
    done = run("vllm", target, drafter, "--print", "--", "--max-model-len", "8192")
    assert (done.exit_code, done.stderr) == (0, "")
    *start, flag, drafting, one, other = shlex.split(done.stdout)
    assert start == ["vllm", "serve", str(target), "--host", "127.0.0.1", "--port", "8000"]
    assert (flag, one, other) == ("--speculative-config", "--max-model-len", "8192")
    length = 2 if size == "E2B" else 4
    assert json.loads(drafting) == {"method": "mtp", "model": str(drafter), "num_speculative_tokens": length}


@pytest.mark.parametrize("size", SIZES)
def test_print_for_sglang(size: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    target, drafter = pairs[size]
    done = run("sglang", target, "--print", "--port", "30000", "--draft-length", "5", "--", "--tp-size", "2")
    assert (done.exit_code, done.stderr) == (0, "")
    assert shlex.split(done.stdout) == [
        "sglang", "serve", "--model-path", str(target), "--host", "127.0.0.1", "--port", "30000",
        "--speculative-algorithm", "NEXTN", "--speculative-draft-model-path", str(drafter),
        "--speculative-num-steps", "5", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "6",
        "--tp-size", "2",
    ]  # fmt: skip


def test_the_12b_is_known_by_its_drafter(pairs: dict[str, tuple[Path, Path]]) -> None:
    assert {size: launch.checked(*map(str, pair)).unified for size, pair in pairs.items()} == {
        size: size == "12B" for size in pairs
    }


def test_an_ordering_that_came_as_zeros_is_told_before_an_engine_loads_it(tmp_path: Path) -> None:
    target, drafter = sparse_pair(tmp_path, "E2B")
    os.truncate(drafter / "model.safetensors", (size := (drafter / "model.safetensors").stat().st_size) - (1 << 20))
    os.truncate(drafter / "model.safetensors", size)
    done = run("vllm", target, drafter, "--print")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "does not name every token once; download it again" in done.stderr.replace("\n", " ")


def test_repositories_are_checked_and_named_with_their_revision(tmp_path: Path) -> None:
    names = "google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"
    with serving(dict(zip(names, FOLDERS, strict=True))) as hub:
        vllm = run_against(hub, tmp_path, "launch", "vllm", f"{names[0]}@v1", f"{names[1]}@main", "--print")
        sglang = run_against(hub, tmp_path, "launch", "sglang", f"{names[0]}@v1", f"{names[1]}@main", "--print")
        auto = run_against(hub, tmp_path, "launch", "vllm", names[0], "auto", "--print")
        other = run_against(hub, tmp_path, "launch", "vllm", names[0], "google/gemma-4-E4B-it-assistant", "--print")
        sent = hub.sent["model.safetensors"]
    assert vllm.returncode == sglang.returncode == auto.returncode == 0, vllm.stderr + sglang.stderr + auto.stderr
    words = shlex.split(vllm.stdout)
    assert words[2:5] == [names[0], "--revision", "v1"]
    drafting = json.loads(words[-1])
    assert (drafting["model"], drafting["revision"]) == (names[1], "main")
    words = shlex.split(sglang.stdout)
    assert words[3:6] == [names[0], "--revision", "v1"]
    assert words[words.index("--speculative-draft-model-revision") + 1] == "main"
    words = shlex.split(auto.stdout)
    assert words[2] == names[0]
    assert "--revision" not in words
    assert json.loads(words[-1]) == {"method": "mtp", "model": names[1], "num_speculative_tokens": 4}
    assert 0 < sent <= 3 * 2 * 100_000, "more than headers was downloaded"
    assert (other.returncode, other.stdout) == (1, "")
    assert "gemma-4-E4B-it-assistant was published for gemma-4-E4B-it" in other.stderr


def wrong_pairs(pairs: dict[str, tuple[Path, Path]], root: Path) -> Iterator[tuple[tuple[Path, Path], str]]:
    """Pairs that do not fit, and what is said of them."""
    yield (pairs["26B-A4B"][0], pairs["31B"][1]), "was published for gemma-4-31B-it, not for gemma-4-26B-A4B-it"
    mine = root / "mine"
    shutil.copytree(pairs["26B-A4B"][0], mine, copy_function=os.link)  # its weights are a hole
    yield (mine, pairs["31B"][1]), "hidden size is 2816 in the target, the drafter wants 5376"
    yield pairs["E4B"][::-1], "the first folder holds a drafter"
    words = root / "words"
    shutil.copytree(FOLDERS[1], words)
    model = json.loads((words / "tokenizer.json").read_text())["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"]["another"] = model["vocab"].pop(last)
    edit_json(words / "tokenizer.json", model=model | {"merges": model["merges"][:1]})
    yield (FOLDERS[0], words), "the drafter is of another target: token"
    qat = root / "gemma-4-E2B-it-qat-q4_0-unquantized"
    shutil.copytree(pairs["E2B"][0], qat, copy_function=os.link)
    yield (qat, pairs["E2B"][1]), "pass gemma-4-E2B-it-qat-q4_0-unquantized-assistant, or auto"


@BOTH
def test_a_wrong_pair_is_one_line_and_nothing_starts(
    engine: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, engine)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ENGINE_NOTES", str(tmp_path / "notes"))
    for (target, drafter), words in wrong_pairs(pairs, tmp_path):
        done = run(engine, target, drafter)
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert re.fullmatch(rf"error: [^\n]*{re.escape(words)}[^\n]*\n", done.stderr), done.stderr
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize(
    ("engine", "flag"),
    [("vllm", "--port=1"), ("vllm", "--speculative_config"), ("vllm", "--speculative-config.method=ngram"),
     ("vllm", "-sc"), ("vllm", "--spec-tokens"), ("vllm", "--mod"), ("sglang", "--speculative-num-steps"),
     ("sglang", "--host"), ("sglang", "--speculative-algo=NGRAM")],
)  # fmt: skip
def test_flags_that_the_launcher_sets_are_refused(engine: str, flag: str) -> None:
    done = run(engine, *FOLDERS, "--print", "--", "--max-running-requests", "8", flag, "2")
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {re.escape(flag.split('=')[0])} is not passed on to {engine}: .*\n", done.stderr)


def test_flags_need_their_dashes() -> None:
    done = run("vllm", *FOLDERS, "more", "--print")
    assert done.exit_code == 2
    assert "unexpected argument 'more'" in done.stderr


def test_an_engine_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for engine, unified, wanted in (("vllm", False, "0.21.0"), ("vllm", True, "0.23.0"), ("sglang", True, "0.5.15")):
        with pytest.raises(MtpError, match=f"{engine} is not installed; run: pip install '{engine}>={wanted}'"):
            launch.program(ENGINES[engine], unified)
    done = run("sglang", *FOLDERS)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: sglang is not installed; run: pip install 'sglang>=0.5.13'")


@pytest.mark.parametrize(
    ("version", "unified", "runs"),
    [("0.20.2", False, False), ("0.21.0", False, True), ("0.22.1", True, False), ("0.23.0+cu130", True, True),
     ("0.20.2rc1.dev49+g9b4e83934", False, True), ("1.0", True, True)],
)  # fmt: skip
def test_the_engine_must_be_new_enough(
    version: str, unified: bool, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of the developers' own has a number that says little."""
    program = install(tmp_path, "vllm", version)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vllm").symlink_to(program)  # as pipx does it
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    if runs:
        assert launch.program(ENGINES["vllm"], unified) == str(tmp_path / "elsewhere" / "vllm")
        return
    with pytest.raises(MtpError, match=rf"is vllm {version}, which cannot run this drafter; run: pip install"):
        launch.program(ENGINES["vllm"], unified)


def install(root: Path, engine: str, version: str = "99.0") -> Path:
    """The stand-in as an engine's program, in what looks like an environment of its own."""
    program = root / "bin" / engine
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(STANDIN.parent)!r})\n"
        f"import {STANDIN.stem}\n{STANDIN.stem}.main()\n"
    )
    program.chmod(0o755)
    about = root / "lib" / "python3.11" / "site-packages" / f"{engine}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {engine}\nVersion: {version}\n")
    return program


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def gone(number: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.fixture
def launched(tmp_path: Path) -> Started:
    """Starts a launcher whose engine is the stand-in: its process, and the notes of the engine."""
    (tmp_path / "temporary").mkdir()

    @contextmanager
    def start(engine: str, *options: object, does: str = "", code: str = MAIN) -> Iterator[tuple[Popen[str], Path]]:
        install(tmp_path, engine)
        notes = tmp_path / "notes"
        env = environment(
            tmp_path / "cache", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", ENGINE_DOES=does,
            ENGINE_NOTES=str(notes), TMPDIR=str(tmp_path / "temporary"), http_proxy="http://127.0.0.1:9",
        )  # fmt: skip
        command = [sys.executable, "-c", code, "launch", engine, *FOLDERS, *options]
        with started(command, env=env, stdin=DEVNULL, stdout=PIPE, stderr=PIPE) as process:
            try:
                yield process, notes
            finally:
                for number in engine_of(notes) if notes.exists() else ():
                    with suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)

    return start


def engine_of(notes: Path) -> tuple[int, int]:
    """The processes of an engine and its worker."""
    found = json.loads(notes.read_text())
    return found["pid"], found["worker"]


def ask(url: str, path: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError), opener.open(url.removesuffix("/v1") + path, data=b"{}", timeout=60):
        pass


@pytest.mark.parametrize(
    ("engine", "number", "status", "words"),
    [("vllm", signal.SIGINT, 130, "interrupted"), ("sglang", signal.SIGTERM, 143, "terminated"),
     ("vllm", signal.SIGHUP, 129, "hung up")],
)  # fmt: skip
def test_a_whole_life(
    engine: str, number: signal.Signals, status: int, words: str, launched: Started, tmp_path: Path
) -> None:
    port, extra = free_port(), "--max-model-len" if engine == "vllm" else "--tp-size"
    options = ["--port", port, "--draft-length", "2", "--every", "0", "--", extra, "512"]
    with launched(engine, *options) as (process, notes):
        line = said(process.stdout, "/v1")
        assert line == f"http://127.0.0.1:{port}/v1  model {FOLDERS[0]}, drafting 2\n"
        numbers = engine_of(notes)
        argv = json.loads(notes.read_text())["argv"]
        assert argv[-2:] == [extra, "512"]
        assert [engine, *argv] == shlex.split(run(engine, *FOLDERS, "--print", *map(str, options)).stdout)
        for _ in range(3):
            ask(line.split()[0], "/v1/completions")
        code, out, err = ended(process, number)
    assert code == status
    told = "acceptance: 2.40 tokens per pass, 70% of drafted tokens accepted"
    assert out == told + (" (by position 0.80, 0.60)\n" if engine == "vllm" else "\n")
    assert err.split("\n", 1)[1].split() == words.split(), err
    until(lambda: all(map(gone, numbers)))
    assert not list((tmp_path / "temporary").iterdir())


def test_reports_come_from_time_to_time_and_only_what_is_new(launched: Started) -> None:
    with launched("sglang", "--port", free_port(), "--every", "0.05", "--json") as (process, _):
        ready = json.loads(said(process.stdout, "base_url"))
        assert (ready["model"], ready["draft_length"]) == (str(FOLDERS[0]), 4)
        ask(ready["base_url"], "/v1/completions")
        report = json.loads(said(process.stdout, "acceptance"))
        assert report["tokens_per_pass"] == pytest.approx(2.4)
        assert report["acceptance"] == pytest.approx(1.4 / 4)
        assert ended(process, signal.SIGTERM)[:2] == (143, "")


@BOTH
def test_an_engine_that_dies_at_start(engine: str, launched: Started, tmp_path: Path) -> None:
    with launched(engine, "--port", free_port(), does="die") as (process, _):
        status, out, err = ended(process)
    assert (status, out) == (1, "")
    log = next((tmp_path / "temporary").iterdir())
    starting, error = err.splitlines()
    assert starting == f"starting {engine}; its log: {log}"
    assert error.startswith(f"error: {engine} ended with status 1. ")
    assert error.endswith(f"RuntimeError: out of memory: 31 GiB wanted, 24 GiB free; its log: {log}")
    assert log.read_text().startswith("loading weights\n")


def test_the_reason_is_the_first_exception_of_a_log(tmp_path: Path) -> None:
    """What the process says that waited for the one that failed stands at the end, and helps nobody."""
    log = tmp_path / "log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-26 [utils.py:2] a low limit can cause errors like OSError: [Errno 24]\n"
        "(Worker pid=2) ERROR 11-26 [executor.py:9] torch.AcceleratorError: CUDA error: no driver\n"
        "Traceback (most recent call last):\n  raise RuntimeError(\nRuntimeError: initialization failed\n"
    )
    assert launch._end(log) == "torch.AcceleratorError: CUDA error: no driver"
    log.write_text("one\n\ntwo\n")
    assert launch._end(log) == "one / two"


def test_an_engine_that_dies_while_it_serves(launched: Started, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "engine.log"
    with launched("vllm", "--port", free_port(), "--log", log) as (process, notes):
        url = said(process.stdout, "/v1").split()[0]
        numbers = engine_of(notes)
        ask(url, "/crash")
        status, _, err = ended(process)
    assert status == 1
    fault = "error: vllm ended with status 7. loaded / the GPU has fallen off the bus; its log:"
    assert err.splitlines()[-1] == f"{fault} {log}"
    until(lambda: all(map(gone, numbers)))


def test_an_engine_that_never_answers(launched: Started) -> None:
    with launched("vllm", "--port", free_port(), "--timeout", "2", does="silent") as (process, notes):
        status, out, err = ended(process)
        assert (status, out) == (1, "")
        last = r"error: vllm does not answer after 2 seconds; raise --timeout\. (loaded|It said nothing); its log: \S+"
        assert re.fullmatch(last, err.splitlines()[-1])
        if notes.exists():  # it may not have come so far
            until(lambda: all(map(gone, engine_of(notes))))


def test_an_engine_that_does_not_want_to_end(launched: Started) -> None:
    code = "from gemma_mtp.convert import launch; launch.GRACE = 0.2\n" + MAIN
    with launched("vllm", "--port", free_port(), does="stubborn", code=code) as (process, notes):
        said(process.stdout, "/v1")
        assert ended(process, signal.SIGTERM)[0] == 143
        until(lambda: all(map(gone, engine_of(notes))))


def test_a_signal_while_it_loads(launched: Started, tmp_path: Path) -> None:
    with launched("sglang", "--port", free_port(), does="silent") as (process, notes):
        until(lambda: notes.exists() and notes.read_text(), process)
        assert ended(process, signal.SIGTERM)[:2] == (143, "")
        until(lambda: all(map(gone, engine_of(notes))))
    assert not list((tmp_path / "temporary").iterdir())


def test_an_engine_that_wants_a_key(launched: Started) -> None:
    options = ["--port", free_port(), "--", "--api-key", "let-me-in"]
    with launched("vllm", *options) as (process, _):
        url = said(process.stdout, "/v1").split()[0]
        ask(url, "/v1/completions")
        assert "acceptance: 2.40 tokens per pass" in ended(process, signal.SIGTERM)[1]
    assert launch.key_of(ENGINES["vllm"], ["--api_key=a"]) == "a"


def test_a_port_that_is_taken(launched: Started) -> None:
    """Else whoever is there would be taken for the engine."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with launched("vllm", "--port", port) as (process, notes):
            status, out, err = ended(process)
    assert (status, out, notes.exists()) == (1, "", False)
    assert err == f"error: cannot listen at 127.0.0.1:{port} (Address already in use); pass another --port or --host.\n"


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1")])
def test_who_listens_everywhere_is_asked_at_home(host: str, url: str) -> None:
    assert launch.EngineApi(host, 1, None).url == url


def says(text: str | None) -> Callable[[str], str | None]:
    """An engine that answers whatever it is asked with this."""
    return lambda path: text


def test_answers_of_another_shape_are_no_acceptance() -> None:
    for text in (None, "", "# nothing", "vllm:spec_decode_num_drafts_total 0.0\n"):
        assert VLLM().acceptance(says(text), 4) is None
    for text in (None, '{"internal_states": []}', '{"internal_states": [{"avg_spec_accept_length": null}]}'):
        assert SGLang().acceptance(says(text), 4) is None


# What the engines' own sources say.


def source(engine: str) -> Path:
    """The package of an engine: unpacked, where GEMMA_MTP_<ENGINE>_SOURCE says, or installed beside us."""
    variable = f"GEMMA_MTP_{engine.upper()}_SOURCE"
    if named := os.environ.get(variable):
        return Path(named) / engine
    found = find_spec(engine)
    if found is None or found.origin is None:
        pytest.skip(f"{engine} is not installed, and {variable} names no folder with its source")
    return Path(found.origin).parent


def text_of(root: Path, *patterns: str) -> str:
    """All of the Python files that the patterns find, one at least for each."""
    found = [sorted(root.glob(pattern)) for pattern in patterns]
    assert all(found), (root, patterns)
    return "\n".join(path.read_text() for paths in found for path in paths)


def defined(flag: str, text: str) -> bool:
    """Whether an argument parser gets a flag: by its name, or from a field named like it."""
    field = flag.lstrip("-").replace("-", "_")
    return f'"{flag}"' in text or re.search(rf"^    {field}: ", text, re.MULTILINE) is not None


def test_the_flags_and_counters_of_vllm_are_in_its_source() -> None:
    root, engine = source("vllm"), VLLM()
    arguments = text_of(root, "engine/arg_utils.py", "entrypoints/**/cli_args.py")
    newer = {"--spec-method", "--spec-model", "--spec-tokens"}  # since 0.23.0
    wanted = [flag for flag in engine.ours if flag not in newer or "--spec-" + "tokens" in arguments]
    assert [flag for flag in wanted if not defined(flag, arguments)] == []
    drafting = text_of(root, "config/speculative.py")
    job = engines.Job(engines.Model("a", "b"), engines.Model("c", "d"), "e", 1, 2)
    command = engine.command(job)
    assert {word for word in command if word.startswith("--")} <= set(engine.ours)
    keys = json.loads(command[command.index("--speculative-config") + 1])
    assert [key for key in keys if not re.search(rf"^    {key}: ", drafting, re.MULTILINE)] == []
    assert '"gemma4_assistant"' in drafting
    assert '"gemma4_mtp"' in drafting
    assert re.search(rf'method in get_args\(MTPModelTypes\)|"{keys["method"]}"', drafting)
    counters = text_of(root, "v1/spec_decode/metrics.py")
    for name in (engine.drafts, engine.drafted, engine.accepted, engine.at_position):
        assert f'"{name}"' in counters
    served = text_of(root, "entrypoints/**/*.py")
    for path in (engines.HEALTH, engines.MODELS, engine.metrics):
        assert f'"{path}"' in served
    assert engine.key is not None
    assert engine.key in text_of(root, "envs.py")


def test_the_flags_and_paths_of_sglang_are_in_its_source() -> None:
    root, engine = source("sglang"), SGLang()
    arguments = text_of(root, "srt/server_args.py", "srt/arg_groups/**/*.py")
    assert [flag for flag in engine.ours if not defined(flag, arguments)] == []
    command = engine.command(engines.Job(engines.Model("a", "b"), engines.Model("c", "d"), "e", 1, 2))
    assert {word for word in command if word.startswith("--")} <= set(engine.ours)
    algorithm = command[command.index("--speculative-algorithm") + 1]
    assert f'speculative_algorithm == "{algorithm}"' in arguments
    assert "Gemma4AssistantForCausalLM" in arguments
    assert 'return "FROZEN_KV_MTP"' in arguments
    assert "sglang.cli.main:main" in text_of(root.parent, "sglang-*.dist-info/entry_points.txt") or not list(
        root.parent.glob("sglang-*.dist-info")
    )
    assert re.search(r"['\"]serve['\"]", text_of(root, "cli/main.py"))
    served = text_of(root, "srt/entrypoints/http_server.py")
    for path in (engines.HEALTH, engines.MODELS, engine.info):
        assert f'"{path}"' in served
    assert f'"{engine.states}"' in served
    assert f'"{engine.per_pass}"' in text_of(root, "srt/managers/**/*.py")
