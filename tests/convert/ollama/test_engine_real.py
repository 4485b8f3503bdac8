"""A real Ollama on our engine: with ours in front of its own, in a copy of it, and from the cache folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import until
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.convert.ollama import trial
from gemma_mtp.convert.ollama.api import LOADING, Client
from gemma_mtp.convert.ollama.dispatch import ORIGINAL
from gemma_mtp.convert.ollama.installation import installation, running_program
from gemma_mtp.convert.ollama.store import stored
from ollamas import Ollama, run
from tiny import PAIR

pytestmark = pytest.mark.ollama
FOLDERS = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"


@pytest.fixture
def program(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the real one, with what it needs on the CPU and room for two models at once."""
    found = installation(program)
    copied = tmp_path / "prefix" / "bin" / "ollama"
    library = tmp_path / "prefix" / "lib" / "ollama"
    library.mkdir(parents=True)
    copied.parent.mkdir()
    shutil.copy2(found.program, copied)
    for path in found.engine.folder.iterdir():
        if path.is_file():
            shutil.copy2(path, library, follow_symlinks=False)
    monkeypatch.setenv("OLLAMA_MAX_LOADED_MODELS", "2")
    return copied


@pytest.fixture
def other(tmp_path: Path) -> Pair:
    """A pair of which the target alone will be used."""
    return convert_pair(*FOLDERS, tmp_path / "other", "Q8_0", "Q4_0")


def answers(api: Client, name: str, **options: Any) -> bool:
    """Whether a model does."""
    body = {"model": name, "prompt": "import os", "stream": False, "options": {"num_predict": 24, **options}}
    return bool(api.post("/api/generate", body, LOADING)["response"])


def engine_of(api: Client, name: str) -> Path:
    """The llama-server that has a model loaded."""
    return Path(next(trial.servers(stored(api, name)))[0])


def processes(library: Path) -> list[int]:
    """Those whose program lies in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/exe"):
        try:
            if path.readlink().is_relative_to(library):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def live(program: Path, real: None, demo: Pair, other: Pair, tmp_path: Path) -> Ollama:
    """A running copy with a pair and a model without drafter."""
    ollama = Ollama(Client(), tmp_path)
    assert run("ollama", "create", "pair", demo.target.parent).exit_code == 0
    ollama.bare("plain", other.target)
    unload(ollama.api)
    return ollama


def unload(api: Client) -> None:
    for name in ("pair", "plain"):
        api.post("/api/generate", {"model": name, "keep_alive": 0})
    until(lambda: not api.get("/api/ps").get("models"))


def test_the_pair_is_ours_and_the_plain_model_the_originals(live: Ollama, program: Path) -> None:
    api, library = live.api, program.parents[1] / "lib" / "ollama"
    before = contents(program.parents[1])
    assert run("ollama", "engine", "install", "--ollama", program).exit_code == 0
    assert answers(api, "pair")
    assert answers(api, "plain")
    ours = engine_of(api, "pair")
    assert ours.is_relative_to(library / "gemma-mtp")
    assert engine_of(api, "plain") == library / ORIGINAL  # both loaded at once
    assert running_program(api.url) == program
    said = run("ollama", "doctor", "pair").stdout
    assert "gemma-mtp's" in said
    assert "drafts on, up to 4 a round" in said
    (pid,) = processes(library / "gemma-mtp")
    os.kill(pid, signal.SIGKILL)  # as Ollama's scheduler ends it
    until(lambda: not processes(library / "gemma-mtp"))
    assert answers(api, "pair")
    assert len(processes(library)) == 2
    assert answers(api, "pair", draft_num_predict=0)
    assert engine_of(api, "pair") == library / ORIGINAL
    unload(api)
    until(lambda: not processes(library))
    assert run("ollama", "engine", "remove", "--ollama", program).exit_code == 0
    assert contents(program.parents[1]) == before
    assert answers(api, "pair")
    assert engine_of(api, "pair") == library / "llama-server"


def updated(library: Path, kept: Path) -> None:
    """Ollama's files again over what is there."""
    for path in kept.iterdir():
        (library / path.name).unlink()
        shutil.copy2(path, library, follow_symlinks=False)


def cleared(library: Path, kept: Path) -> None:
    """Ollama's files in a folder that is made anew."""
    shutil.rmtree(library)
    shutil.copytree(kept, library, symlinks=True)


@pytest.mark.parametrize("update", [updated, cleared])
def test_an_update_and_an_engine_that_is_gone(
    live: Ollama, program: Path, tmp_path: Path, update: Callable[[Path, Path], None]
) -> None:
    api, library = live.api, program.parents[1] / "lib" / "ollama"
    shutil.copytree(library, tmp_path / "kept", symlinks=True)
    assert run("ollama", "engine", "install", "--ollama", program).exit_code == 0
    assert answers(api, "pair")
    shutil.rmtree(library / "gemma-mtp")
    unload(api)
    assert answers(api, "pair")
    assert engine_of(api, "pair") == library / ORIGINAL
    unload(api)
    update(library, tmp_path / "kept")
    assert answers(api, "pair")
    assert engine_of(api, "pair") == library / "llama-server"
    assert run("ollama", "engine", "install", "--ollama", program).exit_code == 0
    unload(api)
    assert answers(api, "pair")
    assert engine_of(api, "pair").is_relative_to(library / "gemma-mtp")


def test_serve(program: Path, around: str, demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(program.parents[1])
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path / "cache"))
    done = run("ollama", "serve", "-d", "--ollama", program)
    assert done.exit_code == 0, done.stderr
    try:
        assert f"at http://{around}" in done.stdout
        assert f"models of {tmp_path / 'store'}" in done.stdout
        created = run("ollama", "create", "pair", demo.target.parent, "--json")
        assert created.exit_code == 0, created.stderr
        tried = json.loads(created.stdout)["trial"]
        assert tried["drafting"]
        assert Path(tried["engine"]).is_relative_to(tmp_path / "cache" / "ollama")
        assert "gemma-mtp's" in run("ollama", "doctor", "pair").stdout
    finally:
        assert run("ollama", "serve", "--stop").exit_code == 0
    assert not processes(tmp_path / "cache")
    assert contents(program.parents[1]) == before
