"""Files that appear together when all are complete, and of which nothing is left when anything goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.files import WriteError

PREFIX = ".gemma-mtp-"
# The end of a hidden folder's name once all its files are complete: what is left then only has to be moved.
COMPLETE = ".complete"
# Within a hidden folder: the files that are being replaced.
ASIDE = ".replaced"
# Windows has no lock that ends with the process; there nothing is cleaned up.
LOCKS = os.name == "posix"
# Whether a link can get a second name itself, and not what it leads to.
LINKS = os.link in os.supports_follow_symlinks
FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}


@contextmanager
def staging(folder: Path, names: Sequence[str], n_bytes: int, force: bool) -> Iterator[Path]:
    """A hidden folder whose files move to `folder` at the end, or are gone again if anything goes wrong.

    Files of the same names are replaced all or none. A process that is killed leaves its hidden folder behind; the next
    one to write there completes it if all files were whole and only some of them moved, and removes it otherwise. Where
    the file system has no locks it cannot be told who still works, and nothing is cleaned up.

    Args:
        folder: where the files appear; made if it is not there.
        names: the files.
        n_bytes: what they need together, about.
        force: replace files of the same names.

    Raises:
        MtpError: one of the files is there already, or the folder cannot be written or is full.
    """
    made: list[Path] = []
    try:
        with ExitStack() as held:
            with _telling(folder, n_bytes):
                clean_up(folder)
                _refuse_existing(folder, names, force)
                made = _make(folder)
                free = shutil.disk_usage(folder).free
                if free < n_bytes:
                    raise MtpError(
                        f"{folder}: {n_bytes:,} bytes to write, {free:,} free; make room or choose another folder."
                    )
                hidden = _hidden(folder, held)
            try:
                yield hidden
            except WriteError as problem:  # any other fault is not the folder's
                raise _cannot_write(folder, problem, n_bytes) from None
            with _telling(folder, n_bytes):
                _move(hidden, folder)
        made = []
    finally:
        for each in made:
            with suppress(OSError):  # not empty, or gone
                each.rmdir()


def _refuse_existing(folder: Path, names: Sequence[str], force: bool) -> None:
    there = [name for name in names if os.path.lexists(folder / name)]
    if there and not force:
        raise MtpError(f"{folder} already holds {', '.join(there)}; choose another folder, or pass --force to replace.")
    if folders := [name for name in there if not _is_file(folder / name)]:
        raise MtpError(f"{folder / folders[0]} is a folder, where a file is to be written; choose another folder.")


def _is_file(path: Path) -> bool:
    """Whether something of that name can be replaced: it is there, and no folder, but maybe a link to one."""
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir())


@contextmanager
def _telling(folder: Path, n_bytes: int) -> Iterator[None]:
    """What is done to the folder itself, and what then keeps it from being written."""
    try:
        yield
    except OSError as problem:
        raise _cannot_write(folder, problem, n_bytes) from None


def _cannot_write(folder: Path, problem: OSError, n_bytes: int) -> MtpError:
    if problem.errno == errno.ENAMETOOLONG:
        return MtpError(f"cannot write into {folder}: {problem.strerror}; pass a shorter --name or another folder.")
    need = f"{n_bytes:,} bytes are needed; " if problem.errno in FULL else ""
    return MtpError(f"cannot write into {folder}: {problem.strerror}; {need}make room or choose another folder.")


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; the new ones, innermost first."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new


def _hidden(folder: Path, held: ExitStack) -> Path:
    """A new hidden folder, locked where that can be done; when `held` is closed it is removed, if it is still there."""
    for _ in range(10):
        hidden = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            opened = _lock(hidden)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process, which cleans up, was quicker
        if opened is not None:
            held.callback(os.close, opened)
        if hidden.exists():
            break
    held.callback(shutil.rmtree, hidden, ignore_errors=True)
    return hidden


def _move(hidden: Path, folder: Path) -> None:
    """Move all files of a hidden folder to their places, or, where one of them cannot be moved, none.

    Whoever is killed meanwhile leaves a folder that the next one completes.
    """
    complete = hidden.replace(hidden.with_name(hidden.name + COMPLETE))
    moved: list[str] = []
    try:
        _move_in(complete, folder, moved)
    except OSError as problem:
        try:
            _move_back(complete, folder, moved)
            complete.replace(hidden)  # which its owner removes
        except OSError:
            raise MtpError(
                f"cannot write into {folder}: {problem.strerror}, and not all old files could be put back; {complete} "
                f"holds the new ones, {ASIDE} in it the old."
            ) from None
        raise
    except BaseException:  # an interrupt: some of the files are worse than all or none
        _move_in(complete, folder, moved)
        shutil.rmtree(complete, ignore_errors=True)
        raise
    shutil.rmtree(complete, ignore_errors=True)


def _move_in(complete: Path, folder: Path, moved: list[str]) -> None:
    """Move what is not yet in its place, and add its name to `moved`; a file that is replaced stays aside.

    There it gets a second name, so that the first one never names nothing; where that cannot be done, it moves.
    """
    aside = complete / ASIDE
    aside.mkdir(exist_ok=True)
    for path in sorted(each for each in complete.iterdir() if each != aside):
        place, old = folder / path.name, aside / path.name
        if _is_file(place) and not os.path.lexists(old) and not _linked(place, old):
            place.replace(old)
        path.replace(place)
        moved.append(path.name)


def _linked(place: Path, old: Path) -> bool:
    """Give a file, which may be a link itself, a second name; False where that cannot be done."""
    if not LINKS:
        return False
    try:
        os.link(place, old, follow_symlinks=False)
    except OSError:
        return False
    return True


def _move_back(complete: Path, folder: Path, moved: Sequence[str]) -> None:
    for name in moved:
        (folder / name).replace(complete / name)
    for old in (complete / ASIDE).iterdir():
        old.replace(folder / old.name)


def _lock(hidden: Path) -> int | None:
    """An open folder under a lock that ends with the process, however it ends; None where there are no such locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be opened, or is gone.
    """
    if not LOCKS:
        return None
    import fcntl

    opened = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:  # file systems in networks and FUSE: not supported, in several words
        os.close(opened)
        return None
    return opened


def clean_up(folder: Path) -> None:
    """Complete or remove what killed processes left in a folder; hidden folders of living ones are locked."""
    for hidden in folder.glob(f"{PREFIX}*/"):
        try:
            opened = _lock(hidden)
        except OSError:
            continue  # another process is at work there, or was quicker
        if opened is None:
            continue
        try:
            if hidden.name.endswith(COMPLETE):
                _move_in(hidden, folder, [])
            shutil.rmtree(hidden, ignore_errors=True)
        finally:
            os.close(opened)
