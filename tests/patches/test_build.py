"""The native build's decisions; the build itself is what every other test runs on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from threading import Event, Thread

import llama_cpp
import pytest
from children import GUARD, until
from gemma_mtp.patches import source, stock, toolchain, wheel


def fake(folder: Path, name: str, text: str) -> None:
    script = folder / name
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


def test_missing_tools_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(source.BuildError) as told:
        toolchain.check_tools({"PATH": str(tmp_path)})
    message = str(told.value)
    assert "\n" not in message
    for tool in ("C compiler", "C++ compiler", "cmake", "git"):
        assert tool in message


@pytest.mark.parametrize(
    ("manager", "step"),
    [
        ("apt-get", "apt-get install build-essential cmake git nvidia-cuda-toolkit"),
        ("dnf", "dnf install gcc-c++ cmake git cuda-toolkit"),
        ("apk", "apk add build-base linux-headers cmake git; NVIDIA's CUDA toolkit"),
        ("", "pip install cmake"),
    ],
)
def test_what_is_missing_has_a_package(
    manager: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path / "none")
    if manager:
        fake(tmp_path, manager, "exit 0")
    with pytest.raises(source.BuildError) as told:
        toolchain.check_tools({"PATH": str(tmp_path)}, cuda=True)
    assert step in str(told.value)
    assert "nvcc" in str(told.value)
    assert "\n" not in str(told.value)


MAIN = (sys.executable, "-c", "from gemma_mtp.runtime.cli.main import main; main()")
INSTALL = (sys.executable, "-m", "gemma_mtp.patches.build", "install")


@pytest.mark.parametrize("command", [(*MAIN, "build"), INSTALL], ids=["gemma-mtp", "build.py"])
def test_missing_tool_stops_before_the_download(command: tuple[str, ...], tmp_path: Path) -> None:
    """The commands themselves: with no compiler on the PATH they name the tools and write nothing into the cache."""
    cache = tmp_path / "cache"
    env = {"PATH": str(tmp_path), "GEMMA_MTP_CACHE": str(cache), "CMAKE_ARGS": "-DNEVER_BUILT=1"}
    env |= {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: missing: C compiler, C++ compiler, cmake, git. Install: ")
    assert len(done.stderr.splitlines()) == 1
    assert not cache.exists()


def test_without_a_network_a_build_says_so_in_one_line(tmp_path: Path) -> None:
    index = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    env = {**os.environ, **index, "GEMMA_MTP_CACHE": str(tmp_path), "CMAKE_ARGS": "-DNEVER_BUILT=1"}
    done = subprocess.run(INSTALL, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: pip finds no llama-cpp-python==0.3.36; check the network")
    assert sum(line.startswith("error") or "Error" in line for line in done.stderr.splitlines()) == 1
    assert not list((tmp_path / "sdist").iterdir()), "nothing half-written"


def test_an_environment_without_pip_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(source.BuildError, match="has no pip"):
        source.pip("--version")


def test_the_check_tells_what_is_installed_and_which_kernels_run() -> None:
    command = [*MAIN, "build", "--check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["current"] and told["installed"] == told["wanted"] == llama_cpp.__version__
    assert Path(told["kernels"]).parent == Path(llama_cpp.__file__).parent / "lib"
    other = subprocess.run([*command, "--vulkan"], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert not json.loads(other.stdout)["current"]


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal is there")
def test_metal_is_for_macs() -> None:
    with pytest.raises(source.BuildError, match="macOS alone"):
        wheel.cmake_args(metal=True)


def test_a_portable_build_does_not_depend_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    native, portable = wheel.cmake_args(cuda=False), wheel.cmake_args(cuda=False, portable=True)
    keys = wheel.build_key(native), wheel.build_key(portable)
    monkeypatch.setattr(wheel, "cpu_features", lambda: "another CPU")
    assert wheel.build_key(native) != keys[0]
    assert wheel.build_key(portable) == keys[1]
    assert not wheel.is_on("GGML_NATIVE", portable)
    assert wheel.is_on("GGML_NATIVE", [*portable, "-DGGML_NATIVE:BOOL=on"])


def test_our_wheel_holds_what_a_build_reads(tmp_path: Path) -> None:
    """Built from the checkout and unpacked, it computes the key of the same build."""
    root = Path(__file__).parents[2]
    copy = tmp_path / "checkout"
    copied = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for name in copied:
        if name.split("/")[0] in ("convert", "runtime", "patches", "pyproject.toml", "README.md", "LICENSE"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", tmp_path, copy], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as made:
        made.extractall(tmp_path / "site")
    code = "from gemma_mtp.patches import wheel; print(wheel.__file__); print(wheel.build_key(wheel.cmake_args()))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    where, key = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert key == wheel.build_key(wheel.cmake_args())


def test_tools_here_are_enough() -> None:
    toolchain.check_tools()


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


@pytest.mark.parametrize("call", ["wheel.pip_wheel(here, here, {})", "source.pip('wheel')"])
def test_a_build_that_is_ended_leaves_no_compiler_behind(call: str, tmp_path: Path) -> None:
    """SIGTERM reaches what pip started, before the sources are cleared away under it."""
    started = tmp_path / "started"
    fake(tmp_path, "python", f"sleep 600 & echo $! > {started}.part; mv {started}.part {started}; wait")
    code = (
        "import signal, sys; from pathlib import Path; from gemma_mtp.patches import source, wheel; "
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)); "
        f"here = Path({str(tmp_path)!r}); sys.executable = str(here / 'python'); {call}"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        until(started.exists)
        compiler = int(started.read_text())
        process.terminate()
    assert process.returncode == 143
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(compiler)], capture_output=True, text=True, check=False)
    assert shown.stdout.strip()[:1] in ("", "Z")


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


def test_unpatched_llama_cpp_is_built_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by gcc 12 it ends in an illegal instruction on a CPU that has it."""
    monkeypatch.setattr(stock, "cpu_features", lambda: "flags : avx2 avx512f")
    elsewhere = stock.stock_dir()
    assert stock.without_amx() == []
    monkeypatch.setattr(stock, "cpu_features", lambda: "flags : avx2 avx512f amx_tile amx_int8")
    assert all("-mno-amx-int8" in flag for flag in stock.without_amx())
    assert stock.stock_dir() != elsewhere
