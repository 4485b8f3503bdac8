"""A library that was built for another CPU: one line that names what is missing, and never a signal."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import native
from llama_cpp import llama_cpp as lib

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"


@pytest.fixture(scope="module")
def used() -> list[str]:
    """Instruction sets that the installed library was built with."""
    lib._lib.ggml_cpu_built_with.restype = ctypes.c_char_p
    features: list[str] = lib._lib.ggml_cpu_built_with().decode().split()
    if not features:
        pytest.skip("built for the baseline of its architecture")
    return features


def run(*command: str | Path, hide: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "GGML_CPU_HIDE": hide}
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_this_cpu_has_all_of_it(used: list[str]) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        known = cpuinfo.read_text().replace("pni", "sse3").split()
        assert set(used) <= set(known)
    assert native.missing_feature() is None


@pytest.mark.parametrize("place", [0, -1])
def test_a_command_names_what_is_missing(place: int, used: list[str], demo: Pair) -> None:
    command = ["run", str(demo.target), "-p", "x", "-n", "2"]
    code = "from gemma_mtp.runtime.cli.main import main; main()"
    done = run(sys.executable, "-c", code, *command, hide=f"nothing {used[place]}")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert used[place] in done.stderr
    assert "gemma-mtp build" in done.stderr
    assert not done.stdout
    assert run(sys.executable, "-c", code, *command, hide="nothing").returncode == 0


def test_llama_server_names_it_and_ends(used: list[str], demo: Pair) -> None:
    done = run(SERVER, "-m", demo.target, "--port", "0", hide=used[-1])
    assert done.returncode == 1, done.returncode
    assert f"built for a CPU with {used[-1]}" in done.stderr
