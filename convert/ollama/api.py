"""Ollama's HTTP interface, as much of it as is needed here (docs/api.md there; read in v0.33.0-rc2, and asked)."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import SplitResult, quote, urlsplit

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.modelfile import REQUIRES

DOWNLOAD = "https://ollama.com/download"
UPDATE = f"update it: get {DOWNLOAD} again (Linux: its install script, Docker: pull the image), then start it anew"
PORT = 11434
# What an Ollama says that somebody built without a version.
UNVERSIONED = (0, 0, 0)
# Seconds that an answer may take: one that loads a model from a slow disk takes minutes.
ANSWER, LOADING = 30.0, 1800.0
# What Ollama says, and what it means. The first that is found counts.
MEANINGS = (
    (r"size overflow", "it holds a tensor type that Ollama cannot size; convert with another -q"),
    (r"has \d+ shards, expected \d+", "the Modelfile must name every part; write it anew with gemma-mtp modelfile"),
    (r"unknown model architecture|failed to validate GGUF", f"this Ollama's llama.cpp is too old for it; {UPDATE}"),
    (r"illegal instruction", "Ollama's own engine does not run on this processor (seen with AMX: run "
     "gemma-mtp ollama serve, or remove lib/ollama/libggml-cpu-sapphirerapids.so of the installation); see its log"),
    (r"doesn't contain MTP layers", "what it has as its drafter is none; see gemma-mtp ollama doctor"),
    (r"ctx_other", "Ollama shows this line for any failure at the start of a model with a drafter; the cause stands in "
     "its log (journalctl -u ollama, or ~/.ollama/logs/server.log)"),
    (r"no space left on device", "the disk of Ollama's store is full; free some, or move it with OLLAMA_MODELS"),
    (r"model ['\"].*['\"] not found", "see gemma-mtp ollama list"),
)  # fmt: skip


class OllamaError(MtpError):
    """What Ollama answered instead of doing it.

    Args:
        said: its words.
        status: of HTTP; 200 where it began well.
    """

    def __init__(self, said: str, status: int) -> None:
        words = " ".join(" ".join(dict.fromkeys(said.splitlines())).split())  # it repeats lines of llama-server's log
        meaning = next((f": {text}" for pattern, text in MEANINGS if re.search(pattern, words)), "")
        super().__init__(f"Ollama says: {words.rstrip('.')}{meaning}.")
        self.status = status


class NotRunningError(MtpError):
    """Nothing answers where Ollama ought to."""


def address(setting: str | None = None) -> SplitResult:
    """Where Ollama listens, as its own client reads OLLAMA_HOST (envconfig/config.go).

    Args:
        setting: [http[s]://]host[:port]; that of the environment unless given.
    """
    text = (os.environ.get("OLLAMA_HOST", "") if setting is None else setting).strip(" \"'")
    scheme, separator, rest = text.rpartition("://")
    port = {"http": 80, "https": 443}.get(scheme, PORT) if separator else PORT
    if rest.count(":") > 1 and not rest.startswith("["):
        rest = f"[{rest}]"
    try:
        found = urlsplit(f"{scheme or 'http'}://{rest}")
        host, given = found.hostname or "127.0.0.1", found.port
    except ValueError as problem:
        raise MtpError(f"OLLAMA_HOST is {text!r} ({problem}); wanted host:port.") from None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return urlsplit(f"{scheme or 'http'}://{host}:{port if given is None else given}")


class Client:
    """A running Ollama.

    Args:
        host: where it listens; as OLLAMA_HOST says unless given.
    """

    def __init__(self, host: str | None = None) -> None:
        self.address = address(host)
        self.url = self.address.geturl()
        near = self.is_here or not urllib.request.getproxies()
        handlers = [urllib.request.ProxyHandler({})] if near else []
        self._open = urllib.request.build_opener(*handlers).open

    @property
    def is_here(self) -> bool:
        """Whether it listens on this machine: its store may then be one of this machine's folders."""
        return self.address.hostname in ("localhost", "::1") or str(self.address.hostname).startswith("127.")

    def get(self, path: str) -> Any:
        """The answer to a question, parsed."""
        return self._asked(urllib.request.Request(f"{self.url}{path}"), ANSWER)

    def post(self, path: str, body: Mapping[str, Any], timeout: float = ANSWER) -> Any:
        """What an order gives, parsed; None of an empty answer.

        Raises:
            OllamaError: it refuses, or fails.
            MtpError: it is not there.
        """
        return self._asked(self._request(path, body, "POST"), timeout)

    def stream(self, path: str, body: Mapping[str, Any], timeout: float = ANSWER) -> Iterator[Any]:
        """The lines of an answer as they come, parsed; raises what `post` raises."""
        with self._faults(), self._open(self._request(path, body, "POST"), timeout=timeout) as answer:
            for line in answer:
                yield _checked(json.loads(line), answer.status)

    def delete(self, name: str) -> None:
        """Take a model out of the store; layers that others use stay."""
        self._asked(self._request("/api/delete", {"model": name}, "DELETE"), ANSWER)

    def version(self) -> str:
        """The version of a running Ollama that can do what is needed here.

        Raises:
            MtpError: it is not installed, does not run, or is too old.
        """
        answer = self.get("/api/version")
        if not (isinstance(answer, dict) and isinstance(answer.get("version"), str)):
            raise MtpError(f"{self.url} is not Ollama; set OLLAMA_HOST to the host:port of one.")
        version: str = answer["version"]
        if () < numbers(version) < numbers(REQUIRES) and numbers(version) != UNVERSIONED:
            raise MtpError(f"{self.url} is Ollama {version}, and drafters of Gemma 4 need {REQUIRES}; {UPDATE}.")
        return version

    def upload(self, path: Path) -> str:
        """Bring a file into the store, unless it is there; its digest."""
        with path.open("rb") as file:
            digest = f"sha256:{file_digest(file, 'sha256').hexdigest()}"
            place = f"{self.url}/api/blobs/{quote(digest)}"
            try:
                self._asked(urllib.request.Request(place, method="HEAD"), ANSWER)
            except OllamaError as problem:
                if problem.status != http.client.NOT_FOUND:
                    raise
                file.seek(0)
                size = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
                self._asked(urllib.request.Request(place, file, size, method="POST"), LOADING)
        return digest

    def _request(self, path: str, body: Mapping[str, Any], method: str) -> urllib.request.Request:
        kind = {"Content-Type": "application/json"}
        return urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), kind, method=method)

    def _asked(self, request: urllib.request.Request, timeout: float) -> Any:
        with self._faults(), self._open(request, timeout=timeout) as answer:
            text = answer.read().decode(errors="replace")
            status = answer.status
        try:
            found = json.loads(text) if text.strip() else None
        except ValueError:
            raise MtpError(f"{self.url} is not Ollama; set OLLAMA_HOST to the host:port of one.") from None
        return _checked(found, status)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """What keeps Ollama from answering, as errors with a next step."""
        try:
            yield
        except urllib.error.HTTPError as problem:
            text = problem.read().decode(errors="replace")
            try:
                said = json.loads(text)["error"]
            except (ValueError, KeyError, TypeError):
                said = text.strip()[:200] or f"{problem.code} {problem.reason}"
            raise OllamaError(str(said), problem.code) from None
        except TimeoutError:
            raise MtpError(f"Ollama at {self.url} does not answer in time; see its log, or start it anew.") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as problem:
            self._absent(problem)

    def _absent(self, problem: Exception) -> NoReturn:
        if isinstance(getattr(problem, "reason", problem), TimeoutError):
            raise MtpError(f"Ollama at {self.url} does not answer in time; see its log, or start it anew.") from None
        if self.is_here and shutil.which("ollama") is None:
            raise NotRunningError(
                f"Ollama is not installed, and nothing answers at {self.url}; get it from {DOWNLOAD}, or set "
                "OLLAMA_HOST to the host:port of one that runs elsewhere."
            ) from None
        raise NotRunningError(
            f"Ollama is not running at {self.url}; start it with ollama serve (or its app, or systemctl start ollama), "
            "or set OLLAMA_HOST to its host:port."
        ) from None


def _checked(found: Any, status: int) -> Any:
    """What Ollama answered.

    Raises:
        OllamaError: it is an error.
    """
    if isinstance(found, dict) and isinstance(found.get("error"), str):
        raise OllamaError(found["error"], status)
    return found


def numbers(version: str) -> tuple[int, ...]:
    """A version to compare; () of what is none."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(each or 0) for each in found.groups()) if found else ()
