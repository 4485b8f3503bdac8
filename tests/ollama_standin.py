"""Stands in for Ollama: its store in a folder, its HTTP interface, and the words of a real one.

ollama_answers.json holds what Ollama 0.33.0 (v0.33.0-rc2) answered on our llama-server, with the bundled pair:
`python tests/ollama_standin.py URL MODEL` asks one anew, for a model with a drafter that runs on this machine.
What differs from model to model is put in its place here; `make check-ollama` runs the same tests on a real Ollama.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.modelfile import files_of

ANSWERS = Path(__file__).with_name("ollama_answers.json")
# The program `ollama`, of which only `create NAME -f MODELFILE` is wanted here.
PROGRAM = """#!{python}
import json, os, sys, urllib.request
body = json.dumps({{"name": sys.argv[2], "modelfile": sys.argv[4]}}).encode()
urllib.request.urlopen(urllib.request.Request("http://" + os.environ["OLLAMA_HOST"] + "/standin/create", body))
"""


@dataclass(frozen=True)
class Model:
    """A model of the store: its layers as paths, and its configuration."""

    target: Path
    drafter: Path | None = None
    renderer: str = "gemma4"
    parser: str = "gemma4"
    requires: str = ""
    parent: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


class Standin(ThreadingHTTPServer):
    """A server at a free port. `requests` are the methods and paths that were asked for, `running` what is loaded."""

    def __init__(self, store: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers: dict[str, Any] = json.loads(ANSWERS.read_text())
        self.blobs = store / "blobs"
        self.blobs.mkdir(parents=True)
        self.models: dict[str, Model] = {}
        self.running: dict[str, Path | None] = {}  # name to the drafter that was loaded with it
        self.requests: list[str] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def command_lines(self) -> Iterator[list[str]]:
        """The command lines of the llama-server processes, as they were in the real one."""
        for name, drafter in self.running.items():
            line = list(self.answers["server"])
            values = {"--model": self.models[name].target, "--port": self.server_port, "--spec-draft-model": drafter}
            if drafter is None:
                del line[line.index("--spec-type") :]
            for flag, value in values.items():
                if flag in line:
                    line[line.index(flag) + 1] = str(value)
            yield line

    def keep(self, data: bytes) -> Path:
        """A file of the store, under its hash."""
        path = self.blobs / f"sha256-{hashlib.sha256(data).hexdigest()}"
        path.write_bytes(data)
        return path

    def create_from(self, name: str, modelfile: Path) -> None:
        """What `ollama create` does with a Modelfile of one target and one drafter."""
        text = modelfile.read_text()
        targets, drafters = files_of(text, modelfile.parent)
        words = [line.split(maxsplit=1) for line in text.splitlines()]
        settings = {key.lower(): value for key, value in words}
        parameters = {key: value for word, rest in words if word == "PARAMETER" for key, value in [rest.split()]}
        numbers = {key: value if key == "stop" else json.loads(value) for key, value in parameters.items()}
        self.models[tagged(name)] = Model(
            self.keep(targets[0].read_bytes()),
            self.keep(drafters[0].read_bytes()) if drafters else None,
            settings.get("renderer", "gemma4"),
            settings.get("parser", "gemma4"),
            settings.get("requires", ""),
            parameters={"stop": ["<turn|>"], **numbers},
        )

    def show(self, name: str) -> dict[str, Any]:
        """The recorded answer, with what is this model's in its place."""
        model = self.models[name]
        found: dict[str, Any] = copy.deepcopy(self.answers["show"])
        lines = found["modelfile"].partition("FROM /")[0].splitlines()
        lines += [f"FROM {model.target}", *([f"DRAFT {model.drafter}"] if model.drafter else [])]
        lines += ["TEMPLATE {{ .Prompt }}"]
        lines += [f"RENDERER {model.renderer}"] if model.renderer else []
        lines += [f"PARSER {model.parser}"] if model.parser else []
        told = {key: value if isinstance(value, list) else [value] for key, value in model.parameters.items()}
        lines += [f"PARAMETER {key} {value}" for key, values in told.items() for value in values]
        found["modelfile"] = "\n".join(lines) + "\n"
        found["parameters"] = "\n".join(
            f"{key:<30} {json.dumps(value)}" for key, values in told.items() for value in values
        )
        arch = link.read_header(model.target).arch
        found["details"] |= {"parent_model": model.parent, "family": arch, "families": [arch]}
        found["requires"] = model.requires
        return found


class Answer(BaseHTTPRequestHandler):
    server: Standin

    def log_message(self, *_: object) -> None:
        pass

    def say(self, body: Any = None, status: int = 200) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, kind: str, name: str) -> None:
        """A recorded refusal; NAME in it is the model's."""
        recorded = self.server.answers["refused"][kind]
        self.say({"error": recorded["error"].replace("NAME", name)}, recorded["status"])

    def body(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.body()
        there = (self.server.blobs / self.path.rpartition("/")[2].replace(":", "-").replace("%3A", "-")).exists()
        self.send_response(200 if there else 404)
        self.end_headers()

    def do_GET(self) -> None:
        self.body()
        answers = self.server.answers
        if self.path == "/api/version":
            self.say(answers["version"])
        else:
            kind, listed = ("tags", self.server.models) if self.path == "/api/tags" else ("ps", self.server.running)
            self.say({"models": [{**answers[kind], "name": name, "model": name} for name in listed]})

    def do_DELETE(self) -> None:
        self.server.models.pop(tagged(json.loads(self.body())["model"]))
        self.say()

    def do_POST(self) -> None:
        data = self.body()
        if self.path.startswith("/api/blobs/"):
            self.server.keep(data)
            self.say(status=201)
            return
        asked = json.loads(data)
        if self.path == "/completion":
            self.say(self.server.answers["completion"])
        elif self.path == "/standin/create":
            self.server.create_from(asked["name"], Path(asked["modelfile"]))
            self.say()
        elif self.path == "/api/copy":
            self.server.models[tagged(asked["destination"])] = self.server.models[tagged(asked["source"])]
            self.say()
        else:
            self.of_model(asked)

    def of_model(self, asked: dict[str, Any]) -> None:
        """What concerns one model, that may not be there."""
        name = tagged(asked.get("from") or asked["model"])
        if name not in self.server.models:
            self.refuse("absent", name)
        elif self.path == "/api/show":
            self.say(self.server.show(name))
        elif self.path == "/api/create":
            self.create(name, asked)
        elif self.path == "/api/generate":
            self.server.running.pop(name, None)
            self.say(self.server.answers["unload"])
        else:
            model = self.server.models[name]
            drafts = model.parameters.get("draft_num_predict", 4) > 0
            self.server.running.setdefault(name, model.drafter if drafts else None)
            self.say(self.server.answers["chat"])

    def create(self, name: str, asked: dict[str, Any]) -> None:
        base = self.server.models[name]
        made = replace(
            base,
            renderer=asked.get("renderer") or base.renderer,
            parser=asked.get("parser") or base.parser,
            requires=asked.get("requires") or base.requires,
            parent=name,
            parameters={**base.parameters, **asked.get("parameters", {})},
        )
        for digest in asked.get("draft_files", {}).values():
            made = replace(made, drafter=self.server.blobs / digest.replace(":", "-"))
        self.server.models[tagged(asked["model"])] = made
        self.say({"status": "success"})


@contextmanager
def standing_in(store: Path) -> Iterator[Standin]:
    server = Standin(store)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        shutil.rmtree(store)


def ask(url: str, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """Status and answer, of a refusal too."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, method=method)) as answer:
            text, status = answer.read(), answer.status
    except urllib.error.HTTPError as problem:
        text, status = problem.read(), problem.code
    return status, json.loads(text) if text else None


def record(url: str, name: str) -> dict[str, Any]:
    """What an Ollama says of a model with a drafter, and how its llama-server was started."""
    from gemma_mtp.convert.ollama import trial
    from gemma_mtp.convert.ollama.api import Client
    from gemma_mtp.convert.ollama.store import stored

    chat = {"model": name, "messages": [{"role": "user", "content": trial.QUESTION}], "stream": False}
    answers = {"version": ask(url, "/api/version")[1], "show": ask(url, "/api/show", {"model": name})[1]}
    for large in ("tensors", "model_info"):
        answers["show"].pop(large, None)
    answers["tags"] = ask(url, "/api/tags")[1]["models"][0]
    answers["chat"] = ask(url, "/api/chat", {**chat, "options": {"num_predict": trial.N_TOKENS}})[1]
    answers["ps"] = ask(url, "/api/ps")[1]["models"][0]
    line = next(trial.servers(stored(Client(url), name)))
    at = line[line.index("--port") + 1]
    body = {"prompt": trial.PROMPT, "n_predict": trial.N_TOKENS, "temperature": 0}
    answers["completion"] = {"timings": ask(f"http://127.0.0.1:{at}", "/completion", body)[1]["timings"]}
    answers["unload"] = ask(url, "/api/generate", {"model": name, "keep_alive": 0})[1]
    status, said = ask(url, "/api/show", {"model": "NAME"})
    answers["refused"] = {"absent": {"status": status, "error": said["error"].replace("NAME:latest", "NAME")}}
    there = str(Path(line[line.index("--model") + 1]).parent)
    text = json.dumps({**answers, "server": line}).replace(there, "/store").replace(str(Path(line[0]).parent), "/lib")
    found: dict[str, Any] = json.loads(text)
    return found


if __name__ == "__main__":
    print(json.dumps(record(*sys.argv[1:3]), indent=1, ensure_ascii=False))
