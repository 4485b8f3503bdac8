"""What each command imports: only `run`, `chat`, `serve` and `bench` need libllama, and nothing of ours needs torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import gemma_mtp.runtime
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime.cli import main
from tiny import PAIR

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
HEAVY = ("llama_cpp", "torch", "transformers")
# Runs a command where some packages cannot be imported; the last line on stderr lists what was asked for of them, and
# what was imported.
RUN = """
import atexit, json, sys

class Missing:
    def __init__(self, names):
        self.names, self.asked = names, []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = Missing(json.loads(sys.argv.pop(1)))
sys.meta_path.insert(0, missing)

@atexit.register
def say():
    sys.stderr.write("\\n" + json.dumps([missing.asked, sorted({name.partition(".")[0] for name in sys.modules})]))

from gemma_mtp.runtime.cli.main import main
main()
"""


# What the extra "convert" brings.
CONVERT = tuple(name for name in main.INSTALLS if name != "llama_cpp")


def run(missing: tuple[str, ...], *command: str | Path) -> tuple[subprocess.CompletedProcess[str], list[str], set[str]]:
    """Run a command without some packages: how it ended, what it asked for of them, and what it imported."""
    line = [sys.executable, "-c", RUN, json.dumps(missing), *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    done.stderr, _, last = done.stderr.rpartition("\n")
    asked, imported = json.loads(last)
    return done, asked, set(imported)


@pytest.mark.parametrize(
    "command",
    [
        (),
        *((name,) for name in main.COMMANDS),
        ("ollama", "create"),
        ("ollama", "attach"),
        ("ollama", "serve"),
        ("ollama", "engine"),
        ("ollama", "engine", "install"),
    ],
    ids=" ".join,
)
def test_help_needs_neither_libllama_nor_torch_nor_an_extra(command: tuple[str, ...]) -> None:
    done, asked, _ = run((*HEAVY, *main.INSTALLS, "safetensors", "matplotlib"), *command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    assert asked == []


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "{out}/{target}"), ("inspect", FOLDERS[0]), ("verify", "{out}"), ("modelfile", "{out}"),
        ("modelfile", "{out}/{target}"), ("convert", *FOLDERS, "-o", "{tmp}/new", "--dry-run"),
        ("convert", *FOLDERS, "-o", "{tmp}/new", "-q", "Q4_K_M"), ("launch", "vllm", *FOLDERS, "--print"),
        ("link", "{out}/{target}", "{out}/{drafter}", "-o", "{tmp}/linked.gguf", "--ordered-from", FOLDERS[1]),
    ],
    ids=lambda command: " ".join(map(str, command[:1])) + (" --dry-run" if "--dry-run" in command else ""),
)  # fmt: skip
def test_files_need_neither_libllama_nor_torch(command: tuple[str | Path, ...], demo: Pair, tmp_path: Path) -> None:
    names = {"out": demo.target.parent, "target": demo.target.name, "drafter": demo.drafter.name, "tmp": tmp_path}
    done, asked, imported = run((*HEAVY, "safetensors"), *(str(word).format(**names) for word in command))
    assert done.returncode == 0, done.stderr
    assert asked == []
    assert not imported & {*HEAVY, "safetensors"}


def test_what_is_converted_without_libllama_is_the_same(demo: Pair, tmp_path: Path) -> None:
    """Quantized by the same code of libggml, whether libllama is loaded beside it or not."""
    done, _, _ = run(HEAVY, "convert", *FOLDERS, "-o", tmp_path, "-q", "Q8_0")
    assert done.returncode == 0, done.stderr
    for path in (demo.target, demo.drafter):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_running_needs_libllama(demo: Pair) -> None:
    done, asked, _ = run(HEAVY, "run", demo.target, "-p", "import os", "-n", "4")
    assert done.returncode == 1
    assert asked == ["llama_cpp"]
    assert done.stderr == "error: run needs llama_cpp; run: gemma-mtp build\n"
    code = "import sys; sys.modules['llama_cpp'] = None; from gemma_mtp.runtime import Llama"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("ModuleNotFoundError: llama-cpp-python is not installed; run: gemma-mtp build\n")


def test_running_needs_the_packages_of_the_base_and_no_other(demo: Pair) -> None:
    base = ["llama-cpp-python", *(re.split(r"[^\w-]", requirement)[0] for requirement in PROJECT["dependencies"])]
    needed = set(map(normal, base)) | {"gemma-mtp"}
    waiting = list(needed - {"gemma-mtp"})
    while waiting:
        more = {normal(re.split(r"[^\w-]", each)[0]) for each in required(waiting.pop()) if "extra ==" not in each}
        waiting += more - needed
        needed |= more
    owners = {name: set(map(normal, distributions)) for name, distributions in packages_distributions().items()}
    others = [name for name, found in owners.items() if not needed & found]
    assert {"torch", "gguf", "rich", "huggingface_hub"} <= set(others)
    done, _, imported = run(tuple(others), "run", demo.target, "-p", "import os", "-n", "4", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert set(map(normal, base)) <= set().union(*(owners.get(name, set()) for name in imported))


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:  # of another platform
        return []


@pytest.mark.parametrize("command", [("verify", "{out}"), ("bench", "{out}"), ("inspect", FOLDERS[0])])
def test_a_missing_package_is_one_line(command: tuple[str | Path, ...], demo: Pair) -> None:
    done, _, _ = run(CONVERT, *(str(word).format(out=demo.target.parent) for word in command))
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {command[0]} needs \w+; run: pip install 'gemma-mtp\[convert\]'\n", done.stderr)


def test_names_of_the_package_are_there_before_libllama() -> None:
    code = (
        "import sys, gemma_mtp.runtime as runtime\n"
        "assert {'Llama', 'Stats', 'open_pair'} <= set(dir(runtime)) and 'llama_cpp' not in sys.modules\n"
        "runtime.Stats\n"
        "assert 'llama_cpp' not in sys.modules\n"
        "from gemma_mtp.runtime import *\n"
        "from gemma_mtp.runtime.llama import Llama as same, open_pair as one\n"
        "assert Llama is same is runtime.Llama and open_pair is one"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(gemma_mtp.runtime.__all__) <= set(dir(gemma_mtp.runtime))
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        getattr(gemma_mtp.runtime, "Lama")  # noqa: B009 (a type checker knows the names)
    with pytest.raises(ImportError, match="Lama"):
        exec("from gemma_mtp.runtime import Lama")


@pytest.mark.parametrize("part", ["convert", "runtime", "patches"])
def test_torch_is_for_tests_alone(part: str) -> None:
    """No import of it, nor one in a string that is run or handed to import_module."""
    hidden = re.compile(r"\b(import|from)\s+(torch|transformers)\b|(torch|transformers)([.:][\w.:]+)?")
    for path in (ROOT / part).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"torch", "transformers"}, path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = hidden.search(node.value) if "import" in node.value else hidden.fullmatch(node.value)
                assert not found, (path, node.value)


def test_only_the_tests_install_torch() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = {name for name, packages in extras.items() if any(each.startswith("torch") for each in packages)}
    assert wanted == {"test"}
    others = [each for name, packages in extras.items() if name != "test" for each in packages]
    assert not [each for each in others if re.match(r"gemma-mtp\[.*\btest\b", each)]
