"""What `make check-clients` runs: the smallest program of each client library against `gemma-mtp serve`.

    python tests/clients/check.py PYTHON

PYTHON is one of an environment with tests/clients/requirements.txt. The server is that of the environment at hand, with
the bundled pair. Prints a line for each library, with its version.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_mtp.convert import convert_pair

HERE = Path(__file__).resolve().parent
PAIR = HERE.parent / "pair"
# The distribution that each program is about.
CLIENTS = {
    "with_openai": "openai", "with_langchain": "langchain-openai", "with_llama_index": "llama-index-llms-openai-like",
    "with_pydantic_ai": "pydantic-ai-slim", "with_instructor": "instructor", "with_openai_agents": "openai-agents",
    "with_smolagents": "smolagents", "with_llm": "llm",
}  # fmt: skip
MAIN = "from gemma_mtp.runtime.cli.main import main; main()"


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """A server of the bundled pair; what it says when it is ready."""
    target = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", folder, "Q8_0").target
    words = [sys.executable, "-c", MAIN, "serve", str(target), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def main(python: str) -> None:
    failed = 0
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as facts:
        for name, package in CLIENTS.items():
            code = f"from importlib.metadata import version; print(version({package!r}))"
            version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            program = [python, str(HERE / f"{name}.py"), facts["base_url"], facts["model"]]
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            failed += done.returncode != 0
            why = "passes" if done.returncode == 0 else f"fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            print(f"{package:30} {version:10} {why}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main(sys.argv[1])
