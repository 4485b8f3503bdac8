"""A pair served by vLLM or SGLang: checked as for a conversion, started, waited for, asked how it drafts, ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from gemma_mtp.convert.engines import HEALTH, LENGTH, LENGTHS, MODELS, Engine, Job, Model, Reported
from gemma_mtp.convert.errors import MtpError, PairError

# Seconds that an engine has to end by itself; one that has loaded a model takes some.
GRACE = 30.0
# Seconds between two looks at an engine that starts, and seconds that an answer may take.
LOOK, ANSWER = 0.5, 10.0
# Lines of an engine's log that an error quotes.
QUOTED = 3


@dataclass(frozen=True)
class Checked:
    """What an engine is told of a pair that fits, the hidden size of the target, and whether it is a 12B (unified)."""

    target: Model
    drafter: Model
    n_embd: int
    unified: bool

    @property
    def length(self) -> int:
        """Tokens to draft in a round, if nobody says otherwise."""
        return LENGTHS.get(self.n_embd, LENGTH)


def checked(target: str, drafter: str) -> Checked:
    """Check two checkpoints as a pair, by the plan of a conversion; of a repository only headers are fetched.

    Args:
        target: folder or org/name[@revision].
        drafter: the same, or "auto" for the one published for an official target.

    Raises:
        PairError: they are no target and its drafter.
        MtpError: one is missing, damaged, quantized already, or cannot be downloaded.
    """
    from gemma_mtp.convert.hub import AUTO_DRAFTER, official_drafter
    from gemma_mtp.convert.pipeline import checked_pair

    found = official_drafter(target) if drafter == AUTO_DRAFTER else drafter
    _check_published(target, found)
    with checked_pair(target, found) as (first, second):
        names = second.settings.get("architectures") or []
        unified = any("Unified" in str(name) for name in names)
        return Checked(_engine_model(target), _engine_model(found), first.config.n_embd, unified)


def _check_published(target: str, drafter: str) -> None:
    """Two official names must belong together: an ordinary drafter has the sizes of one trained for QAT weights."""
    from gemma_mtp.convert.hub import official_name
    from gemma_mtp.convert.naming import name_of

    ours, theirs = official_name(name_of(target)), name_of(drafter)
    other = official_name(theirs.removesuffix("-assistant")) if theirs.endswith("-assistant") else None
    if ours is not None and other is not None and other != ours:
        raise PairError(f"{theirs} was published for {other}, not for {ours}; pass {ours}-assistant, or auto.")


def _engine_model(source: str) -> Model:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Model(str(folder.absolute()))
    name, _, revision = source.partition("@")
    return Model(name, revision or None)


def check_flags(engine: Engine, flags: Sequence[str]) -> None:
    """Refuse flags that the launcher sets or stands upon: what runs would not be what was checked and is waited for.

    Python's argparse takes the beginning of a flag for the flag, and both engines take _ for -, and keys behind a dot.

    Raises:
        MtpError: there is such a flag.
    """
    for flag in flags:
        name = re.split(r"[=.]", flag)[0].replace("_", "-")
        if name in engine.ours or (name.startswith("--") and len(name) > 3 and _begins(name, engine.ours)):
            raise MtpError(
                f"{flag.split('=')[0]} is not passed on to {engine.name}: gemma-mtp launch sets it, or stands upon it; "
                "see its own options, --host, --port, --draft-length and org/name@revision."
            )


def _begins(name: str, flags: Sequence[str]) -> bool:
    return any(flag.startswith(name) for flag in flags)


def program(engine: Engine, unified: bool) -> str:
    """The engine's program, on the PATH or beside this Python.

    Raises:
        MtpError: it is not installed, or too old for the pair.
    """
    since = engine.since_unified if unified else engine.since
    install = f"run: pip install '{engine.name}>={since}'"
    found = shutil.which(engine.name) or shutil.which(engine.name, path=Path(sys.executable).parent)
    if found is None:
        raise MtpError(f"{engine.name} is not installed; {install} (in an environment of its own), and activate it.")
    version = _version(engine, Path(found))
    if version is not None and "dev" not in version and _numbers(version) < _numbers(since):
        raise MtpError(f"{found} is {engine.name} {version}, which cannot run this drafter; {install}")
    return found


def _version(engine: Engine, path: Path) -> str | None:
    """The version of the package that a program belongs to, without starting it: that takes many seconds."""
    places = [str(each) for each in path.resolve().parent.parent.glob("lib/python3*/site-packages")]
    return next((each.version for each in distributions(name=engine.name, path=places)), None)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


class EngineApi:
    """A server's HTTP interface, asked past any proxy.

    Args:
        host: address that it listens at.
        port: port that it listens at.
        key: what it wants as a bearer token, if anything.
    """

    def __init__(self, host: str, port: int, key: str | None) -> None:
        # Who listens everywhere is asked at home.
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> str | None:
        """The text at a path, or None if there is no answer or none that is good."""
        try:
            with self._opener.open(urllib.request.Request(self.url + path, headers=self._headers), timeout=ANSWER) as a:
                return str(a.read().decode(errors="replace"))
        except (OSError, ValueError, urllib.error.HTTPError):
            return None

    def model(self) -> str | None:
        """The name of the model that it serves."""
        with suppress(ValueError, LookupError, TypeError):
            return str(json.loads(self.get(MODELS) or "")["data"][0]["id"])
        return None


def key_of(engine: Engine, flags: Sequence[str]) -> str | None:
    """The key that the engine will ask for, if the user gives it one."""
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name.replace("_", "-") == "--api-key":
            return value if equals else next(iter(flags[place + 1 :]), None)
    return os.environ.get(engine.key) if engine.key else None


def check_port(host: str, port: int) -> None:
    """Make sure that what answers there later is the engine.

    Raises:
        MtpError: somebody else listens there, or the address is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as problem:
        raise MtpError(f"cannot listen at {host}:{port} ({problem.strerror}); pass another --port or --host.") from None


@contextmanager
def log_file(name: str, wanted: Path | None) -> Iterator[Path]:
    """The file for an engine's output. Unless the user wants it, it stays only if something went wrong."""
    if wanted is not None:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        yield wanted
        return
    handle, path = tempfile.mkstemp(prefix=f"gemma-mtp-{name}-", suffix=".log")
    os.close(handle)
    try:
        yield Path(path)
    except MtpError:
        raise
    except BaseException:
        Path(path).unlink()
        raise
    Path(path).unlink()


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An engine's process; afterwards it is gone, and with it the workers that it started.

    It is in a session of its own: Ctrl-C in a terminal must not end it before it has been asked for its acceptance.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(process: subprocess.Popen[bytes], api: EngineApi, engine: Engine, log: Path, seconds: float) -> str:
    """Wait until an engine answers; the name of the model that it serves.

    Raises:
        MtpError: it ended, or has not answered in so many seconds.
    """
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if process.poll() is not None:
            raise died(process, engine, log)
        if api.get(HEALTH) is not None and (name := api.model()) is not None:
            return name
        time.sleep(LOOK)
    raise MtpError(
        f"{engine.name} does not answer after {seconds:g} seconds; raise --timeout. {_end(log)}; its log: {log}"
    )


@contextmanager
def reporting(
    process: subprocess.Popen[bytes], ask: Callable[[], Reported | None], tell: Callable[[Reported], None]
) -> Iterator[Callable[[], None]]:
    """A function that tells of the acceptance if there is news; on the way out, whatever the reason, it is called last.

    Args:
        process: of the engine, which is asked no more when it has ended.
        ask: what the engine reports now.
        tell: called with what is new.
    """
    told: Reported | None = None

    def report() -> None:
        nonlocal told
        found = None
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # an answer of another shape ends nothing
            found = ask()
        if found is not None and found != told:
            told = found
            tell(found)

    try:
        yield report
    finally:
        if process.poll() is None:
            report()


def watch(process: subprocess.Popen[bytes], report: Callable[[], None], every: float) -> None:
    """Stay until an engine ends, and report every so many seconds; with 0, never."""
    while True:
        try:
            process.wait(every or None)
            return
        except subprocess.TimeoutExpired:
            report()


def died(process: subprocess.Popen[bytes], engine: Engine, log: Path) -> MtpError:
    """The error that says how an engine ended."""
    return MtpError(f"{engine.name} ended with status {process.returncode}. {_end(log)}; its log: {log}")


def _end(log: Path) -> str:
    """The first exception that a log tells of, or else its last lines in one.

    Engines end with the exception of the process that waited for the one that failed, long after its own.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines if line]
    raised = (re.match(r"(?:\(.*?\) ERROR .*?\] )?([\w.]*(?:Error|Exception): \S.*)", line) for line in plain)
    first = next((match[1] for match in raised if match), None)
    text = first or " / ".join(plain[-QUOTED:]) or "It said nothing"
    return "".join(c for c in text if c.isprintable())[-600:]


def job(checked: Checked, host: str, port: int, length: int | None) -> Job:
    """What the engine is asked to serve."""
    return Job(checked.target, checked.drafter, host, port, length or checked.length)
