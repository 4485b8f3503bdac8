"""The native build's decisions; the build itself is what every other test runs on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import llama_cpp
import pytest
from children import GUARD
from gemma_mtp.patches import build, source, toolchain, wheel


def test_missing_tools_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(source.BuildError) as told:
        toolchain.check_tools({"PATH": str(tmp_path)})
    message = str(told.value)
    assert "\n" not in message
    for tool in ("C compiler", "C++ compiler", "cmake", "git"):
        assert tool in message


def test_missing_tool_stops_before_the_download(tmp_path: Path) -> None:
    """The command itself: with no compiler on the PATH it names the tools and writes nothing into its cache."""
    cache = tmp_path / "cache"
    env = {"PATH": str(tmp_path), "GEMMA_MTP_CACHE": str(cache), "CMAKE_ARGS": "-DNEVER_BUILT=1"}
    script = Path(build.__file__).resolve()
    done = subprocess.run([sys.executable, script, "install"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: missing: a C compiler")
    assert len(done.stderr.splitlines()) == 1
    assert not cache.exists()


def test_tools_here_are_enough() -> None:
    toolchain.check_tools()


def fake(folder: Path, name: str, text: str) -> None:
    script = folder / name
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


def test_cuda_needs_a_gpu_and_nvcc(tmp_path: Path) -> None:
    path = f"{tmp_path}{os.pathsep}{Path(shutil.which('sh') or '/bin/sh').parent}"
    only = {"PATH": str(tmp_path)}
    assert not toolchain.use_cuda(only)
    fake(tmp_path, "nvidia-smi", "echo 'GPU 0: some device'")
    assert not toolchain.use_cuda(only)
    fake(tmp_path, "nvcc", "exit 0")
    assert toolchain.use_cuda({"PATH": path})
    assert not toolchain.use_cuda({"PATH": path, "GEMMA_MTP_CUDA": "0"})
    fake(tmp_path, "nvidia-smi", "echo 'no devices found'; exit 6")
    assert not toolchain.use_cuda({"PATH": path})
    assert toolchain.use_cuda({"PATH": path, "GEMMA_MTP_CUDA": "1"})
    with pytest.raises(source.BuildError, match="GEMMA_MTP_CUDA"):
        toolchain.use_cuda({"PATH": path, "GEMMA_MTP_CUDA": "yes"})


def test_cmake_args_of_the_user_come_last() -> None:
    flags = wheel.cmake_args({"PATH": "", "GEMMA_MTP_CUDA": "1", "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DX=1"})
    assert "-DGGML_CUDA=ON" in flags
    assert flags[-2:] == ["-DGGML_NATIVE=OFF", "-DX=1"]


def test_key_depends_on_flags_and_series(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wheel.build_key(["-DA=1"])
    assert plain == wheel.build_key(["-DA=1"])
    assert plain != wheel.build_key(["-DA=2"])
    monkeypatch.setattr(wheel, "series", list)
    assert plain != wheel.build_key(["-DA=1"])


def test_wrong_sdist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the right name with other contents is neither used from the cache nor accepted from pip."""
    name = f"llama_cpp_python-{source.upstream().version}.tar.gz"
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path))
    (tmp_path / "sdist").mkdir()
    (tmp_path / "sdist" / name).write_bytes(b"half a download")

    def download(*arguments: str) -> str:
        (Path(arguments[arguments.index("--dest") + 1]) / name).write_bytes(b"something else")
        return ""

    monkeypatch.setattr(source, "pip", download)
    with pytest.raises(source.BuildError, match=source.upstream().sha256):
        source.fetch_sdist()


def test_the_same_is_built_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    monkeypatch.setenv("GEMMA_MTP_CACHE", str(tmp_path))
    waiting, done = Event(), []
    monkeypatch.setattr(source, "say", lambda text: waiting.set())

    def second() -> None:
        with source.building("key"):
            done.append("second")

    with source.building("key"):
        other = Thread(target=second)
        other.start()
        assert waiting.wait(GUARD)
        done.append("first")
    other.join(GUARD)
    assert done == ["first", "second"]


def test_series_is_well_formed() -> None:
    assert source.series()
    for number, patch in enumerate(source.series(), 1):
        assert patch.name.startswith(f"{number:04d}-")
        for trailer in ("Upstream-Base: " + source.upstream().llama_cpp, "Forwarded: ", "Remove-When: "):
            assert re.search(rf"^{trailer}", patch.read_text(), re.MULTILINE), (patch.name, trailer)


def test_installed_build_is_ours() -> None:
    assert llama_cpp.__version__ == f"{source.upstream().version}+mtp.{len(source.series())}"
    assert wheel.installed()[1] == wheel.build_key(wheel.cmake_args())


@pytest.mark.parametrize("tool", ["llama-server", "llama-quantize"])
def test_tools_are_installed_with_the_package(tool: str) -> None:
    program = Path(llama_cpp.__file__).parent / "lib" / tool
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert "usage" in (done.stdout + done.stderr).lower()


def test_each_library_is_there_once() -> None:
    """Links to versioned names become copies in a wheel, and llama.cpp's own rules install them beside the package."""
    package = Path(llama_cpp.__file__).parent
    libraries = sorted(path.name for path in (package / "lib").iterdir() if "lib" in path.name)
    stems = [name.removeprefix("lib").split(".")[0] for name in libraries]
    assert "llama" in stems and "ggml-cpu" in stems
    assert len(stems) == len(set(stems)), libraries
    assert not list(package.parent.glob("lib/*llama*")), "beside the package"


def test_the_runtime_binds_plain_c_names() -> None:
    lib = llama_cpp.llama_cpp._lib
    for name in (
        "llama_set_embeddings_nextn",
        "llama_get_embeddings_nextn",
        "llama_get_embeddings_nextn_ith",
        "llama_set_nextn_layer_offset",
        "llama_get_ctx_other",
    ):
        assert hasattr(lib, name)
