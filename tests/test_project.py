"""What must stay true of the project's layout: who imports whom, and that docs/ tells the truth about files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PURE = ["runtime/verify.py", "runtime/draft_length.py", "convert/recipe.py", "convert/names.py", "convert/plan.py"]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_runtime_imports_only_link_from_convert() -> None:
    for path in (ROOT / "runtime").glob("*.py"):
        ours = [name for name in imported(path) if name.startswith("gemma_mtp.convert")]
        assert all(name.startswith("gemma_mtp.convert.link") for name in ours), (path, ours)


def test_convert_never_imports_runtime() -> None:
    for path in (ROOT / "convert").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("gemma_mtp.runtime")], path


@pytest.mark.parametrize("file", PURE)
def test_pure_modules_touch_no_native_code(file: str) -> None:
    roots = {name.split(".")[0] for name in imported(ROOT / file)}
    assert not roots & {"llama_cpp", "ctypes"}, roots


def test_the_docs_list_every_file_of_ours() -> None:
    listed = (ROOT / "docs" / "architecture.md").read_text()
    files = [*(ROOT / "convert").glob("*.py"), *(ROOT / "runtime").glob("*.py"), *(ROOT / "patches").glob("*.patch")]
    assert not [path.name for path in files if path.name not in listed]


def test_the_docs_name_no_file_that_is_not_there() -> None:
    tree = re.search(r"```\n(pyproject\.toml.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), name
        else:
            assert (ROOT / folder / name).exists(), folder + name


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, page.name


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {line.split()[1] for line in shown.splitlines()}
    wanted = {"help", "setup", "demo", "test", "native", "check", "fix", "bench", "check-patches", "clean"}
    assert wanted <= named
