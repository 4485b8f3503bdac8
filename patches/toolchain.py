"""What a build finds on this machine: compilers, CMake, git, what GPUs need; which package brings what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .source import BuildError

# What each package manager calls what a build needs, in the order in which managers are looked for.
PACKAGES = {
    "apt-get install": {"compiler": "build-essential", "cmake": "cmake", "git": "git", "nvcc": "nvidia-cuda-toolkit",
                        "glslc": "glslc libvulkan-dev spirv-headers"},
    "dnf install": {"compiler": "gcc-c++", "cmake": "cmake", "git": "git", "nvcc": "cuda-toolkit",
                    "glslc": "glslc vulkan-loader-devel spirv-headers-devel"},
    "pacman -S": {"compiler": "base-devel", "cmake": "cmake", "git": "git", "nvcc": "cuda",
                  "glslc": "shaderc vulkan-headers vulkan-icd-loader spirv-headers"},
    "zypper install": {"compiler": "gcc-c++", "cmake": "cmake", "git": "git", "nvcc": "cuda-toolkit",
                       "glslc": "shaderc vulkan-devel spirv-headers"},
    "apk add": {"compiler": "build-base linux-headers", "cmake": "cmake", "git": "git",
                "glslc": "shaderc vulkan-loader-dev vulkan-headers spirv-headers"},
    "brew install": {"cmake": "cmake", "git": "git", "glslc": "shaderc vulkan-headers vulkan-loader spirv-headers"},
}  # fmt: skip
# Where to get what the package managers above do not have.
ELSEWHERE = {
    "compiler": "xcode-select --install" if sys.platform == "darwin" else "a C and a C++ compiler",
    "cmake": "pip install cmake",
    "git": "git",
    "nvcc": "NVIDIA's CUDA toolkit (developer.nvidia.com/cuda-downloads)",
    "glslc": "the Vulkan SDK (vulkan.lunarg.com)",
}

# Where the CUDA toolkit goes unless told otherwise; it leaves the PATH to the user.
TOOLKIT = Path("/usr/local/cuda")


def found(name: str, env: Mapping[str, str] = os.environ) -> str | None:
    """Path of a program, None where it is not on the PATH."""
    return shutil.which(name, path=env.get("PATH"))


def nvcc(env: Mapping[str, str] = os.environ) -> str | None:
    """NVIDIA's compiler: as CUDACXX says, on the PATH, or where the CUDA toolkit puts it."""
    homes = (env.get("CUDA_HOME"), env.get("CUDA_PATH"), str(TOOLKIT))
    places = [env.get("CUDACXX"), found("nvcc", env), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def use_cuda(env: Mapping[str, str] = os.environ) -> bool:
    """Whether to build for CUDA: as GEMMA_MTP_CUDA says, else when a GPU and nvcc are both there."""
    if (said := env.get("GEMMA_MTP_CUDA")) is not None:
        if said not in ("0", "1"):
            raise BuildError(f"GEMMA_MTP_CUDA is {said!r}; set it to 1 or 0, or leave it unset.")
        return said == "1"
    smi = found("nvidia-smi", env)
    if smi is None or nvcc(env) is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def tools(env: Mapping[str, str] = os.environ, *, cuda: bool = False, vulkan: bool = False) -> dict[str, str | None]:
    """What a build runs and where it was found; None for what is missing."""

    def first(variable: str, *names: str) -> str | None:
        said = env.get(variable, "").split(" ")[0]
        return next((path for name in (said, *names) if name and (path := found(name, env))), None)

    there = {
        "C compiler": first("CC", "cc", "gcc", "clang"),
        "C++ compiler": first("CXX", "c++", "g++", "clang++"),
        "cmake": found("cmake", env),
        "git": found("git", env),
    }
    if cuda:
        there["nvcc"] = nvcc(env)
    if vulkan:
        there["glslc"] = found("glslc", env)
    return there


def check_tools(env: Mapping[str, str] = os.environ, *, cuda: bool = False, vulkan: bool = False) -> None:
    """Name every missing build tool at once, and what installs them, before anything is downloaded.

    Raises:
        BuildError: a C or C++ compiler, CMake or git is missing, or nvcc or glslc where the build needs it.
    """
    missing = [name for name, path in tools(env, cuda=cuda, vulkan=vulkan).items() if path is None]
    if not missing:
        return
    wanted = dict.fromkeys("compiler" if name.endswith("compiler") else name for name in missing)
    manager = next((each for each in PACKAGES if found(each.split(" ")[0], env)), None)
    packages = PACKAGES.get(manager or "", {})
    steps = [f"{manager} {' '.join(packages[each] for each in wanted if each in packages)}"] if packages else []
    steps += [ELSEWHERE[each] for each in wanted if each not in packages]
    raise BuildError(f"missing: {', '.join(missing)}. Install: {'; '.join(step for step in steps if step[-1] != ' ')}")


def cpu_features() -> str:
    """What -march=native depends on, so that a cache folder shared by two machines keeps their wheels apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = re.search(r"^(?:flags|Features)\s*:.*$", cpuinfo.read_text(), re.MULTILINE)
        return flags.group(0) if flags else platform.machine()
    return platform.processor() or platform.machine()
