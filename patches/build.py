"""The command over the series. Standard library only: it runs before anything is installed.

python patches/build.py install    # what `make native` runs
python patches/build.py wheel      # build it alone, print where it lies
python patches/build.py check      # what `make check-patches` runs
python patches/build.py stock      # what `make check-stock` runs
python patches/build.py kernels    # what `make check-kernels` runs
python patches/build.py arm        # what `make check-arm` runs
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: relative imports need to know the package (PEP 366)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "patches"

from .check import build_kernels, check, check_arm
from .source import BuildError, say
from .stock import build_stock
from .wheel import build_wheel, cmake_args, deliver, describe, install


def wheel(folder: Path, **options: Any) -> None:
    """Build the wheel, put it into a folder and print what it is."""
    print(describe(deliver(build_wheel(cmake_args(**options)), folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, install or check the patched llama-cpp-python.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, does: Callable[..., None], about: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=about, description=about)
        added.set_defaults(does=does)
        return added

    def building(added: argparse.ArgumentParser) -> None:
        added.add_argument("--cuda", action=argparse.BooleanOptionalAction, help="for NVIDIA's GPUs")
        added.add_argument("--metal", action=argparse.BooleanOptionalAction, help="for Apple's GPUs")
        added.add_argument("--vulkan", action="store_true", help="for GPUs with a Vulkan driver")
        added.add_argument("--portable", action="store_true", help="for every CPU of this architecture")

    building(action("install", lambda **options: install(cmake_args(**options)), "build it and install it here"))
    building(made := action("wheel", wheel, "build it, to be installed elsewhere"))
    made.add_argument("folder", nargs="?", type=Path, default=Path("dist"), help="where the wheel goes (dist)")
    action("check", check, "apply, export and compile every prefix of the series")
    action("stock", build_stock, "build the unpatched llama.cpp, to compare with")
    action("kernels", build_kernels, "build libggml for other instruction sets")
    action("arm", check_arm, "build libggml for ARM and test it under emulation")
    options = vars(parser.parse_args())
    does = options.pop("does")
    # As Ctrl-C: what was begun is cleared away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        does(**options)
    except BuildError as problem:
        say(f"error: {problem}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was installed")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
