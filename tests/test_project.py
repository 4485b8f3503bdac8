"""What must stay true of the project's layout: who imports whom, and that docs/ tells the truth about files."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HALVES = ("convert", "runtime", "patches")
PURE = [
    "runtime/accept.py",
    "runtime/draft/length.py",
    "convert/tensor_types.py",
    "convert/names.py",
    "convert/plan.py",
]
# The one place where both halves meet: it names the commands of each, and imports what is called for.
MEETING = "runtime/cli/main.py"
DOTTED = re.compile(r"gemma_mtp(\.\w+)+(:\w+)?")


def modules(half: str) -> list[Path]:
    """The Python files of a half, those in its sub-packages included, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / half).rglob("*.py"))


def everything() -> list[Path]:
    return [path for half in HALVES for path in modules(half)]


def dotted(path: Path) -> str:
    """A module's name, from its file relative to the root."""
    parts = path.with_suffix("").parts
    return ".".join(["gemma_mtp", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports: inside functions too, relative ones, and those that stand in a string."""
    package = dotted(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{whole}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.value.replace(":", ".")


def is_of(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_the_rules_look_at_every_module() -> None:
    tracked = subprocess.run(["git", "ls-files", *HALVES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {Path(line) for line in tracked.split() if line.endswith(".py")}
    assert wanted <= set(everything())


def test_runtime_imports_only_link_and_sizes_from_convert() -> None:
    for path in modules("runtime"):
        ours = [name for name in imported(path) if is_of(name, "gemma_mtp.convert")]
        allowed = ("gemma_mtp.convert.link", "gemma_mtp.convert.sizes")
        strangers = [name for name in ours if not any(is_of(name, each) for each in allowed)]
        assert not strangers or str(path) == MEETING, (path, strangers)


def test_convert_never_imports_runtime() -> None:
    for path in modules("convert"):
        assert not [name for name in imported(path) if is_of(name, "gemma_mtp.runtime")], path


def test_no_module_imports_itself_through_others() -> None:
    known = {dotted(path): path for path in everything()}
    wanted: dict[str, set[str]] = {}
    for name, path in known.items():
        found = set()
        for each in imported(path):
            while each not in known and "." in each:
                each = each.rpartition(".")[0]
            found.add(each)
        wanted[name] = (found & set(known)) - {name}
    graphlib.TopologicalSorter(wanted).prepare()  # CycleError names the modules


@pytest.mark.parametrize("file", PURE)
def test_pure_modules_touch_no_native_code(file: str) -> None:
    roots = {name.split(".")[0] for name in imported(Path(file))}
    assert not roots & {"llama_cpp", "ctypes"}, roots


def tree() -> Iterator[str]:
    """The paths that docs/architecture.md lists: a line a file, indented under its folder."""
    found = re.search(r"```\n(pyproject\.toml.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert found is not None
    folders: list[str] = []
    for line in found.group(1).splitlines():
        name = line.split()[0]
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        yield "".join([*folders, name])
        if name.endswith("/"):
            folders.append(name)


def test_the_docs_list_every_file_of_ours_and_no_other() -> None:
    listed = list(tree())
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert len(listed) == len(set(listed))
    files = [str(path) for path in everything() if path.name != "__init__.py"]
    patches = [str(path.relative_to(ROOT)) for path in (ROOT / "patches").glob("*.patch")]
    assert sorted({*files, *patches} - set(listed)) == []


def test_the_walks_name_what_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    steps = re.findall(r"^\| `([a-z_/]+\.py)` \| `(\w+)` \|", text, re.MULTILINE)
    assert {path.split("/")[0] for path, _ in steps} == {"convert", "runtime"}
    for path, name in steps:
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}, (path, name)


def test_the_rules_name_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"def (test_\w+)", tests))
    assert named and sorted(named - defined) == []


def test_files_that_the_docs_name_are_there() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "patches" / "README.md"):
        for path in re.findall(r"`((?:convert|runtime|patches|tests|docs)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, page.name


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {line.split()[1] for line in shown.splitlines()}
    declared = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text().replace("\\\n", ""), re.MULTILINE)
    assert named == {name for line in declared for name in line.split()}


def test_every_package_is_packed() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packed) == sorted(dotted(path) for path in everything() if path.name == "__init__.py")


def test_no_text_holds_both_sides_of_a_merge() -> None:
    marker = re.compile(r"^(<{7}|>{7}|\|{7}) ", re.MULTILINE)
    pages = [path for kind in ("md", "py", "toml", "patch") for path in ROOT.glob(f"*.{kind}")]
    for folder in (*HALVES, "docs", "tests"):
        pages += [path for kind in ("md", "py", "toml", "patch") for path in (ROOT / folder).rglob(f"*.{kind}")]
    assert [path for path in pages if marker.search(path.read_text())] == []
