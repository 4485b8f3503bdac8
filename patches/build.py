"""Build and install llama-cpp-python with our series applied.

Standard library only: it runs before anything is installed.

The sdist named in UPSTREAM is fetched with pip, checked against its hash, patched with `git am` in a work tree of its
own and built into a wheel. The wheel is cached by the hash of the pin, the series, the build flags and the CPU's
features (`-march=native`), so that a second run only installs.

    python patches/build.py install    # what `make native` runs
    python patches/build.py check      # what `make check-patches` runs
    python patches/build.py stock      # what `make check-stock` runs
    python patches/build.py kernels    # what `make check-kernels` runs
    python patches/build.py arm        # what `make check-arm` runs
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENDORED = "vendor/llama.cpp"
STAMP = "gemma-mtp-build.json"
# What llama.cpp's own rules install beside the package: the libraries again, headers, and scripts that nothing runs.
EXCLUDED = "lib/**;include/**;bin/**"
IDENTITY = ("-c", "user.name=gemma-mtp", "-c", "user.email=gemma-mtp@localhost", "-c", "core.autocrlf=false")


class BuildError(RuntimeError):
    """A build that cannot go on; the message says what to do next."""


@dataclass(frozen=True)
class Upstream:
    """The pinned release: version and sha256 of the sdist, and the llama.cpp commit inside it."""

    version: str
    sha256: str
    llama_cpp: str


def upstream() -> Upstream:
    """Read the pin from patches/UPSTREAM."""
    text = (HERE / "UPSTREAM").read_text()
    pins = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return Upstream(pins["llama-cpp-python"], pins["sdist-sha256"], pins["llama.cpp"])


def series() -> list[Path]:
    """The patches, in the order they apply."""
    return sorted(HERE.glob("[0-9][0-9][0-9][0-9]-*.patch"))


def cache_dir() -> Path:
    """The one folder outside the checkout: $GEMMA_MTP_CACHE, or gemma-mtp in the user's cache folder."""
    named = os.environ.get("GEMMA_MTP_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else base / "gemma-mtp"


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


def run(command: Sequence[str | Path], cwd: Path | None = None, **env: str) -> str:
    """Run a command and return its output; a failure raises with the last lines it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildError(f"{' '.join(map(str, command[:4]))} ... failed with status {done.returncode}:\n{tail}")
    return done.stdout


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_sdist() -> Path:
    """The pinned sdist, from the cache or downloaded by pip, with its hash checked either way.

    Raises:
        BuildError: the download failed, or the file is not the pinned one.
    """
    pin = upstream()
    name = f"llama_cpp_python-{pin.version}.tar.gz"
    kept = cache_dir() / "sdist" / name
    if kept.exists() and sha256(kept) == pin.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    say(f"downloading llama-cpp-python {pin.version} (75 MB)")
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        wanted = f"llama-cpp-python=={pin.version}"
        pip("download", "--no-deps", "--no-binary", ":all:", "--dest", folder, wanted)
        got = Path(folder) / name
        if not got.exists():
            raise BuildError(f"pip downloaded {sorted(p.name for p in Path(folder).iterdir())}, not {name}.")
        if (found := sha256(got)) != pin.sha256:
            raise BuildError(f"{name} has sha256 {found}, wanted {pin.sha256}; the index serves another file.")
        got.replace(kept)
    return kept


def pip(*arguments: str | Path, **env: str) -> str:
    return run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], None, **env)


def unpack(into: Path, *only: str) -> Path:
    """Unpack the sdist (or what lies below the paths in `only`) into a folder; returns the sdist's root."""
    root = f"llama_cpp_python-{upstream().version}"
    with tarfile.open(fetch_sdist()) as archive:
        # The sdist carries upstream's .git folder and submodule link; ours must be the only repository there.
        prefixes = tuple(f"{root}/{part}" for part in only) or (root,)
        wanted = (m for m in archive if m.name.startswith(prefixes))
        members = [m for m in wanted if ".git" not in Path(m.name).parts]
        archive.extractall(into, members=members, filter="data")
    return into / root


def git(tree: Path, *arguments: str | Path) -> str:
    # The ceiling keeps git from taking the checkout around the cache folder for the repository to work on.
    return run(["git", *IDENTITY, *arguments], cwd=tree, GIT_CEILING_DIRECTORIES=str(tree.parent))


@contextmanager
def patched_tree() -> Iterator[Path]:
    """A temporary copy of the sdist as a git repository, the series applied as commits over the tag `base`."""
    work = cache_dir() / "work"
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        tree = unpack(Path(folder))
        git(tree, "init", "--quiet")
        git(tree, "add", "--force", VENDORED)
        git(tree, "commit", "--quiet", "--no-verify", "-m", f"llama.cpp {upstream().llama_cpp}")
        git(tree, "tag", "base")
        if series():
            git(tree, "am", "--quiet", "--committer-date-is-author-date", f"--directory={VENDORED}", *series())
        yield tree


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


@contextmanager
def building(what: str) -> Iterator[None]:
    """Hold a lock in the cache folder: a second run waits for what the first builds, and finds it there."""
    lock = cache_dir() / "work" / f"{what}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run that builds the same")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def check() -> None:
    """Apply the series, export it again, compare with the files here, and compile every prefix of it."""
    check_tools()
    with patched_tree() as tree:
        exported = tree.parent / "exported"
        form = ("--zero-commit", "--no-signature", "--no-numbered", "--full-index", f"--relative={VENDORED}")
        git(tree, "format-patch", "--quiet", *form, "-o", exported, "base")
        for patch in series():
            # git prints the summaries of new files from the root of the repository, whatever --relative says
            if (exported / patch.name).read_bytes().replace(f" {VENDORED}/".encode(), b" ") != patch.read_bytes():
                raise BuildError(f"{patch.name} differs from its own export; replace it with the output of git {form}.")
            text = patch.read_text()
            for trailer in ("Upstream-Base:", "Forwarded:", "Remove-When:"):
                if not re.search(rf"^{trailer} \S", text, re.MULTILINE):
                    raise BuildError(f"{patch.name} lacks the trailer {trailer}")
        commits = git(tree, "rev-list", "--reverse", "base..HEAD").split()
        for commit, patch in zip(commits, series(), strict=True):
            git(tree, "checkout", "--quiet", commit)
            compile_tree(tree, f"up to {patch.name}", "llama", "llama-common")
    say(f"{len(series())} patches apply, export unchanged and compile")


def compile_tree(tree: Path, label: str, *targets: str, name: str = "build", flags: Sequence[str] = ()) -> Path:
    """Build targets of the tree's llama.cpp in a folder that the next call takes up; returns where they lie."""
    say(f"compiling {label}")
    build = tree.parent / name
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", *cmake_args(), *flags)
    run(["cmake", "-S", tree / VENDORED, "-B", build, "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", *options])
    run(["cmake", "--build", build, "-j", str(os.cpu_count() or 2), "--target", *targets])
    return build / "bin"


def stock_dir() -> Path:
    """Where the unpatched llama-server and libraries of the pinned tree are kept once `build.py stock` has run."""
    return (
        cache_dir() / "stock" / hashlib.sha256(" ".join([upstream().sha256, *cmake_args()]).encode()).hexdigest()[:16]
    )


# Instruction sets that the kernels of the series tell apart, beside those of the machine itself.
_AVX512 = ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")
KERNEL_VARIANTS = {
    "avx2": (),
    "avx-vnni": ("-DGGML_AVX_VNNI=ON",),
    "avx512": tuple(f"-DGGML_{name}=ON" for name in _AVX512),
    "amx": tuple(f"-DGGML_{name}=ON" for name in (*_AVX512, "AMX_TILE", "AMX_INT8")),
}
# What a CPU must have for them, beyond AVX2; named as in /proc/cpuinfo.
KERNEL_NEEDS = {"avx-vnni": "avx_vnni", "avx512": "avx512_bf16", "amx": "amx_int8"}


def kernels_dir(variant: str) -> Path:
    """Where libggml of the patched tree is kept, built for another instruction set, once `build.py kernels` has run."""
    return cache_dir() / "kernels" / f"{build_key(KERNEL_VARIANTS[variant])}-{variant}"


def build_kernels() -> None:
    """Build libggml for each of `KERNEL_VARIANTS`, to check the kernels that this machine would not choose."""
    check_tools()
    common = ("-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON")
    missing = [variant for variant in KERNEL_VARIANTS if not kernels_dir(variant).exists()]
    if not missing:
        return
    with patched_tree() as tree:
        for variant in missing:
            flags = (*common, *KERNEL_VARIANTS[variant])
            built = compile_tree(tree, f"libggml for {variant}", "ggml-cpu", name=variant, flags=flags)
            kernels_dir(variant).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(built, kernels_dir(variant))


# Architectures that the kernels of the series tell apart on ARM, and the CPU that qemu plays for each.
ARM_VARIANTS = {
    "armv8.2-a+dotprod+fp16": "cortex-a76",
    "armv8.2-a+dotprod+fp16+i8mm": "max",
    "armv8.2-a+dotprod+fp16+i8mm+sve": "max,sve-default-vector-length=32",
}
# What test-backend-ops is to run there: all of an operation, or the cases that match.
ARM_OPERATIONS = {
    "TANH": "",
    "GELU": "",
    "GEGLU": "",
    "FLASH_ATTN_EXT": r"hsk=(64|128),.*kv=113,nb=[13],.*sinks=0,max_bias=0.0*,logit_softcap=0.0*,",
}


def check_arm() -> None:
    """Build libggml for ARM and run its own test of the operations that the series touches, under emulation.

    Raises:
        BuildError: the cross compiler or qemu is not there, or a test failed.
    """
    check_tools()
    if missing := [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(tool)]:
        raise BuildError(f"missing: {', '.join(missing)}. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user")
    with patched_tree() as tree:
        llama, build = tree / VENDORED, tree.parent / "arm"
        ggml = build / "ggml" / "src"
        for arch, cpu in ARM_VARIANTS.items():
            say(f"compiling libggml for {arch}")
            run(
                ["cmake", "-S", llama, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SYSTEM_NAME=Linux",
                 "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
                 "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF",
                 f"-DGGML_CPU_ARM_ARCH={arch}", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]
            )  # fmt: skip
            run(["cmake", "--build", build, "-j", str(os.cpu_count() or 2), "--target", "ggml"])
            libraries = [ggml / f"lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base")]
            folders = ("ggml/include", "ggml/src", "ggml/src/ggml-cpu", "common")
            includes = [f"-I{llama / folder}" for folder in folders]
            programs = []
            for source in (HERE.parent / "tests" / "arm_products.cpp", llama / "tests" / "test-backend-ops.cpp"):
                programs.append(build / source.stem)
                compiler = ("aarch64-linux-gnu-g++", "-O1", "-std=c++17", "-static", "-w")
                run([*compiler, *includes, source, *libraries, "-o", programs[-1]])
            products, operations = (("qemu-aarch64", "-cpu", cpu, program) for program in programs)
            outputs = dict.fromkeys(("MUL_MAT", "MUL_MAT_ID"), run(products))
            for operation, cases in ARM_OPERATIONS.items():
                chosen = ("-p", cases) if cases else ()
                outputs[operation] = run([*operations, "-b", "CPU", "-o", operation, *chosen])
            for operation, said in outputs.items():
                passed = len(re.findall(rf"^ *{operation}\(.*OK", said, re.MULTILINE))
                if not passed:
                    raise BuildError(f"{operation} ran no case on {arch}:\n{said[-500:]}")
                say(f"{operation}: {passed} cases passed")


def build_stock() -> None:
    """Build the pinned llama.cpp without our series, to check that our files load where ours is not installed."""
    if stock_dir().exists():
        return
    check_tools()
    with building(stock_dir().name), tempfile.TemporaryDirectory(dir=cache_dir() / "work") as folder:
        if stock_dir().exists():
            return
        built = compile_tree(unpack(Path(folder)), "the unpatched llama.cpp", "llama-server", "llama-quantize", "mtmd")
        stock_dir().parent.mkdir(parents=True, exist_ok=True)
        shutil.move(built, stock_dir())
    say(f"built {stock_dir()}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, install or check the patched llama-cpp-python.")
    parser.add_argument("action", choices=["install", "check", "stock", "kernels", "arm"])
    action = parser.parse_args().action
    # As Ctrl-C: what was begun is cleared away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        actions = {"install": install, "check": check, "stock": build_stock, "kernels": build_kernels, "arm": check_arm}
        actions[action]()
    except BuildError as problem:
        say(f"error: {problem}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was installed")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
