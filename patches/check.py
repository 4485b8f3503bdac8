"""Checks of the series that build more than what is installed: every prefix, other instruction sets, ARM."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .rebase import exported
from .source import HERE, VENDORED, BuildError, cache_dir, git, patched_tree, run, say, series
from .stock import compile_tree
from .toolchain import check_tools
from .wheel import build_key


def check() -> None:
    """Apply the series, export it again, compare with the files here, and compile every prefix of it."""
    check_tools()
    with patched_tree() as tree:
        again = exported(tree)
        for patch in series():
            if again.get(patch.name) != patch.read_bytes():
                raise BuildError(f"{patch.name} differs from its own export; make it with build.py edit and export.")
            text = patch.read_text()
            for trailer in ("Upstream-Base:", "Forwarded:", "Remove-When:"):
                if not re.search(rf"^{trailer} \S", text, re.MULTILINE):
                    raise BuildError(f"{patch.name} lacks the trailer {trailer}")
        commits = git(tree, "rev-list", "--reverse", "base..HEAD").split()
        for commit, patch in zip(commits, series(), strict=True):
            git(tree, "checkout", "--quiet", commit)
            compile_tree(tree, f"up to {patch.name}", "llama", "llama-common")
    say(f"{len(series())} patches apply, export unchanged and compile")


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
            programs, ours = [], HERE.parent / "tests"
            theirs = llama / "tests" / "test-backend-ops.cpp"
            for source in (ours / "arm_products.cpp", ours / "arm_attention.cpp", theirs):
                programs.append(build / source.stem)
                compiler = ("aarch64-linux-gnu-g++", "-O1", "-std=c++17", "-static", "-w")
                run([*compiler, *includes, source, *libraries, "-o", programs[-1]])
            products, attention, operations = (("qemu-aarch64", "-cpu", cpu, program) for program in programs)
            outputs = dict.fromkeys(("MUL_MAT", "MUL_MAT_ID"), run(products)) | {"ATTENTION": run(attention)}
            for operation, cases in ARM_OPERATIONS.items():
                chosen = ("-p", cases) if cases else ()
                outputs[operation] = run([*operations, "-b", "CPU", "-o", operation, *chosen])
            for operation, said in outputs.items():
                passed = len(re.findall(rf"^ *{operation}\(.*OK", said, re.MULTILINE))
                if not passed:
                    raise BuildError(f"{operation} ran no case on {arch}:\n{said[-500:]}")
                say(f"{operation}: {passed} cases passed")
