"""libggml-cuda.so that needs nothing but NVIDIA's driver, for `make gpu-kit`.

The CUDA runtime is linked in, cuBLAS is replaced (tests/gpu/cublas), and libcuda.so.1 is the driver's, an empty library
of that name standing in for it here. nvcc is the one on the PATH, or comes from the package index into the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma_mtp.patches.source import VENDORED, BuildError, building, cache_dir, pip, run, say

CUBLAS = Path(__file__).resolve().parent / "gpu" / "cublas"
# Compiled for drivers of 580 and later. cccl, crt and nvvm are what nvcc itself needs.
TOOLKIT = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-cuda-runtime": "13.0.96",
    "nvidia-cuda-cccl": "13.0.85",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-nvvm": "13.0.88",
}
# Machine code for Hopper, and PTX that a driver compiles for what came later.
ARCHITECTURE = "90"
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_NATIVE=OFF",
    # nvcc would pack every kernel by itself; xz packs all of them, which are much alike, to a quarter of that.
    "-DGGML_CUDA_COMPRESSION_MODE=none", "-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF",
    f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}",
    # Or the linker drops libcuda.so.1, of which it has seen no function.
    "-DCMAKE_MODULE_LINKER_FLAGS=-Wl,--no-as-needed",
    # It meets the libggml-base.so of the kit's programs.
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "TOOLS", "SERVER")),
)  # fmt: skip
# The libraries that it may need: of glibc and of the compiler, the kit's, and the driver's.
NEEDED = {"libggml-base.so", "libcuda.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2",
          "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}  # fmt: skip
# What libggml-cuda.so is compiled from; a series that leaves these alone needs no other build.
COMPILED = ("ggml/include", "ggml/src/ggml-cuda")
HEADERS = ("ggml-impl.h", "ggml-common.h", "ggml-backend-impl.h")


def nvcc() -> Path:
    """NVIDIA's compiler: on the PATH, or from the package index (105 MB) and kept in the cache folder.

    Raises:
        BuildError: the package index cannot be reached, or lacks it.
    """
    if found := shutil.which("nvcc"):
        return Path(found).resolve()
    home = cache_dir() / "cuda" / TOOLKIT["nvidia-cuda-nvcc"]
    root = home / "nvidia" / "cu13"
    if not (root / "bin" / "nvcc").exists():
        say(f"fetching nvcc {TOOLKIT['nvidia-cuda-nvcc']} (105 MB)")
        wanted = [f"{name}=={version}" for name, version in TOOLKIT.items()]
        part = home.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        pip("install", "--quiet", "--no-deps", "--target", part, *wanted)
        part.rename(home)
    if not (root / "lib64").exists():  # where nvcc looks for libraries
        (root / "lib64").symlink_to("lib")
    return root / "bin" / "nvcc"


def files(llama: Path) -> Iterator[Path]:
    """The sources of libggml-cuda.so in a llama.cpp tree, in a fixed order."""
    for folder in COMPILED:
        yield from sorted(path for path in (llama / folder).rglob("*") if path.is_file())
    yield from (llama / "ggml" / "src" / name for name in HEADERS)
    yield from sorted(CUBLAS.iterdir())


def library(tree: Path) -> Path:
    """libggml-cuda.so of a patched tree, from the cache or compiled (about an hour on two cores, once).

    What an interrupted run compiled is taken up by the next.

    Raises:
        BuildError: there is no nvcc to be had, or the build failed.
    """
    compiler = nvcc()
    version = re.search(r"release (\S+),", run([compiler, "--version"]))
    if version is None or int(version[1].split(".")[0]) < 13:
        raise BuildError(f"{compiler} is not of CUDA 13; take it off the PATH, and 13.0 is fetched.")
    digest = hashlib.sha256(" ".join((*FLAGS, version[1])).encode())
    for path in files(tree / VENDORED):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    home = cache_dir() / "gpu" / digest.hexdigest()[:16]
    made = home / "libggml-cuda.so"
    if not made.exists():
        with building(f"cuda-{home.name}"):
            if not made.exists():
                compile_library(tree / VENDORED, home, compiler)
    return made


def compile_library(llama: Path, home: Path, compiler: Path) -> None:
    """Compile libggml-cuda.so below `home` and leave it alone there."""
    say("compiling libggml-cuda.so for sm_90: about an hour on two cores, once")
    if not (home / "llama.cpp").exists():
        shutil.rmtree(home / "llama.part", ignore_errors=True)
        shutil.copytree(llama, home / "llama.part", symlinks=True)
        (home / "llama.part").rename(home / "llama.cpp")
    cmake(home / "llama.cpp", home / "build", stand_ins(home / "toolkit", compiler), compiler, FLAGS, ["ggml-cuda"])
    built = home / "build" / "bin" / "libggml-cuda.so"
    needs = set(re.findall(r"NEEDED +(\S+)", run(["objdump", "-p", built])))
    if not {"libggml-base.so", "libcuda.so.1"} <= needs <= NEEDED:
        raise BuildError(f"{built} needs {', '.join(sorted(needs))}, not what the machine is sure to have.")
    shutil.copy2(built, home / "libggml-cuda.so")
    for folder in ("llama.cpp", "build", "toolkit"):
        shutil.rmtree(home / folder)


def cmake(
    llama: Path, build: Path, libraries: Path, compiler: Path, flags: Sequence[str], targets: Sequence[str]
) -> None:
    """Configure and build targets with a compiler and with stand-ins for the toolkit's libraries."""
    path = f"{compiler.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    options = (*flags, f"-DCUDA_CUDART={libraries / 'libcudart.so'}", f"-DCMAKE_CUDA_FLAGS=-I{CUBLAS}")
    run(["cmake", "-S", llama, "-B", build, *options], None, PATH=path)
    run(["cmake", "--build", build, "-j", str(os.cpu_count() or 2), "--target", *targets], None, PATH=path)


def stand_ins(folder: Path, compiler: Path) -> Path:
    """What CMake shall find in place of the toolkit's libraries: scripts for the linker, and an empty libcuda.so.1."""
    folder.mkdir(exist_ok=True)
    compiled = folder / "cublas.o"
    run([compiler, f"-arch=sm_{ARCHITECTURE}", "-O2", "-std=c++17", f"-I{CUBLAS}", "-Xcompiler",
         "-fPIC,-fvisibility=hidden", "-c", CUBLAS / "cublas.cu", "-o", compiled])  # fmt: skip
    root = compiler.parent.parent
    static = next(root.glob("lib*/libcudart_static.a"), None) or next(root.rglob("libcudart_static.a"))
    (folder / "libcudart.so").write_text(f"GROUP ( {static} -ldl -lrt -lpthread )\n")
    (folder / "libcublas.so").write_text(f"GROUP ( {compiled} {static} -ldl -lrt -lpthread )\n")
    source = folder / "empty.c"
    source.write_text("")
    run(["cc", "-shared", "-fPIC", source, "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so"])
    return folder


def compile_all(llama: Path, into: Path) -> None:
    """Everything of the kit's sources, on the machine itself: for its own GPU alone, which is quicker."""
    compiler = nvcc()
    into.mkdir(parents=True, exist_ok=True)
    libraries = stand_ins(into / "toolkit", compiler)
    flags = [flag for flag in FLAGS if "ARCHITECTURES" not in flag and "LLAMA_BUILD" not in flag]
    flags += ["-DCMAKE_CUDA_ARCHITECTURES=native", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
              "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF"]  # fmt: skip
    targets = ["ggml-cuda", "ggml-cpu", "llama-server", "llama-bench", "mtmd", "test-backend-ops"]
    cmake(llama, into / "build", libraries, compiler, flags, targets)
    for path in (into / "build" / "bin").iterdir():
        shutil.copy2(path, into / path.name)


if __name__ == "__main__":
    try:
        compile_all(Path(sys.argv[1]), Path(sys.argv[2]))
    except BuildError as problem:
        sys.exit(str(problem))
