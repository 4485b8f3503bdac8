"""A small Hugging Face Hub on localhost, which serves folders as repositories and answers as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from children import GUARD, MAIN

# What can be asked: about a repository (1), its revision or files (2, 3); or a file of a repository (4, 5, 6).
ASKED = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?|/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """`repositories`: org/name to folder. `gated`: names that want the token "let-me-in". `requests`: method, path and
    range of each. `sent`: bytes of each file that were sent. `cut`: where the first transfer of a file breaks off.
    `held`: files that do not come before an event. `whole`: it does not know ranges. `broken`: the status of every
    answer."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.gated = repositories, set[str]()
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.held: dict[str, threading.Event] = {}
        self.whole = False
        self.broken: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.broken:
            return self.send(self.server.broken)
        found = ASKED.fullmatch(path)
        name = found[1] or found[4] if found else ""
        if found is None or name not in self.server.repositories:
            return self.send(404 if self.headers.get("Authorization") else 401, X_Error_Code="RepoNotFound")
        if name in self.server.gated and self.headers.get("Authorization") != "Bearer let-me-in":
            return self.send(403, X_Error_Code="GatedRepo", X_Error_Message="Access to it is restricted")
        folder = self.server.repositories[name]
        commit = hashlib.sha1(name.encode()).hexdigest()
        if (found[3] or found[5] or "main") not in ("main", "v1", commit):
            return self.send(404, X_Error_Code="RevisionNotFound")
        if found[4]:
            return self.file(folder / found[6], commit)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if found[2] == "tree":
            listing = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": sha(p)}
                for n, p in zip(names, files, strict=True)
            ]
            return self.send(200, json.dumps(listing).encode(), Content_Type="application/json")
        about = {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
        return self.send(200, json.dumps(about).encode(), Content_Type="application/json")

    def file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.send(404, X_Error_Code="EntryNotFound")
        body, status = path.read_bytes(), 200
        headers = {"ETag": f'"{sha(path)}"', "X-Repo-Commit": commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not self.server.whole:
            start, stop, status = int(asked[1]), min(len(body), int(asked[2] or len(body) - 1) + 1), 206
            headers |= {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
            body = body[start:stop]
        cut = self.server.cut.pop(path.name, None) if self.command == "GET" else None
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if path.name in self.server.held:
                self.server.held[path.name].wait(GUARD)
            self.server.sent[path.name] += len(body[:cut])
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.close()
        return None


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def run_against(hub: Hub, folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of gemma-mtp, or "resolve" and a source, in a folder, with a hub and a cache in that folder."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": str(GUARD),
                "HF_HUB_DOWNLOAD_TIMEOUT": str(GUARD), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    code = MAIN
    if command[0] == "resolve":
        code = "import sys; from gemma_mtp.convert.hub import fetch_checkpoint; print(fetch_checkpoint(sys.argv[2]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        capture_output=True, text=True, check=False, env={**clean, **settings, **environment}, cwd=folder,
    )  # fmt: skip
