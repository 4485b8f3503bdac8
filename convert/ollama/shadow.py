"""The user's own Ollama on our engine, the installation untouched: `gemma-mtp ollama serve`.

Ollama finds its llama-server from the folder of its own program, links resolved. So a second folder in our cache, a
shadow of the installation, holds that program and our llama-server; it is made anew when either of them changes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.blobs import stores
from gemma_mtp.convert.launch import check_port
from gemma_mtp.convert.ollama.api import PORT, Client, NotRunningError, address
from gemma_mtp.convert.ollama.installation import Engine, Installation, hash_of
from gemma_mtp.patches.source import cache_dir

Process = subprocess.Popen[bytes]
# How many ports after Ollama's own are tried.
PORTS = 100
# Seconds until it answers, and until it has ended with its models.
START, GRACE = 120.0, 30.0
LOOK = 0.1


@dataclass(frozen=True)
class Served:
    """An Ollama that was started here: process, address, version, the programs and the store that it uses, its log."""

    pid: int
    url: str
    version: str
    program: str
    prefix: str
    engine: str
    store: str
    log: str

    def __str__(self) -> str:
        return f"Ollama {self.version} ({self.program}) on {self.engine}, models of {self.store}, at {self.url}"


@dataclass(frozen=True)
class Plan:
    """What `start` will do: environment of Ollama, where it will listen, its store, and what the user is told of it."""

    env: dict[str, str]
    host: str
    store: Path
    notes: tuple[str, ...]


def folder() -> Path:
    """Where shadows, the log, and what is known of a running Ollama are kept."""
    return cache_dir() / "ollama"


def shadow(found: Installation, ours: Engine) -> Path:
    """The shadow of an installation with our engine; older ones go, unless they run.

    Raises:
        MtpError: the cache cannot be written.
    """
    home = folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home):
            prefix = home / f"{hash_of([found.program])}-{ours.key}"
            for other in home.iterdir():
                if other.is_dir() and other != prefix and not _in_use(other):
                    shutil.rmtree(other)
            if not prefix.exists():
                _make(prefix, found, ours)
    except OSError as problem:
        raise MtpError(
            f"{home} cannot be written ({problem.strerror}); set GEMMA_MTP_CACHE to another folder."
        ) from None
    return prefix


def _make(prefix: Path, found: Installation, ours: Engine) -> None:
    """Make a shadow, which appears whole."""
    new = Path(tempfile.mkdtemp(dir=prefix.parent))
    try:
        _place(found.program, new / "bin" / "ollama")
        for path in ours.files:
            _place(path, new / "lib" / "ollama" / path.name)
        new.rename(prefix)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _place(path: Path, to: Path) -> None:
    """A file at another place too: by a hard link, or, from another file system or user, by a copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copy2(path, to)


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """A lock on a folder, held for as long as anybody has the handle."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield handle
    finally:
        os.close(handle)


def _in_use(prefix: Path) -> bool:
    """Whether a process that was started from a shadow lives."""
    try:
        with _locked(prefix, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def plan() -> Plan:
    """Where an Ollama started now would listen, and whose models it would have.

    Raises:
        MtpError: one runs already that was started here, or OLLAMA_HOST names an address that is taken, or is none of
            this machine.
    """
    if other := running():
        raise MtpError(f"one runs already at {other.url}; end it with gemma-mtp ollama serve --stop")
    notes: list[str] = []
    given = os.environ.get("OLLAMA_HOST", "").strip()
    at = address(given)
    host = given or f"127.0.0.1:{PORT}"
    if not _free(str(at.hostname), at.port or PORT):
        if given:
            raise MtpError(f"OLLAMA_HOST is {given}, where this cannot listen (something else does, or it is another "
                           "machine); stop that, or set OLLAMA_HOST to another host:port.")  # fmt: skip
        port = next((port for port in range(PORT + 1, PORT + PORTS) if _free("127.0.0.1", port)), None)
        if port is None:
            raise MtpError(f"no port is free from {PORT} on; set OLLAMA_HOST to a host:port.")
        host = f"127.0.0.1:{port}"
        notes.append(
            f"port {PORT} is taken, perhaps by the installed Ollama; to use this one: export OLLAMA_HOST={host}"
        )
    store = store_here()
    env = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": str(store)}
    if store.is_dir() and not os.access(store, os.W_OK):
        notes.append(f"{store} is not this user's to change: its models run, and none can be added or removed")
    if notes:  # the store is somebody else's as well: what that one is about to finish must not be cleared away
        env.setdefault("OLLAMA_NOPRUNE", "1")
    return Plan(env, host, store, tuple(notes))


def _free(host: str, port: int) -> bool:
    try:
        check_port(host, port)
    except MtpError:
        return False
    return True


def store_here() -> Path:
    """The store that OLLAMA_MODELS names, or the first that has models, or the user's own."""
    places = stores()
    return next((each for each in places if os.access(each / "manifests", os.R_OK | os.X_OK)), places[0])


@contextmanager
def started(
    prefix: Path, found: Installation, ours: Engine, wanted: Plan, log: Path | None
) -> Iterator[tuple[Served, Process]]:
    """Ollama from a shadow, once it answers; if something goes wrong meanwhile, or in the block, it is ended.

    Args:
        prefix: the shadow.
        found: what it is a shadow of.
        ours: the engine in it.
        wanted: environment, address and store.
        log: file for its output; this program's own unless given.

    Raises:
        MtpError: it ends, or is too old, or does not answer.
    """
    command = [str(prefix / "bin" / "ollama"), "serve"]
    with ExitStack() as files:
        # A lock that the process holds through its handle, for as long as it lives.
        lock = files.enter_context(_locked(prefix, fcntl.LOCK_SH))
        out = None if log is None else files.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command, env=wanted.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            pass_fds=[lock],
        )  # fmt: skip
    try:
        version = wait_for(process, Client(wanted.host), log)
        engine = f"gemma-mtp's llama-server {ours.version}"
        url, at = address(wanted.host).geturl(), "" if log is None else str(log)
        served = Served(process.pid, url, version, str(found.program), str(prefix), engine, str(wanted.store), at)
        _record().write_text(json.dumps(asdict(served)))
        yield served, process
    except BaseException:
        end(process)
        _record().unlink(missing_ok=True)
        raise


def end(process: Process) -> None:
    """End an Ollama, and the models that it runs."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _kill(process.pid)
    process.wait()


def wait_for(process: Process, api: Client, log: Path | None) -> str:
    """The version of an Ollama, once it answers.

    Raises:
        MtpError: it ended, does not answer, or is too old.
    """
    last = time.monotonic() + START
    while time.monotonic() < last:
        if process.poll() is not None:
            lines = [] if log is None else log.read_text(errors="replace").strip().splitlines()
            said = f": {lines[-1]}" if lines else "; what it says stands above"
            raise MtpError(f"Ollama ended with status {process.returncode}{said}")
        with suppress(NotRunningError):
            return api.version()
        time.sleep(LOOK)
    raise MtpError(f"Ollama does not answer at {api.url} after {START:g} seconds; see its log.")


def running() -> Served | None:
    """The Ollama that was started here and still runs."""
    try:
        served = Served(**json.loads(_record().read_text()))
        os.kill(served.pid, 0)
        # Its process number may be another's by now; the lock of its shadow is its own.
        return served if _in_use(Path(served.prefix)) else None
    except (OSError, ValueError, TypeError):
        return None


def stop(served: Served) -> None:
    """End an Ollama that was started here, and the models that it runs."""
    with suppress(ProcessLookupError):
        os.kill(served.pid, signal.SIGTERM)
    last = time.monotonic() + GRACE
    while running() == served and time.monotonic() < last:
        time.sleep(LOOK)
    _kill(served.pid)
    _record().unlink(missing_ok=True)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _record() -> Path:
    return folder() / "serve.json"
