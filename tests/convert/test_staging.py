"""Files that appear together: replaced all or none, whatever fails and whenever the process is killed."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.staging import PREFIX, clean_up, staging

NAMES = ("Modelfile", "drafter.gguf", "target.gguf")


def put(out: Path, content: str, names: tuple[str, ...] = NAMES, force: bool = True) -> None:
    with staging(out, names, 100, force) as hidden:
        for name in names:
            (hidden / name).write_text(content)


def held(out: Path) -> dict[str, str]:
    """What the folder holds, hidden folders left out."""
    return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}


OLD, NEW = (dict.fromkeys(NAMES, content) for content in ("old", "new"))
KINDS = {"all there": OLD, "one there": {"drafter.gguf": "old"}, "none there": {}}


@pytest.fixture(params=KINDS)
def before(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """What lies in the folder `out` before: all, one or none of the files, and one that is the user's."""
    there = {**KINDS[request.param], "notes.txt": "mine"}
    (tmp_path / "out").mkdir()
    for name, content in there.items():
        (tmp_path / "out" / name).write_text(content)
    return there


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_a_move_that_fails_leaves_all_as_it_was(
    links: bool, before: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the moves fails in turn, once."""
    out, real = tmp_path / "out", Path.replace
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    failed = 0
    while True:
        calls = iter(range(1000))

        def move(path: Path, wanted: Path, calls: Any = calls, last: int = failed) -> Path:
            if next(calls) == last:
                raise OSError(errno.EIO, "Input/output error")
            return real(path, wanted)

        monkeypatch.setattr(Path, "replace", move)
        try:
            put(out, "new")
        except MtpError as problem:
            assert str(problem).startswith(f"cannot write into {out}: Input/output error")
            assert held(out) == before
            assert len(list(out.iterdir())) == len(before)
            failed += 1
        else:
            break
    assert failed > len(NAMES)
    assert held(out) == NEW | {"notes.txt": "mine"}
    assert len(list(out.iterdir())) == 4


def refuse(*arguments: Any, **named: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_one_file_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows where a program has it open."""
    out, real = tmp_path / "out", Path.replace
    put(out, "old")

    def move(path: Path, wanted: Path) -> Path:
        if wanted == out / "target.gguf":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, wanted)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(MtpError, match="not all old files could be put back"):
        put(out, "new")
    monkeypatch.undo()
    put(out, "other", ("more.gguf",))  # the next one completes what was begun
    assert held(out) == NEW | {"more.gguf": "other"}
    assert len(list(out.iterdir())) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_each_move(before: dict[str, str], tmp_path: Path) -> None:
    """The next one finds all old files, or brings all new ones; what is the user's stays."""
    out, ends = tmp_path / "out", set()
    for last in range(100):
        for path in out.glob("*.*"):
            path.unlink(missing_ok=True) if path.is_file() else None
        (out / "Modelfile").unlink(missing_ok=True)
        for name, content in before.items():
            (out / name).write_text(content)
        child = os.fork()
        if child == 0:
            killed_at(out, last)
        status = os.waitpid(child, 0)[1]
        names = {path.name for path in out.iterdir()}
        assert all(name in names for name in before), "a name that was there is gone"
        clean_up(out)
        assert held(out) in (before, NEW | {"notes.txt": "mine"})
        assert not list(out.glob(f"{PREFIX}*"))
        ends.add(held(out) == before)
        if status == 0:
            break
    assert os.waitstatus_to_exitcode(status) == 0
    assert last > len(NAMES)
    assert ends == {True, False}


def killed_at(out: Path, last: int) -> None:
    """In a child: put the new files, and be killed before one of the calls that change a folder."""
    calls = iter(range(1000))

    def counted(call: Any) -> Any:
        def counting(*arguments: Any, **named: Any) -> Any:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counting

    for name in ("mkdir", "rename", "replace", "link", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    put(out, "new")
    os._exit(0)


@pytest.mark.parametrize("number", ["ENOTSUP", "ENOLCK", "EINVAL", "ENOSYS", "EBADF"])
def test_a_file_system_without_locks(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cleaned up there: another process may be at work."""
    fcntl = pytest.importorskip("fcntl")

    def fail(*arguments: Any) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", fail)
    left = tmp_path / "out" / f"{PREFIX}left"
    left.mkdir(parents=True)
    put(tmp_path / "out", "new", force=False)
    assert held(tmp_path / "out") == NEW
    assert left.is_dir()
    assert len(list((tmp_path / "out").glob(f"{PREFIX}*"))) == 1


def test_another_cleaned_up_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder that another process took for a dead one's, before it was locked."""
    fcntl = pytest.importorskip("fcntl")
    real, calls = fcntl.flock, iter(range(1000))

    def late(*arguments: Any) -> None:
        if next(calls) == 0:
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    put(tmp_path / "out", "new", force=False)
    assert held(tmp_path / "out") == NEW


def test_a_folder_in_the_place_of_a_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out" / "target.gguf").mkdir(parents=True)
    with pytest.raises(MtpError, match=r"target\.gguf is a folder"):
        put(tmp_path / "out", "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target.gguf"]


def test_what_is_no_fault_of_writing_stays_what_it_is(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="elsewhere"),
        staging(tmp_path / "out", NAMES, 1, False),
    ):
        raise OSError(errno.EIO, "elsewhere")
    assert not (tmp_path / "out").exists()
