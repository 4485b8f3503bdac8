"""gemma-mtp in front of an installed Ollama's llama-server, and the way back.

The original is renamed beside it; in its place comes a script that becomes our llama-server for a Gemma 4 pair on the
CPU, and else the original (llama-server.sh). Our files are copied to a folder of their own in Ollama's, for two
reasons: the service's user can read what lies there, whatever a home folder's permissions are, and an update that
clears Ollama's folder takes them with it. They lie two folders down: Ollama takes a library one down for a GPU's.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.ollama.installation import SERVER, Engine, Installation, hash_of, our_engine

SCRIPT = Path(__file__).with_name("llama-server.sh")
ORIGINAL = "llama-server.original"
FOLDER = "gemma-mtp"
# The flags that our llama-server knows, one a line, beside it: what else a later Ollama passes goes to the original.
FLAGS = "flags"
# What libggml says where it was built for a CPU with more instructions (patch 0016).
UNFIT = "was built for a CPU"
# What the second line of the script begins with.
MARK = b"# gemma-mtp stands in front of"


@dataclass(frozen=True)
class Status:
    """How an installation stands.

    `installed`: whether the script is in the original's place. `original`: where Ollama's own llama-server is.
    `engine`: our folder that the script uses, None if that is gone. `left`: what is ours in an installation whose
    script an update of Ollama has replaced.
    """

    installed: bool
    original: Path
    engine: Engine | None = None
    left: tuple[Path, ...] = ()


def status(found: Installation) -> Status:
    """How an installation stands; nothing is changed."""
    folder, server = found.engine.folder, found.engine.server
    if _is_script(server):
        named = re.search(r"^folder='(.*)'$", server.read_text(), re.MULTILINE)
        engine = Engine(folder / named[1]) if named else None
        there = engine is not None and os.access(engine.server, os.X_OK)
        return Status(True, folder / ORIGINAL, engine if there else None)
    left = (folder / ORIGINAL, folder / FOLDER)
    return Status(False, server, None, tuple(path for path in left if os.path.lexists(path)))


def install(found: Installation, ours: Engine) -> Status:
    """Put our engine in front of an installation's; again after an update of either.

    Raises:
        MtpError: it is not this user's to change, or our llama-server does not start.
    """
    with _changing(found) as (server, original, folder):
        before = list(folder.glob("*"))
        engine = folder / _name(ours)
        try:
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
            if engine not in before:
                _copy(ours, engine)
            if not _is_script(server):
                original.unlink(missing_ok=True)  # of an Ollama before its last update
                os.link(server, original, follow_symlinks=False)
            _script(ours, engine).replace(server)
        except BaseException:
            _clear({*folder.glob("*")} - {*before})
            if not _is_script(server):
                original.unlink(missing_ok=True)
                _clear([folder])
            raise
        _clear({*folder.glob("*")} - {engine})
    return status(found)


def remove(found: Installation) -> Status:
    """Put the original back, byte for byte, and take away what is ours.

    Raises:
        MtpError: it is not this user's to change, or the original is gone.
    """
    with _changing(found) as (server, original, folder):
        if _is_script(server):
            original.replace(server)
        original.unlink(missing_ok=True)
        _clear([folder])
    return status(found)


@contextmanager
def _changing(found: Installation) -> Iterator[tuple[Path, Path, Path]]:
    """llama-server, where the original goes, and our folder, for one change at a time.

    Raises:
        MtpError: it is not this user's to change, or the original is gone.
    """
    folder, server = found.engine.folder, found.engine.server
    if not os.access(folder, os.W_OK):
        if os.geteuid() == 0:
            raise MtpError(f"{folder} is read-only; use gemma-mtp ollama serve, which leaves it alone.")
        raise MtpError(f"{folder} is not this user's to change; run: {shlex.join(['sudo', *map(_whole, sys.argv)])}")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        original = folder / ORIGINAL
        if _is_script(server) and not os.path.lexists(original):
            raise MtpError(f"{original} is gone, and with it Ollama's own llama-server; install Ollama again.")
        yield server, original, folder / FOLDER
    finally:
        os.close(handle)


def _clear(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _whole(word: str) -> str:
    """A word of the command line as it means the same to sudo, which has a PATH of its own."""
    path = Path(word)
    return str(path.absolute()) if path.exists() else word


def _name(ours: Engine) -> str:
    """The folder of an engine of ours: another for every build, and every script."""
    return hash_of([*ours.files, SCRIPT])


def _is_script(server: Path) -> bool:
    with suppress(OSError), server.open("rb") as file:
        return file.read(256).partition(b"\n")[2].startswith(MARK)
    return False


def _copy(ours: Engine, into: Path) -> None:
    """Copy our engine, readable by all, to a place where it appears whole; whether it starts is tried first."""
    folder = Path(tempfile.mkdtemp(dir=into.parent))
    try:
        for path in ours.files:
            shutil.copy(path, folder / path.name)
            (folder / path.name).chmod(0o755 if os.access(path, os.X_OK) else 0o644)
        if UNFIT in _said(folder / SERVER, "--list-devices"):
            raise MtpError("the installed llama-server was built for another CPU; run: gemma-mtp build")
        flags = sorted(set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", _said(folder / SERVER, "--help"))))
        (folder / FLAGS).write_text("".join(f"{flag}\n" for flag in flags))
        (folder / FLAGS).chmod(0o644)
        folder.chmod(0o755)
        folder.rename(into)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _said(server: Path, flag: str) -> str:
    """What our llama-server says, with its own libraries.

    Raises:
        MtpError: it does not start.
    """
    around = {**os.environ, "LD_LIBRARY_PATH": str(server.parent)}
    done = subprocess.run([server, flag], capture_output=True, text=True, check=False, env=around)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise MtpError(f"the installed llama-server does not start ({last}); run: gemma-mtp build")
    return done.stdout + done.stderr


def _script(ours: Engine, engine: Path) -> Path:
    """The script, written beside our engine."""
    text = SCRIPT.read_text().replace("@FOLDER@", f"{FOLDER}/{engine.name}")
    path = engine.with_name(SERVER)
    path.write_text(text.replace("@READS_LIBRARY@", "yes" if ours.reads_library else "no"))
    path.chmod(0o755)
    return path


def is_current(state: Status) -> bool:
    """Whether an installation has the engine and the script that would be installed now."""
    try:
        ours = our_engine()
    except MtpError:
        return True  # none to compare with
    return state.engine is not None and state.engine.folder.name == _name(ours)


def about(found: Installation, state: Status) -> str:
    """What runs in an installation, in a line with the next step."""
    again = "gemma-mtp ollama engine install"
    if not state.installed:
        if state.left:
            return f"Ollama's own, since an update of Ollama; ours again: {again}"
        return "gemma-mtp's alone" if found.engine.is_ours else f"Ollama's own; ours for Gemma 4 with drafts: {again}"
    if state.engine is None:
        return f"Ollama's own, for ours is gone from {found.engine.folder / FOLDER}; ours again: {again}"
    ours = f"gemma-mtp's for Gemma 4 with drafts on the CPU ({state.engine.version}), Ollama's own for all else"
    return ours if is_current(state) else f"{ours}; the installed llama-cpp-python is another build: {again}"
