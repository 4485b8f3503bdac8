"""llama_cpp's private members that we use: all in one table, and all in the pinned release."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime.borrowed import PRIVATE

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
TABLE = {name for members in PRIVATE.values() for name in members}


def private(name: str | None) -> bool:
    return bool(name) and str(name).startswith("_") and not str(name).startswith("__")


def members(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every `something._name`."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and private(node.attr))


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def defined(tree: ast.AST) -> set[str]:
    """Private names that the methods and the body of a class, or of a module, bring into being."""
    found = {node.attr for node in members(tree) if of_self(node) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return {name for name in found if private(name)}


def theirs() -> set[str]:
    """Private names that llama_cpp's Python code defines anywhere."""
    folder = Path(llama_cpp.__file__).parent
    return {name for path in folder.rglob("*.py") for name in defined(ast.parse(path.read_text()))}


def subclasses() -> set[str]:
    """Our classes that inherit llama_cpp.Llama's members."""
    nodes = [node for path in RUNTIME.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    bases = {n.name: {ast.unparse(base) for base in n.bases} for n in nodes if isinstance(n, ast.ClassDef)}
    found: set[str] = set()
    while new := {name for name, of in bases.items() if of & {"llama_cpp.Llama", *found}} - found:
        found |= new
    return found


def borrowed(tree: ast.Module, known: set[str], inheriting: set[str]) -> set[str]:
    """Private names of llama_cpp that a module uses.

    A name may be one of ours as well: through `self` of a class of ours that is none of theirs it is, and so it is
    where the same module brings it into being.
    """
    found = set()
    ours = set().union(*(defined(node) for node in tree.body if not inherits(node, inheriting)))
    for part in tree.body:
        within = inherits(part, inheriting)
        for node in members(part):
            foreign = (within and of_self(node)) or node.attr not in ours
            if foreign and node.attr in known:
                found.add(node.attr)
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom) and (each.module or "").partition(".")[0] == "llama_cpp":
            names = [*(each.module or "").split("."), *(alias.name for alias in each.names)]
            found |= {name for name in names if private(name)}
        elif isinstance(each, ast.Import):
            parts = [part for alias in each.names for part in alias.name.split(".") if "llama_cpp" in alias.name]
            found |= {part for part in parts if private(part)}
    return found


def inherits(node: ast.stmt, inheriting: set[str]) -> bool:
    return isinstance(node, ast.ClassDef) and node.name in inheriting


@pytest.fixture(scope="module")
def known() -> set[str]:
    return theirs()


def test_what_we_use_stands_in_the_table(known: set[str]) -> None:
    sources = {str(path.relative_to(RUNTIME)): ast.parse(path.read_text()) for path in RUNTIME.rglob("*.py")}
    used = {path: borrowed(tree, known, subclasses()) for path, tree in sources.items()}
    assert {name: more for name, names in used.items() if (more := names - TABLE)} == {}
    assert set().union(*used.values()) == TABLE, "a member that nobody uses any more"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("class Api(Context):\n def f(self): return self._batch", {"_batch"}),
        ("class Mine:\n def __init__(self): self._batch = 1\n def f(self): return self._batch", set()),
        ("def f(llm): return llm._mirostat_mu", {"_mirostat_mu"}),
        ("from llama_cpp._logger import set_verbose", {"_logger"}),
        ("from llama_cpp import _ctypes_extensions as more", {"_ctypes_extensions"}),
        ("def f(it): return it._nobody_has_this", set()),
    ],
)  # fmt: skip
def test_the_search_finds_them(code: str, found: set[str], known: set[str]) -> None:
    assert borrowed(ast.parse(code), known, {"Api"}) == found


def test_the_release_has_them(demo: Pair) -> None:
    options: dict[str, Any] = {"n_ctx": 256, "verbose": False, "n_threads": 1}
    with closing(llama_cpp.Llama(str(demo.target), **options)) as llm:
        owners = {"llama_cpp.Llama": llm, "llama_cpp.LlamaGrammar": llama_cpp.LlamaGrammar.from_string('root ::= "a"')}
        for place, names in PRIVATE.items():
            owner = owners.get(place) or importlib.import_module(place)
            for name in names:
                if place == "llama_cpp":
                    importlib.import_module(f"llama_cpp.{name}")
                else:
                    assert hasattr(owner, name), (place, name)
