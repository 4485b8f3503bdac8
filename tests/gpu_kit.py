"""`make gpu-kit`: one archive with what a machine without network needs to check and measure CUDA (docs/gpu.md).

Programs of the patched tree and of stock llama.cpp for any x86-64 of the last ten years, libggml-cuda.so (or, where no
nvcc is to be had, the sources alone), our package with the Python packages it imports, the bundled pair, the tests
marked `gpu`, and the script that runs it all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_cuda
from gemma_mtp.convert import convert_pair
from gemma_mtp.patches import source, stock
from gemma_mtp.patches.source import VENDORED, BuildError, cache_dir, patched_tree, pip, run, say, series, unpack

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
LIMIT = 40e6  # bytes of the archive
# A dictionary in which all of libggml-cuda.so has room: its kernels are much alike.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 192 << 20}]
QUANT = "Q8_0"
# What our package and its tests import and a machine may lack, all of it Python alone; numpy is not.
PACKAGES = (
    "click==8.5.1", "rich==15.0.0", "markdown-it-py==4.3.0", "mdurl==0.1.2", "pygments==2.21.0", "jinja2==3.1.6",
    "diskcache==5.6.3", "typing_extensions==4.16.0", "pytest==9.2.0", "pluggy==1.7.0", "iniconfig==2.3.1",
    "packaging==26.4", "gguf==0.19.0",
)  # fmt: skip
# Packages with no wheel of Python alone that do without what is compiled in them; as installed here.
PARTLY_COMPILED = ("markupsafe", "yaml")
# AVX2, FMA and F16C, no more: the machine's CPU is not known. Devices are libraries that are loaded if they can be.
PROGRAM_FLAGS = (
    "-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CUDA=OFF", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    *(f"-DCMAKE_{kind}_LINKER_FLAGS=-s" for kind in ("EXE", "SHARED", "MODULE")),
)  # fmt: skip
OURS = ("llama-server", "llama-bench", "test-backend-ops", "mtmd", "ggml-cpu")
STOCK = ("llama-server", "mtmd", "ggml-cpu")
# Of the sources, what libggml-cuda, libllama, llama-server and the test of the operations are compiled from.
SOURCES = ("CMakeLists.txt", "LICENSE", "cmake", "common", "include", "licenses", "scripts/ui-assets.cmake", "src",
           "vendor", "tools/server", "tools/ui/CMakeLists.txt", "tools/ui/ui.h.in", "tools/mtmd", "tools/llama-bench",
           "ggml", "tests/test-backend-ops.cpp")  # fmt: skip
# In place of upstream's lists of all tools and tests.
LISTS = {
    "tools": "llama_add_compile_flags()\n" + "".join(
        f"add_subdirectory({name})\n" for name in ("llama-bench", "mtmd", "ui", "server")
    ),
    "tests": "add_executable(test-backend-ops test-backend-ops.cpp)\n"
    "target_link_libraries(test-backend-ops PRIVATE llama-common)\n",
}  # fmt: skip
OTHER_BACKENDS = (
    "blas", "cann", "et", "hexagon", "hip", "metal", "musa", "opencl", "openvino", "rpc", "sycl", "virtgpu", "vulkan",
    "webgpu", "zdnn", "zendnn",
)  # fmt: skip
UNWANTED = {
    *(f"ggml-{name}" for name in OTHER_BACKENDS), "examples", "tests", "test", "webui", "public", "bench", "themes",
    "images", "docs", "node_modules", "test-1.jpeg", "test-2.mp3", "test-3.mp4",
}  # fmt: skip
COMPILERS = ("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1")


def kept(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, made once for a key; an interrupted run leaves nothing."""
    home = cache_dir() / "gpu" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            made = Path(folder) / name
            made.mkdir()
            make(made)
            made.rename(home)
    return home


def programs(tree: Path, label: str, targets: Sequence[str], into: Path) -> None:
    """Compile programs and libraries of a tree for any CPU, and copy them."""
    built = stock.compile_tree(tree, label, *targets, name=f"build-{into.name}", flags=PROGRAM_FLAGS)
    for path in built.iterdir():
        if path.suffix == ".so" or path.name in targets:
            shutil.copy2(path, into / path.name)


def sources(llama: Path, into: Path) -> None:
    """The sources that a machine with nvcc can compile by itself."""
    for name in SOURCES:
        place = into / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (llama / name).is_dir():
            shutil.copytree(llama / name, place, ignore=lambda _, names: UNWANTED & set(names))
        else:
            shutil.copy2(llama / name, place)
    for name, text in LISTS.items():
        (into / name / "CMakeLists.txt").write_text(text)


def packages(into: Path, tree: Path) -> None:
    """Our package, llama_cpp of the patched tree and what both import."""
    pip("install", "--quiet", "--no-deps", "--target", into, "--only-binary=:all:", "--platform=any",
        "--python-version=3.11", "--implementation=py", "--abi=none", *PACKAGES)  # fmt: skip
    pip("install", "--quiet", "--no-deps", "--target", into, "--no-build-isolation", ROOT)
    for name in PARTLY_COMPILED:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None, name
        ignored = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
        shutil.copytree(Path(found.origin).parent, into / name, ignore=ignored)
    shutil.copytree(tree / "llama_cpp", into / "llama_cpp", ignore=shutil.ignore_patterns("lib", "server"))
    version = f"{source.upstream().version}+mtp.{len(series())}"
    (into / "llama_cpp" / "__init__.py").write_text(
        (tree / "llama_cpp" / "__init__.py").read_text().replace(source.upstream().version, version)
    )
    for path in [*into.rglob("__pycache__"), into / "bin", *into.glob("gemma_mtp/patches/*.patch")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def scripts(into: Path) -> None:
    """The script that runs it all, the tests, and the counter of graphs and waits."""
    here = TESTS / "gpu"
    shutil.copy2(here / "run.sh", into / "run.sh")
    (into / "tests" / "gpu").mkdir(parents=True)
    for path in (here / "test_gpu.py", here / "table.py", TESTS / "gpu_cuda.py", TESTS / "mtp_library.py"):
        shutil.copy2(path, into / "tests" / path.name)
    shutil.copytree(gpu_cuda.CUBLAS, into / "tests" / "gpu" / "cublas")
    counts = into / "bin" / "libcounts.so"
    run(["cc", "-O2", "-shared", "-fPIC", "-s", here / "counts.c", "-o", counts, "-ldl"])
    (into / "bin" / "fallback").mkdir()
    for name in COMPILERS:
        found = Path(run(["c++", f"-print-file-name={name}"]).strip())
        shutil.copy2(found.resolve(), into / "bin" / "fallback" / name)


def pair(into: Path) -> None:
    """The bundled pair, converted, and its prompts."""
    folders = (TESTS / "pair" / "gemma-4-demo", TESTS / "pair" / "gemma-4-demo-assistant")
    with tempfile.TemporaryDirectory() as folder:
        made = convert_pair(*folders, Path(folder), QUANT)
        into.mkdir()
        shutil.copy2(made.target, into / "target.gguf")
        shutil.copy2(made.drafter, into / "drafter.gguf")
    shutil.copy2(TESTS / "pair" / "prompts.json", into / "prompts.json")


def assemble(into: Path) -> dict[str, Any]:
    """Put everything into a folder; returns what it is made of."""
    pin = source.upstream()
    key = " ".join((pin.sha256, *PROGRAM_FLAGS))
    patched = hashlib.sha256(b"".join(path.read_bytes() for path in series())).hexdigest()
    cuda: str | None = None
    with patched_tree() as tree:
        ours = kept("ours", f"{key} {OURS} {patched}", lambda at: programs(tree, "our llama.cpp", OURS, at))
        shutil.copytree(ours, into / "bin" / "ours")
        try:
            library = gpu_cuda.library(tree)
            shutil.copy2(library, into / "bin" / "ours")
            cuda = f"compiled for sm_{gpu_cuda.ARCHITECTURE}"
        except BuildError as problem:
            say(f"libggml-cuda.so is left out, the machine must compile it: {problem}")
            sources(tree / VENDORED, into / "source")
        packages(into / "python", tree)

    def unpatched(at: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_dir() / "work") as folder:
            programs(unpack(Path(folder)), "stock llama.cpp", STOCK, at)

    shutil.copytree(kept("stock", f"{key} {STOCK}", unpatched), into / "bin" / "stock")
    if cuda:
        # No patch changes what it is compiled from, or gpu_cuda would have compiled another.
        (into / "bin" / "stock" / "libggml-cuda.so").symlink_to("../ours/libggml-cuda.so")
    pair(into / "pair")
    scripts(into)
    os.environ["GEMMA_MTP_CUDA"] = "1"  # as run.sh has it
    (into / "stock-key").write_text(stock.stock_dir().name)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    about = {"made": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "llama_cpp_python": pin.version,
             "patches": len(series()), "libggml_cuda": cuda}  # fmt: skip
    (into / "kit.json").write_text(json.dumps(about))
    return about


def size(path: Path) -> int:
    """Bytes of a file or of all files below a folder."""
    return sum(each.lstat().st_size for each in [path, *path.rglob("*")] if each.is_file())


def pack(kit: Path, archive: Path) -> None:
    """Pack a folder, its largest file first: what is much alike among the others is then near enough to be seen."""
    largest = max((path for path in kit.rglob("*") if path.is_file()), key=size)
    inside = str(kit.name / largest.relative_to(kit))
    with lzma.open(archive, "wb", filters=XZ) as raw, tarfile.open(fileobj=raw, mode="w") as packed:
        packed.add(largest, inside)
        packed.add(kit, kit.name, filter=lambda member: None if member.name == inside else member)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", nargs="?", type=Path, default=ROOT / "build" / "gpu-kit.tar.xz")
    archive = parser.parse_args().archive
    try:
        with tempfile.TemporaryDirectory() as folder:
            kit = Path(folder) / "gpu-kit"
            kit.mkdir()
            about = assemble(kit)
            archive.parent.mkdir(parents=True, exist_ok=True)
            pack(kit, archive)
            held = {path.name: size(path) for path in sorted(kit.iterdir())}
    except BuildError as problem:
        say(f"error: {problem}")
        return 1
    for name, held_bytes in held.items():
        say(f"  {name:<12} {held_bytes / 1e6:7.1f} MB")
    print(f"{archive}: {size(archive) / 1e6:.1f} MB, {about}")
    if too_large := size(archive) > LIMIT:
        say(f"error: the archive is larger than {LIMIT / 1e6:.0f} MB")
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
