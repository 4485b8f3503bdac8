"""What `make check-clients` runs: the smallest program of each client library against `gemma-mtp serve`.

    python tests/clients/check.py [NAME...]

Each library is installed into an environment of its own in the cache folder, since no one version of openai serves them
all, and stays there: remove the folder for newer versions. The server is that of the environment at hand, with the
bundled pair. Prints a line for each library, with its version and that of openai.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_mtp.convert import convert_pair
from gemma_mtp.patches.source import building, cache_dir

HERE = Path(__file__).resolve().parent
PAIR = HERE.parent / "pair"
# What each program needs, the distribution that it is about first.
CLIENTS = {
    "openai": ("openai",),
    "langchain": ("langchain-openai",),
    "llama_index": ("llama-index-llms-openai-like",),
    "pydantic_ai": ("pydantic-ai-slim[openai]",),
    "instructor": ("instructor",),
    "openai_agents": ("openai-agents",),
    "smolagents": ("smolagents", "openai"),
    "llm": ("llm",),
}
MAIN = "from gemma_mtp.runtime.cli.main import main; main()"
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, Any]]:
    """A server of the bundled pair; what it says when it is ready."""
    target = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", folder, "Q8_0").target
    words = [sys.executable, "-c", MAIN, "serve", str(target), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def installed(name: str) -> Path:
    """The Python of a library's environment, made if need be."""
    folder = cache_dir() / "clients" / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    with building(f"client-{name}"):
        if not (folder / ".ready").exists():
            venv.create(folder, with_pip=True, clear=True)
            quiet = ("--disable-pip-version-check", "install", "--quiet")
            subprocess.run([python, "-m", "pip", *quiet, *CLIENTS[name]], check=True)
            (folder / ".ready").touch()
    return python


def said(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *words], capture_output=True, text=True, check=False)


def main(*names: str) -> None:
    failed = 0
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as facts:
        for name in names or CLIENTS:
            python, package = installed(name), CLIENTS[name][0].partition("[")[0]
            ours, openai = said(python, "-c", VERSIONS, package, "openai").stdout.split()
            done = said(python, str(HERE / f"with_{name}.py"), facts["base_url"], facts["model"])
            failed += done.returncode != 0
            why = "passes" if done.returncode == 0 else f"fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            print(f"{package:30} {ours:10} openai {openai:10} {why}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
