"""Builds of llama.cpp's own programs: from the pinned tree as it is, or from ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .source import VENDORED, building, cache_dir, run, say, unpack, upstream
from .toolchain import check_tools, cpu_features
from .wheel import cmake_args


def compile_tree(tree: Path, label: str, *targets: str, name: str = "build", flags: Sequence[str] = ()) -> Path:
    """Build targets of the tree's llama.cpp in a folder that the next call takes up; returns where they lie."""
    say(f"compiling {label}")
    build = tree.parent / name
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", *cmake_args(), *flags)
    run(["cmake", "-S", tree / VENDORED, "-B", build, "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", *options])
    run(["cmake", "--build", build, "-j", str(os.cpu_count() or 2), "--target", *targets])
    return build / "bin"


def without_amx() -> list[str]:
    """Flags for a CPU with AMX, where the unpatched tree, compiled by gcc 12, ends in an illegal instruction (0014)."""
    if "amx_int8" not in cpu_features().split():
        return []
    return [f"-DCMAKE_{language}_FLAGS=-mno-amx-int8 -mno-amx-tile" for language in ("C", "CXX")]


def stock_dir() -> Path:
    """Where the unpatched llama-server and libraries of the pinned tree are kept once `build.py stock` has run."""
    key = " ".join([upstream().sha256, *cmake_args(), *without_amx()])
    return cache_dir() / "stock" / hashlib.sha256(key.encode()).hexdigest()[:16]


def build_stock() -> None:
    """Build the pinned llama.cpp without our series, to check that our files load where ours is not installed."""
    if stock_dir().exists():
        return
    check_tools()
    with building(stock_dir().name), tempfile.TemporaryDirectory(dir=cache_dir() / "work") as folder:
        if stock_dir().exists():
            return
        programs = ("llama-server", "llama-quantize", "mtmd")
        built = compile_tree(unpack(Path(folder)), "the unpatched llama.cpp", *programs, flags=without_amx())
        stock_dir().parent.mkdir(parents=True, exist_ok=True)
        shutil.move(built, stock_dir())
    say(f"built {stock_dir()}")
