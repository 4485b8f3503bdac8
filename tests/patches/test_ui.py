"""The web page of llama-server: built once, from the pinned source, with nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gemma_mtp.patches import ui
from gemma_mtp.patches.source import BuildError, fetch_sdist, upstream

NODE = "#!/bin/sh\necho {version}\n"
# Says what it was called with and where; `run build` makes a page, unless it is told to fail.
NPM = """#!/bin/sh
echo "$* in $PWD: $npm_config_cache" >> {log}
test -f package-lock.json || exit 9
if [ "$1" = run ]; then
    {build}
fi
"""
PAGE = 'mkdir -p "$LLAMA_UI_OUT_DIR" && echo "$LLAMA_BUILD_NUMBER" > "$LLAMA_UI_OUT_DIR/index.html"'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs before all others, and a cache of its own with the pinned sdist in it."""
    kept = fetch_sdist()
    cache = tmp_path / "cache"
    (cache / "sdist").mkdir(parents=True)
    (cache / "sdist" / kept.name).symlink_to(kept)
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(cache))
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def install(programs: Path, version: str = "v20.1.0", build: str = PAGE) -> Path:
    """Node and npm, as scripts; the file where npm writes down its calls."""
    log = programs.parent / "calls"
    for name, text in (("node", NODE.format(version=version)), ("npm", NPM.format(log=log, build=build))):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return log


def test_it_is_built_once(programs: Path) -> None:
    log = install(programs)
    assert ui.built_ui() is None
    folder = ui.build_ui()
    assert (folder / "index.html").read_text().strip() == upstream().llama_cpp
    calls = log.read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["ci", "run"]
    assert all(str(programs.parent / "cache" / "ui") in call.rpartition(": ")[2] for call in calls)
    assert ui.build_ui() == folder == ui.built_ui()
    assert len(log.read_text().splitlines()) == 2
    assert list((programs.parent / "cache" / "ui").iterdir()) == [folder]


@pytest.mark.parametrize(
    ("version", "build", "words"),
    [("v18.3.1", PAGE, "Node 20 or later, and .* is v18.3.1"), ("v20.0.0", "exit 3", "status 3"),
     ("v20.0.0", "true", "made no index.html")],
)  # fmt: skip
def test_what_goes_wrong_leaves_nothing(version: str, build: str, words: str, programs: Path) -> None:
    install(programs, version, build)
    with pytest.raises(BuildError, match=words):
        ui.build_ui()
    assert ui.built_ui() is None
    assert not list((programs.parent / "cache").glob("ui/*"))


def test_without_node(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(BuildError, match=r"node is not there; install it from https://nodejs\.org"):
        ui.build_ui()
    (programs / "node").write_text(NODE.format(version="v20.0.0"))
    (programs / "node").chmod(0o755)
    with pytest.raises(BuildError, match="npm is not there"):
        ui.build_ui()
