"""The wheel of llama-cpp-python with our series applied: how it is built, kept and installed.

The sdist named in UPSTREAM is fetched with pip, checked against its hash, patched with `git am` in a work tree of its
own and built into a wheel. The wheel is cached by the hash of the pin, the series, the build flags and the CPU's
features (`-march=native`), so that a second run only installs.
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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .source import HERE, BuildError, building, cache_dir, fetch_sdist, patched_tree, pip, say, series, upstream

STAMP = "gemma-mtp-build.json"
# What llama.cpp's own rules install beside the package: the libraries again, headers, and scripts that nothing runs.
EXCLUDED = "lib/**;include/**;bin/**"


def check_tools(env: Mapping[str, str] = os.environ) -> None:
    """Name every missing build tool at once, before anything is downloaded.

    Raises:
        BuildError: a C or C++ compiler, CMake or git is not on the PATH.
    """
    path = env.get("PATH")
    wanted = {
        "a C compiler (cc, gcc or clang)": [env.get("CC", "").split(" ")[0], "cc", "gcc", "clang"],
        "a C++ compiler (c++, g++ or clang++)": [env.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"],
        "cmake": ["cmake"],
        "git": ["git"],
    }
    missing = [name for name, programs in wanted.items() if not any(p and shutil.which(p, path=path) for p in programs)]
    if missing:
        raise BuildError(f"missing: {', '.join(missing)}. Install with your system's package manager and run again.")


def use_cuda(env: Mapping[str, str] = os.environ) -> bool:
    """Whether to build for CUDA: as GEMMA_MTP_CUDA says, else when a GPU and nvcc are both there."""
    if (said := env.get("GEMMA_MTP_CUDA")) is not None:
        if said not in ("0", "1"):
            raise BuildError(f"GEMMA_MTP_CUDA is {said!r}; set it to 1 or 0, or leave it unset.")
        return said == "1"
    path = env.get("PATH")
    smi = shutil.which("nvidia-smi", path=path)
    if smi is None or shutil.which("nvcc", path=path) is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def cmake_args(env: Mapping[str, str] = os.environ) -> list[str]:
    """CMake flags of the build; the user's CMAKE_ARGS come last and win. Metal is llama.cpp's default on macOS."""
    flags = ["-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF", f"-DGGML_CUDA={'ON' if use_cuda(env) else 'OFF'}"]
    # llama.cpp would ask git, and be told of the temporary repository that the series is applied in.
    flags.append(f"-DLLAMA_BUILD_COMMIT={upstream().llama_cpp}")
    return [*flags, *env.get("CMAKE_ARGS", "").split()]


def cpu_features() -> str:
    """What -march=native depends on, so that a cache folder shared by two machines keeps their wheels apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = re.search(r"^(?:flags|Features)\s*:.*$", cpuinfo.read_text(), re.MULTILINE)
        return flags.group(0) if flags else platform.machine()
    return platform.processor() or platform.machine()


def build_key(flags: Sequence[str]) -> str:
    """Hash of everything that decides what the wheel holds."""
    digest = hashlib.sha256()
    for part in (HERE / "UPSTREAM", HERE / "tools.cmake", *series()):
        digest.update(part.name.encode() + b"\0" + part.read_bytes() + b"\0")
    for word in (*flags, cpu_features(), platform.system(), platform.machine()):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def brand(tree: Path, key: str, flags: Sequence[str]) -> str:
    """Give the package its local version, the tools and the stamp that tells what it was built from."""
    version = f"{upstream().version}+mtp.{len(series())}"
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


def build_wheel() -> Path:
    """The wheel of the patched package, from the cache or built (about four minutes on two cores)."""
    flags = cmake_args()
    key = build_key(flags)
    home = cache_dir() / "wheels" / key
    if not list(home.glob("*.whl")):
        check_tools()
        with building(key):
            if not list(home.glob("*.whl")):
                fetch_sdist()
                _build_wheel(home, key, flags)
    return next(home.glob("*.whl"))


def _build_wheel(home: Path, key: str, flags: Sequence[str]) -> None:
    with patched_tree() as tree:
        version = brand(tree, key, flags)
        say(f"building llama-cpp-python {version} with {' '.join(flags)}: a few minutes, once")
        built = tree / "dist"
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
        env = {"CMAKE_ARGS": " ".join(flags), "CMAKE_BUILD_PARALLEL_LEVEL": jobs}
        pip_wheel(tree, built, env)
        home.mkdir(parents=True, exist_ok=True)
        wheel = next(built.glob("*.whl"))
        shutil.copy2(wheel, home / (wheel.name + ".part"))
        (home / (wheel.name + ".part")).rename(home / wheel.name)


def pip_wheel(tree: Path, built: Path, env: Mapping[str, str]) -> None:
    """Run `pip wheel`, showing the compiler's progress on a terminal and its last lines when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps", "-w", str(built)]
    command.append(f"--config-settings=wheel.exclude={EXCLUDED}")
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
    ) as process:
        try:
            for line in process.stdout or ():
                lines = [*lines[-60:], line.rstrip()]
                if step := re.search(r"\[(\d+)/(\d+)\]", line):
                    show(int(step[1]), int(step[2]))
        except BaseException:
            process.terminate()  # leaving the block waits for it
            raise
    if process.returncode:
        raise BuildError("the native build failed; its last lines:\n" + "\n".join(lines))


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


def installed_key() -> str | None:
    """Key of the build that this interpreter would import, None when it is not ours."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    stamp = Path(spec.origin).parent / STAMP
    return str(json.loads(stamp.read_text())["key"]) if stamp.exists() else None


def install() -> None:
    """Install the patched llama-cpp-python into this interpreter's environment, unless it is there already."""
    if installed_key() == build_key(cmake_args()):
        return
    wheel = build_wheel()
    pip("install", "--quiet", wheel)
    pip("install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    say(f"installed {wheel.name}")
