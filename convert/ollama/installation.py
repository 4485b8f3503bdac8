"""Where Ollama's program and its llama-server lie on this machine, and where ours does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from importlib.machinery import PathFinder
from pathlib import Path

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.ollama.api import DOWNLOAD, address

SERVER, QUANTIZE = "llama-server", "llama-quantize"
# Where Ollama looks for its llama-server from the folder of its program, links resolved (ml/path.go).
FOLDERS = ("../lib/ollama", "lib/ollama", "build/lib/ollama", "dist/linux-amd64/lib/ollama", ".")
# Where Ollama's own installers put the program, for a PATH that lacks it.
PROGRAMS = ("/usr/local/bin/ollama", "/usr/bin/ollama", "/Applications/Ollama.app/Contents/Resources/ollama")
# A function that the series adds to libllama: who has it is ours.
OURS = b"llama_mtp_draft"
# What a libllama holds that reads the files of Ollama's library; no other reads this key of theirs.
LIBRARY_KEY = b"tokenizer.ggml.eos_token_ids"


@dataclass(frozen=True)
class Engine:
    """A folder with llama-server, llama-quantize and the libraries that they load."""

    folder: Path

    @property
    def server(self) -> Path:
        return self.folder / SERVER

    @property
    def files(self) -> list[Path]:
        """The two programs and the libraries."""
        libraries = [*self.folder.glob("lib*.so*"), *self.folder.glob("lib*.dylib")]
        return [self.server, self.folder / QUANTIZE, *sorted(libraries)]

    @cached_property
    def key(self) -> str:
        """A hash of its files, 16 digits."""
        return hash_of(self.files)

    @property
    def is_ours(self) -> bool:
        """Whether its libllama is one of this project's."""
        return self._has(OURS)

    @property
    def reads_library(self) -> bool:
        """Whether its libllama reads the files of Ollama's library: encoders in them, another name of the tokenizer."""
        return self._has(LIBRARY_KEY)

    def _has(self, text: bytes, library: str = "libllama.") -> bool:
        return any(text in path.read_bytes() for path in self.files if path.name.startswith(library) and path.is_file())

    @property
    def replays(self) -> bool:
        """Whether its llama-server accepts drafts with a given chance (`--spec-synth-rates`)."""
        return self._has(b"spec-synth-rates", "libllama-common.")

    @property
    def version(self) -> str:
        """What its llama-server says of itself, "" if it does not start."""
        try:
            done = subprocess.run([self.server, "--version"], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        found = re.search(r"^version: (.+)$", done.stdout + done.stderr, re.MULTILINE)
        return found[1] if found else ""


@dataclass(frozen=True)
class Installation:
    """An installed Ollama: its program, links resolved, and the folder of its llama-server."""

    program: Path
    engine: Engine


def hash_of(paths: Iterable[Path]) -> str:
    """A hash of files and their names, 16 digits."""
    found = sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(f"{path.name} {file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def our_engine() -> Engine:
    """The llama-server of the installed llama-cpp-python, which gemma-mtp build made.

    Raises:
        MtpError: there is none.
    """
    package = PathFinder.find_spec("llama_cpp")
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if not folder and package is not None and package.origin is not None:
        folder = str(Path(package.origin).parent / "lib")
    found = Engine(Path(folder or ""))
    if not folder or not all(path.is_file() for path in found.files) or not found.is_ours:
        raise MtpError("this needs gemma-mtp's own llama-server, which is not here; run: gemma-mtp build")
    return found


def installation(named: Path | None = None) -> Installation:
    """An installed Ollama.

    Args:
        named: its program, or the folder whose bin has it; the one on the PATH, or where it is mostly, unless given.

    Raises:
        MtpError: there is none, or none with a llama-server.
    """
    program = (_program() if named is None else _named(named)).resolve()
    folders = [program.parent / each for each in FOLDERS]
    folder = next((each for each in folders if (each / SERVER).exists()), None)
    if folder is None:
        raise MtpError(
            f"{program} has no {SERVER} in {program.parent.parent / 'lib' / 'ollama'}: it is older than 0.30, or "
            "a script that starts another; name the program itself with --ollama."
        )
    return Installation(program, Engine(folder.resolve()))


def running_program(url: str) -> Path | None:
    """The program of the Ollama that listens at an address of this machine, if this user may see it (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name != "ollama" or words[1:2] != ["serve"] or address(_host(folder)).geturl() != url:
                continue
            return Path(words[0]) if Path(words[0]).is_absolute() else (folder / "exe").readlink()
        except (OSError, MtpError):
            continue  # it ended, or is not to be seen
    return None


def _host(process: Path) -> str:
    """The OLLAMA_HOST of a process; "" of one without, and of another user's."""
    try:
        found = re.search(rb"(?:^|\0)OLLAMA_HOST=([^\0]*)", (process / "environ").read_bytes())
    except PermissionError:
        return ""
    return found[1].decode(errors="replace") if found else ""


def whose(server: str) -> str:
    """A llama-server's path, and whose it is."""
    engine = Engine(Path(server).parent)
    if not engine.server.exists():  # in a container
        return server
    return f"{'gemma-mtp' if engine.is_ours else 'Ollama'}'s ({server})"


def _program() -> Path:
    places = (shutil.which("ollama"), *PROGRAMS)
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise MtpError(f"ollama is not installed here; get it from {DOWNLOAD}, or name its program with --ollama.")
    return Path(found)


def _named(named: Path) -> Path:
    program = named / "bin" / "ollama" if named.is_dir() else named
    if not os.access(program, os.X_OK) or program.is_dir():
        raise MtpError(f"{program} is not there, or no program; --ollama takes Ollama's program or its folder.")
    return program


def check_system(what: str, systems: dict[str, str]) -> None:
    """Refuse what cannot be done on this system.

    Args:
        what: the command.
        systems: names of the systems where it works, by what Python calls them.

    Raises:
        MtpError: it is none of those.
    """
    if sys.platform not in systems:
        raise MtpError(f"gemma-mtp {what} works on {' and '.join(systems.values())} alone.")
