"""Our llama-server in front of an installed Ollama's: on installations made of scripts, and on a real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import alone, said, started
from gemma_mtp.convert.gguf_io.write import entry, header
from gemma_mtp.convert.ollama import dispatch, installation, probe
from gemma_mtp.convert.ollama.installation import our_engine
from ollama_standin import ANSWERS, Standin
from ollamas import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the dispatcher is for Linux's Ollama")

# Says who it is, then its arguments and what it finds around it, each ended by a NUL; what it is told to do beyond that
# stands in a file beside it.
SERVER = """#!/bin/sh
case $1 in
--help) echo 'usage: {flags}'; exit ;;
--version) echo 'version: of {name}' >&2; exit ;;
--list-devices) [ ! -e "${{0%/*}}/list" ] || . "${{0%/*}}/list"; exit ;;
esac
printf '%s\\0' {name} "$LD_LIBRARY_PATH" "$GGML_BACKEND_PATH" "$$" "$@"
if [ -e "${{0%/*}}/act" ]; then . "${{0%/*}}/act"; fi
"""
RECORDED: list[str] = json.loads(ANSWERS.read_text())["server"]


def script(path: Path, name: str, flags: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SERVER.format(name=name, flags=flags))
    path.chmod(0o755)


def gguf(path: Path, *keys: tuple[str, str]) -> Path:
    """The head of a GGUF file."""
    path.write_bytes(header([entry(*key) for key in keys], []))
    return path


@dataclass(frozen=True)
class Ran:
    """What a llama-server saw."""

    name: str
    libraries: str
    backend: str
    pid: int
    arguments: list[str]


@dataclass(frozen=True)
class Fake:
    """An Ollama made of scripts, ours beside it, and a pair of which there are only heads."""

    home: Path

    @property
    def library(self) -> Path:
        return self.home / "prefix" / "lib" / "ollama"

    @property
    def server(self) -> Path:
        return self.library / "llama-server"

    @property
    def engine(self) -> Path:
        """Our folder, installed."""
        (found,) = (self.library / "gemma-mtp").iterdir()
        return found

    def command(self, *more: str, target: Path | None = None, drafter: Path | None = None) -> list[str]:
        """The command line that a real Ollama gave, with this pair in it."""
        line = [str(self.server), *RECORDED[1:], *more]
        line[line.index("--model") + 1] = str(target or self.home / "target.gguf")
        line[line.index("--spec-draft-model") + 1] = str(drafter or self.home / "drafter.gguf")
        return line

    def ran(self, command: list[str], **around: str) -> Ran:
        env = {**os.environ, "LD_LIBRARY_PATH": str(self.library), **around}
        done = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
        name, libraries, backend, pid, *arguments, _ = done.stdout.split("\0")
        return Ran(name, libraries, backend, int(pid), arguments)

    def do(self, *words: str) -> str:
        done = run("ollama", "engine", *words, "--ollama", self.home / "prefix")
        assert done.exit_code == 0, done.output
        return done.stdout

    def tree(self) -> dict[str, object]:
        """All of the installation: names, modes, times of the files, and their bytes."""
        found: dict[str, object] = {}
        for path in sorted((self.home / "prefix").rglob("*")):
            about = path.lstat()
            content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path)] = (about.st_mode, about.st_mtime_ns if path.is_file() else 0, content)
        return found


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake(tmp_path)
    script(tmp_path / "prefix" / "bin" / "ollama", "ollama")
    script(found.server, "original")
    os.utime(found.server, ns=(10**18, 10**18 + 7))
    found.server.chmod(0o751)
    (found.library / "libggml-cpu-haswell.so").write_bytes(b"")
    (found.library / "cuda_v12").mkdir()
    (found.library / "cuda_v12" / "libggml-cuda.so").write_bytes(b"")
    ours = tmp_path / "ours"
    script(ours / "llama-server", "ours", " ".join(word for word in RECORDED if word.startswith("-")) + " -ngl --lora")
    script(ours / "llama-quantize", "quantize")
    (ours / "libllama.so").write_bytes(b"... llama_mtp_draft ...")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(ours))
    named = ("general.architecture", "gemma4"), ("tokenizer.ggml.model", "gemma4")
    gguf(tmp_path / "target.gguf", *named)
    gguf(tmp_path / "drafter.gguf", ("general.architecture", "gemma4-assistant"))
    return found


def test_a_pair_runs_on_ours_and_all_else_on_the_original(fake: Fake) -> None:
    said = fake.do("install")
    assert "gemma-mtp's for Gemma 4 with drafts" in said
    ran = fake.ran(fake.command())
    assert (ran.name, ran.backend) == ("ours", "")
    assert ran.libraries == f"{fake.engine}:{fake.library}"  # Ollama's own folder has libraries of the same names
    plain = fake.command()
    at = plain.index("--spec-type")
    del plain[at : plain.index("--spec-draft-model") + 2]
    ran = fake.ran(plain)
    assert (ran.name, ran.libraries) == ("original", str(fake.library))
    assert ran.arguments == plain[1:]
    discovery = [str(fake.server), "--port", "1", "--host", "127.0.0.1", "--no-webui", "--offline", "--verbose"]
    assert fake.ran(discovery).name == "original"


@pytest.mark.parametrize("name", ["ours", "original"])
def test_arguments_arrive_as_they_were(fake: Fake, name: str) -> None:
    fake.do("install")
    odd = ["", "a b", "it's", '"quoted"', "$HOME", "*", "\\", "`id`", "a\nb", "-1", " ", "ä"]
    command = [*fake.command("-ngl", "0" if name == "ours" else "7"), *odd]
    ran = fake.ran(command)
    assert ran.name == name
    assert ran.arguments == command[1:]


def with_gpu_library(fake: Fake) -> None:
    (fake.library / "libggml-cuda.so").write_bytes(b"")


def without_engine(fake: Fake) -> None:
    shutil.rmtree(fake.engine)


def with_a_broken_engine(fake: Fake) -> None:
    (fake.engine / "list").write_text("echo error while loading shared libraries: libllama.so >&2; exit 127")


def with_an_engine_for_another_cpu(fake: Fake) -> None:
    (fake.engine / "list").write_text("echo this libggml-cpu was built for a CPU with amx, which this CPU lacks >&2")


def with_an_engine_that_may_not_run(fake: Fake) -> None:
    (fake.engine / "llama-server").chmod(0o644)


@pytest.mark.parametrize(
    "change",
    [with_gpu_library, without_engine, with_a_broken_engine, with_an_engine_for_another_cpu,
     with_an_engine_that_may_not_run],
)  # fmt: skip
def test_where_ours_cannot_run_the_original_does(fake: Fake, change: Callable[[Fake], None]) -> None:
    fake.do("install")
    assert fake.ran(fake.command()).name == "ours"
    change(fake)
    command = fake.command()
    ran = fake.ran(command)
    assert (ran.name, ran.arguments, ran.libraries) == ("original", command[1:], str(fake.library))


def test_an_engine_that_is_gone_is_told_and_comes_back(fake: Fake) -> None:
    fake.do("install")
    without_engine(fake)
    assert "ours is gone" in fake.do("status")
    fake.do("install")
    assert fake.ran(fake.command()).name == "ours"


def test_gpus_and_flags_of_a_later_ollama_are_the_originals(fake: Fake) -> None:
    fake.do("install")
    assert fake.ran(fake.command(), GGML_BACKEND_PATH="/x/libggml-cuda.so").name == "original"
    assert fake.ran(fake.command("-ngl", "99")).name == "original"
    assert fake.ran(fake.command("-ngl", "0")).name == "ours"
    assert fake.ran(fake.command("--lora", "x")).name == "ours"
    assert fake.ran(fake.command("--from-the-future")).name == "original"
    assert fake.ran(fake.command("-zz")).name == "original"


USUAL = {"general.architecture": "gemma4", "tokenizer.ggml.model": "gemma4"}
LONG = {"general.description": "x" * 70_000}


@pytest.mark.parametrize(
    ("target", "drafter", "wanted"),
    [
        (USUAL, "gemma4-assistant", "ours"),
        ({"gemma4.x": "y", **USUAL}, "gemma4-assistant", "ours"),
        ({**USUAL, **LONG}, "gemma4-assistant", "ours"),
        ({**USUAL, "general.architecture": "llama"}, "gemma4-assistant", "original"),
        ({**USUAL, "general.architecture": "gemma4x"}, "gemma4-assistant", "original"),
        ({**USUAL, "general.architecture": "gemma3"}, "gemma4-assistant", "original"),
        ({"general.architecture": "llama", "general.name": "gemma4"}, "gemma4-assistant", "original"),
        (USUAL, "dflash", "original"),
        (USUAL, "gemma4", "original"),
        (USUAL, "gemma4-assistant2", "original"),
        ({**LONG, **USUAL}, "gemma4-assistant", "original"),
        ({**USUAL, "tokenizer.ggml.model": "llama"}, "gemma4-assistant", "original"),
        ({"general.architecture": "gemma4"}, "gemma4-assistant", "original"),
    ],
)  # fmt: skip
def test_architectures(fake: Fake, tmp_path: Path, target: dict[str, str], drafter: str, wanted: str) -> None:
    fake.do("install")
    first = gguf(tmp_path / "a file of 'mine'.gguf", *target.items())
    second = gguf(tmp_path / "-d $x.gguf", ("general.architecture", drafter))
    assert fake.ran(fake.command(target=first, drafter=second)).name == wanted


def test_files_that_are_none_are_the_originals(fake: Fake, tmp_path: Path) -> None:
    fake.do("install")
    (tmp_path / "short").write_bytes(b"GGUF")
    for path in (tmp_path / "absent", tmp_path / "short", tmp_path):
        assert fake.ran(fake.command(target=path)).name == "original"
        assert fake.ran(fake.command(drafter=path)).name == "original"


def test_files_of_ollamas_library_are_ours_where_we_read_them(fake: Fake, tmp_path: Path) -> None:
    """One file with all encoders, and another name of the tokenizer."""
    path = gguf(tmp_path / "pulled.gguf", ("general.architecture", "gemma4"), ("tokenizer.ggml.model", "llama"))
    fake.do("install")
    assert fake.ran(fake.command(target=path)).name == "original"
    with (tmp_path / "ours" / "libllama.so").open("ab") as file:
        file.write(installation.LIBRARY_KEY)
    fake.do("install")
    assert fake.ran(fake.command(target=path)).name == "ours"


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("links", ["links", "no links"])
def test_removed_it_is_as_it_was(fake: Fake, monkeypatch: pytest.MonkeyPatch, linked: bool, links: str) -> None:
    if linked:  # as some distributions lay it out
        fake.server.rename(fake.home / "real-server")
        fake.server.symlink_to(fake.home / "real-server")
    if links == "no links":  # a file system without them, or a file of another user

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    before = fake.tree()
    fake.do("install")
    assert fake.ran([str(fake.server), "x"]).name == "original"
    fake.do("install")
    assert fake.do("remove").startswith("Ollama ")
    assert fake.tree() == before
    fake.do("remove")
    assert fake.tree() == before


def test_ours_is_readable_by_the_service(fake: Fake) -> None:
    old = os.umask(0o077)
    try:
        fake.do("install")
    finally:
        os.umask(old)
    for path in (fake.server, *(fake.library / "gemma-mtp").rglob("*"), fake.library / "gemma-mtp"):
        wanted = 0o755 if path.is_dir() or path.name in ("llama-server", "llama-quantize") else 0o644
        assert path.stat().st_mode & 0o777 == wanted, path
    # Ollama takes such a file for a GPU's library (discover/runner.go).
    assert [path.parent.name for path in fake.library.glob("*/*ggml-*")] == ["cuda_v12"]


def overwritten(fake: Fake) -> None:
    """As tar and cp write over what is there."""
    fake.server.unlink()
    script(fake.server, "newer")


def laid_out_anew(fake: Fake) -> None:
    """As Ollama's install script does it."""
    shutil.rmtree(fake.library)
    script(fake.server, "newer")


@pytest.mark.parametrize("update", [overwritten, laid_out_anew])
def test_an_update_takes_it_away_and_it_can_be_installed_again(fake: Fake, update: Callable[[Fake], None]) -> None:
    fake.do("install")
    update(fake)
    assert fake.ran(fake.command()).name == "newer"
    assert "Ollama's own" in fake.do("status")
    if update is overwritten:
        assert "since an update" in fake.do("status")
    fake.do("install")
    assert fake.ran(fake.command()).name == "ours"
    assert fake.ran([str(fake.server), "x"]).name == "newer"
    fake.do("remove")
    assert "newer" in fake.server.read_text()
    fake.do("install")
    update(fake)
    fake.do("remove")  # the old original is not put over the new one
    assert fake.ran(fake.command()).name == "newer"
    assert not [path for path in fake.library.iterdir() if "original" in path.name or path.name == "gemma-mtp"]


def test_another_build_of_ours_takes_the_place_of_the_old_one(fake: Fake) -> None:
    fake.do("install")
    before = fake.engine
    with (fake.home / "ours" / "libllama.so").open("ab") as file:
        file.write(b"newer")
    assert "is another build: gemma-mtp ollama engine install" in fake.do("status")
    assert fake.ran(fake.command()).name == "ours"
    fake.do("install")
    assert fake.engine != before
    assert "another build" not in fake.do("status")
    assert fake.ran(fake.command()).libraries.startswith(f"{fake.engine}:")


@pytest.mark.parametrize("step", ["start", "copy", "put"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("links", ["links", "no links"])
def test_what_fails_leaves_nothing(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, step: str, again: bool, links: str
) -> None:
    if again:
        fake.do("install")
        with (fake.home / "ours" / "libllama.so").open("ab") as file:
            file.write(b"newer")
    before = fake.tree()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "start":
        (fake.home / "ours" / "llama-server").write_text("#!/bin/sh\necho cannot open libllama.so >&2\nexit 127\n")
    elif step == "copy":
        monkeypatch.setattr(shutil, "copy", fail)
    else:
        replace = Path.replace
        monkeypatch.setattr(
            Path, "replace", lambda old, new: fail() if old.parent.name == "gemma-mtp" else replace(old, new)
        )
    if links == "no links":
        monkeypatch.setattr(os, "link", fail)
    done = run("ollama", "engine", "install", "--ollama", fake.home / "prefix")
    assert done.exit_code == 1
    if step == "start":
        assert "does not start (cannot open libllama.so); run: gemma-mtp build" in done.stderr
    monkeypatch.undo()
    assert fake.ran(fake.command()).name == ("ours" if again else "original")
    assert fake.tree() == before


def test_a_place_of_others_is_one_line(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fake.tree()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for word in ("install", "remove"):
        done = run("ollama", "engine", word, "--ollama", fake.home / "prefix")
        assert done.exit_code == 1
        assert f"{fake.library} is not this user's to change; run: sudo " in done.stderr
        assert done.stderr.count("\n") == 1
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = run("ollama", "engine", "install", "--ollama", fake.home / "prefix")
    assert "is read-only; use gemma-mtp ollama serve" in done.stderr
    assert fake.tree() == before


def test_without_its_original_nothing_is_changed(fake: Fake) -> None:
    fake.do("install")
    (fake.library / dispatch.ORIGINAL).unlink()
    before = fake.tree()
    for word in ("install", "remove"):
        done = run("ollama", "engine", word, "--ollama", fake.home / "prefix")
        assert done.exit_code == 1
        assert "install Ollama again" in done.stderr
    assert fake.tree() == before


def test_without_ours_or_without_ollama(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (fake.home / "ours" / "libllama.so").write_bytes(b"of somebody else")
    done = run("ollama", "engine", "install", "--ollama", fake.home / "prefix")
    assert "run: gemma-mtp build" in done.stderr
    done = run("ollama", "engine", "install", "--ollama", tmp_path / "absent")
    assert "is not there, or no program" in done.stderr
    (tmp_path / "old" / "bin").mkdir(parents=True)
    shutil.copy(fake.home / "prefix" / "bin" / "ollama", tmp_path / "old" / "bin")
    done = run("ollama", "engine", "status", "--ollama", tmp_path / "old")
    assert "has no llama-server in" in done.stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation, "PROGRAMS", ())
    assert "ollama is not installed here" in run("ollama", "engine", "status").stderr


def test_the_program_on_the_path_is_followed_through_links(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    place = fake.home / "somewhere"
    place.mkdir()
    (place / "ollama").symlink_to(fake.home / "prefix" / "bin" / "ollama")
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    assert run("ollama", "engine", "install").exit_code == 0
    assert fake.ran(fake.command()).name == "ours"
    told = json.loads(run("ollama", "engine", "status", "--json").stdout)
    assert (told["installed"], told["current"], told["engine"]) == (True, True, str(fake.engine))


@pytest.mark.parametrize(
    ("does", "wanted"), [("kill -ILL $$", ["ends with an illegal instruction on this CPU"]), ("", ["does not load"])]
)
def test_the_doctor_tells_of_the_engine(
    fake: Fake, standin: Standin, tmp_path: Path, does: str, wanted: list[str]
) -> None:
    """`standin` is the program on the PATH, and has no engine; then it is given one."""
    assert "\nengine" not in run("ollama", "doctor").stdout
    shutil.copytree(fake.library, tmp_path / "lib" / "ollama")
    server = tmp_path / "lib" / "ollama" / "llama-server"
    server.write_text(f"#!/bin/sh\n{does}\n")
    found = run("ollama", "doctor").stdout
    assert "engine    Ollama's own; ours for Gemma 4 with drafts: gemma-mtp ollama engine install\n" in found
    told = json.loads(run("ollama", "doctor", "--json").stdout)
    for each in wanted:
        assert f"problem   Ollama's own llama-server {each}" in found
        assert each in told["problems"][0]
    assert run("ollama", "engine", "install").exit_code == 0
    assert "engine    gemma-mtp's for Gemma 4 with drafts" in run("ollama", "doctor").stdout


def test_many_at_once(fake: Fake) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda _: dispatch.install(installation.installation(fake.home / "prefix"), our_engine()), range(4)
            )
        )
        names = list(pool.map(lambda place: fake.ran(fake.command("-ngl", str(place % 2))).name, range(8)))
    assert names == ["ours", "original"] * 4
    fake.do("remove")
    assert fake.ran(fake.command()).name == "original"


@pytest.mark.parametrize("name", ["ours", "original"])
def test_it_becomes_the_server(fake: Fake, name: str) -> None:
    """Ollama ends by SIGKILL what it started; status and other signals are the server's own."""
    fake.do("install")
    command = fake.command("-ngl", "0" if name == "ours" else "1")
    act = (fake.engine if name == "ours" else fake.library) / "act"
    act.write_text("exit 7")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 7
    act.write_text("trap 'echo caught; exit 3' TERM; echo; echo ready; while :; do read line || exit 0; done")
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 3)):
        with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            line = said(process.stdout, name)
            assert line.split("\0")[3] == str(process.pid)
            said(process.stdout, "ready")
            process.send_signal(number)
            assert process.wait() == status
            assert alone(process)


def test_an_engine_that_generates_has_no_fault() -> None:
    assert probe.fault(our_engine().server) is None


@pytest.mark.parametrize(
    ("does", "wanted"),
    [
        ("kill -ILL $$", "illegal instruction"), ("kill -SEGV $$", "SIGSEGV"),
        ("echo no such model; exit 1", "no such model"), ("exit 0", "does not load a tiny model"),
    ],
)  # fmt: skip
def test_an_engine_that_ends_on_this_cpu_is_told(fake: Fake, does: str, wanted: str) -> None:
    fake.server.write_text(f"#!/bin/sh\n{does}\n")
    said = fake.do("status")
    assert wanted in said.splitlines()[-1]
    fake.do("install")
    assert wanted in json.loads(fake.do("status", "--json"))["original_fault"]
