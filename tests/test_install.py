"""What `make` installs for which target, and where the tests' torch comes from."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import install
import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU = ("--index-url", install.CPU)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip was told to install, on Linux on x86-64 without torch."""
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(install, "installed", lambda: "")
    monkeypatch.setattr(install, "install", lambda *arguments: told.append(arguments))
    return told


def offer(monkeypatch: pytest.MonkeyPatch, *indexes: tuple[str, ...]) -> None:
    monkeypatch.setattr(install, "offered", lambda build, *index: build.endswith("+cpu") and index in indexes)


@pytest.mark.parametrize("index", [(), CPU], ids=["pip's own index", "PyTorch's index"])
def test_torch_for_cpus_where_an_index_has_it(
    index: tuple[str, ...], ran: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Alone: everything else comes from the index that pip is set up for."""
    offer(monkeypatch, index)
    install.main()
    torch, rest = ran
    assert torch == ("--no-deps", *index, f"torch=={install.pinned()}+cpu")
    assert "--index-url" not in rest and rest[-1].endswith("[test]")
    assert "GB" not in capsys.readouterr().err


def test_the_size_is_said_where_none_has_it(
    ran: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch)
    install.main()
    assert len(ran) == 1 and ran[0][-1].endswith("[test]")
    assert install.SIZE in capsys.readouterr().err


@pytest.mark.parametrize("system", [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")], ids="-".join)
def test_elsewhere_nobody_is_asked(
    system: tuple[str, str], ran: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "platform", system[0])
    monkeypatch.setattr(platform, "machine", lambda: system[1])
    monkeypatch.setattr(install, "offered", pytest.fail)
    install.main()
    assert len(ran) == 1
    assert "GB" not in capsys.readouterr().err


def test_torch_that_is_there_stays(ran: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed", install.pinned)
    monkeypatch.setattr(install, "offered", pytest.fail)
    install.main()
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("torch (2.15.0+cpu)\nAvailable versions: 2.15.0+cpu, 2.13.0+cpu, 2.12.0+cpu\n  INSTALLED: none", True),
        ("torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0", False),
        ("", False),
    ],
)
def test_what_an_index_has(answer: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, answer, "")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done)
    assert install.offered("2.13.0+cpu", *CPU) == found


def test_an_index_that_cannot_be_reached_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert not install.offered("2.13.0+cpu", "--index-url", "http://127.0.0.1:9/simple")
    assert capfd.readouterr() == ("", "")


# What a line of a recipe runs, and the stamp of the packages that it needs; the first that fits counts.
NEEDS = {
    r"patches/build\.py wheel|/pip .* wheel": "$(WHEEL)",
    r"patches/build\.py": "$(BIN)/python",
    r"/(ruff|mypy) ": "$(TOOLS)",
    r"tests/(demo|coupling|gpu_kit)\.py": "$(READY)",
    r"-m pytest|tests/\w+\.py": "$(TESTS)",
}


def test_every_target_installs_what_it_runs() -> None:
    rules = re.findall(r"^([a-z-]+):(.*?)##.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    checked = set()
    for target, prerequisites, recipe in rules:
        wanted = {next((stamp for tool, stamp in NEEDS.items() if re.search(tool, line)), "") for line in
                  recipe.splitlines()} - {""}  # fmt: skip
        if "$(TESTS)" in wanted or "$(READY)" in wanted:
            wanted -= {"$(BIN)/python"}  # which both of them make
        assert wanted <= set(prerequisites.split()), target
        checked |= {target} if wanted else set()
    assert {"demo", "test", "check", "fix", "bench", "bench-convert", "check-kernels", "fuzz"} <= checked
