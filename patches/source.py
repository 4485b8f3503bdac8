"""The pinned sources with the series applied: fetched, checked, unpacked, patched, as a git repository.

Standard library only, like all of patches/: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENDORED = "vendor/llama.cpp"
IDENTITY = ("-c", "user.name=gemma-mtp", "-c", "user.email=gemma-mtp@localhost", "-c", "core.autocrlf=false")


class BuildError(RuntimeError):
    """A build that cannot go on; the message says what to do next."""


@dataclass(frozen=True)
class Upstream:
    """The pinned release: version and sha256 of the sdist, the llama.cpp commit inside it and its build number."""

    version: str
    sha256: str
    llama_cpp: str
    number: int


def upstream() -> Upstream:
    """Read the pin from patches/UPSTREAM."""
    text = (HERE / "UPSTREAM").read_text()
    pins = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return Upstream(pins["llama-cpp-python"], pins["sdist-sha256"], pins["llama.cpp"], int(pins["llama.cpp-build"]))


def series() -> list[Path]:
    """The patches, in the order they apply."""
    return sorted(HERE.glob("[0-9][0-9][0-9][0-9]-*.patch"))


def cache_dir() -> Path:
    """The one folder outside the checkout: $GEMMA_MTP_CACHE, or gemma-mtp in the user's cache folder."""
    named = os.environ.get("GEMMA_MTP_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else base / "gemma-mtp"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started, and wait until none of them writes any more."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    else:  # Windows
        process.terminate()
    for _ in process.stdout or ():
        pass


def run(command: Sequence[str | Path], cwd: Path | None = None, **env: str) -> str:
    """Run a command and return its output; a failure raises with the last lines it printed."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own: what it starts can be ended with it
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            end(process)
            raise
    if process.returncode:
        tail = "\n".join(said.splitlines()[-20:])
        raise BuildError(f"{' '.join(map(str, command[:4]))} ... failed with status {process.returncode}:\n{tail}")
    return said


def pip(*arguments: str | Path, **env: str) -> str:
    """Run pip in this interpreter's environment and return its output.

    Raises:
        BuildError: pip is not there, or failed.
    """
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"this environment has no pip. Install: {sys.executable} -m ensurepip")
    try:
        return run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], None, **env)
    except BuildError as problem:
        raise BuildError(not_downloaded(str(problem)) or str(problem)) from None


def not_downloaded(said: str) -> str | None:
    """What pip could not get, and the next step; None where it failed for another reason."""
    missing = re.search(r"No matching distribution found for (\S+)", said)
    if missing and "(from versions: none)" in said:
        return f"pip finds no {missing[1]}; check the network, or PIP_INDEX_URL where a mirror is used."
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_sdist() -> Path:
    """Where the cache has the pinned sdist, or is to have it."""
    return cache_dir() / "sdist" / f"llama_cpp_python-{upstream().version}.tar.gz"


def fetch_sdist() -> Path:
    """The pinned sdist, from the cache or downloaded by pip, with its hash checked either way.

    Raises:
        BuildError: the download failed, or the file is not the pinned one.
    """
    pin, kept = upstream(), kept_sdist()
    name = kept.name
    if kept.exists() and sha256(kept) == pin.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    say(f"downloading llama-cpp-python {pin.version} (75 MB)")
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        wanted = f"llama-cpp-python=={pin.version}"
        pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, wanted)
        got = Path(folder) / name
        if not got.exists():
            raise BuildError(f"pip downloaded {sorted(p.name for p in Path(folder).iterdir())}, not {name}.")
        if (found := sha256(got)) != pin.sha256:
            raise BuildError(f"{name} has sha256 {found}, wanted {pin.sha256}; the index serves another file.")
        got.replace(kept)
    return kept


def unpack(into: Path, *only: str) -> Path:
    """Unpack the sdist (or what lies below the paths in `only`) into a folder; returns the sdist's root."""
    root = f"llama_cpp_python-{upstream().version}"
    with tarfile.open(fetch_sdist()) as archive:
        # The sdist carries upstream's .git folder and submodule link; ours must be the only repository there.
        prefixes = tuple(f"{root}/{part}" for part in only) or (root,)
        wanted = (m for m in archive if m.name.startswith(prefixes))
        members = [m for m in wanted if ".git" not in Path(m.name).parts]
        archive.extractall(into, members=members, filter="data")
    return into / root


def git(tree: Path, *arguments: str | Path) -> str:
    # The ceiling keeps git from taking the checkout around the cache folder for the repository to work on. What the
    # user has set for all repositories (signed commits, the form of patches) stays out.
    quiet = {"GIT_CEILING_DIRECTORIES": str(tree.parent), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return run(["git", *IDENTITY, *arguments], cwd=tree, **quiet)


@contextmanager
def building(what: str) -> Iterator[None]:
    """Hold a lock in the cache folder: a second run waits for what the first builds, and finds it there."""
    lock = cache_dir() / "work" / f"{what}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run that builds the same")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def commit_series(tree: Path) -> None:
    """Make an unpacked sdist a git repository with the series as commits over the tag `base`."""
    git(tree, "init", "--quiet")
    git(tree, "add", "--force", VENDORED)
    git(tree, "commit", "--quiet", "--no-verify", "-m", f"llama.cpp {upstream().llama_cpp}")
    git(tree, "tag", "base")
    if series():
        git(tree, "am", "--quiet", "--committer-date-is-author-date", f"--directory={VENDORED}", *series())


@contextmanager
def patched_tree() -> Iterator[Path]:
    """A temporary copy of the sdist, committed with the series as `commit_series` does."""
    work = cache_dir() / "work"
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        tree = unpack(Path(folder))
        commit_series(tree)
        yield tree
