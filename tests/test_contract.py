"""docs/contract.md names every `mtp.*` key, docs/debugging.md every variable of ours: all that are in the sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A key, whole, between quotation marks: `gemma_mtp.convert` and llama-mtp.h are none.
KEY = re.compile(r"""["'](mtp(?:\.[a-z0-9_]+)+)["']""")
VARIABLE = re.compile(r"\bGEMMA_MTP_[A-Z_]+\b")


def texts(*folders: str) -> Iterator[str]:
    """Our sources: files as they are, of a patch the lines that it adds."""
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*")):
        if path.suffix == ".patch":
            yield "\n".join(line for line in path.read_text().splitlines() if line.startswith("+"))
        elif path.suffix in (".py", ".cu", ".c", ".cpp", ".sh", ".cmake"):
            yield path.read_text()


def found(pattern: re.Pattern[str], *folders: str) -> set[str]:
    return {match for text in texts(*folders) for match in pattern.findall(text)}


def rows(page: str) -> list[str]:
    """What stands in backquotes in the first column of the tables of a page."""
    return re.findall(r"^\| `([^`]+)` ", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def test_the_contract_names_every_key_once() -> None:
    keys = [name for name in rows("contract.md") if name.startswith("mtp.")]
    assert sorted(keys) == sorted(found(KEY, "convert", "runtime", "patches"))


def test_the_manual_of_debugging_names_every_variable_of_ours_once() -> None:
    variables = [name for name in rows("debugging.md") if VARIABLE.fullmatch(name)]
    assert sorted(variables) == sorted(found(VARIABLE, "convert", "runtime", "patches", "tests"))


def test_variables_that_a_patch_reads_are_explained() -> None:
    read = found(re.compile(r'getenv\("([A-Z_]+)"\)'), "patches")
    assert read
    assert sorted(read - set(rows("debugging.md"))) == []


def test_variables_that_our_python_reads_are_explained() -> None:
    read = found(re.compile(r'\benv(?:iron)?(?:\.get\(|\[)"([A-Z_]+)"'), "convert", "runtime", "patches")
    assert "GEMMA_MTP_CACHE" in read
    assert sorted(read - set(rows("debugging.md"))) == []
