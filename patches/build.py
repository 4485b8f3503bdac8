"""The command over the series. Standard library only: it runs before anything is installed.

python patches/build.py install      # what `make native` runs
python patches/build.py wheel        # what `make wheel` runs: built, not installed
python patches/build.py check        # what `make check-patches` runs
python patches/build.py stock        # what `make check-stock` runs
python patches/build.py kernels      # what `make check-kernels` runs
python patches/build.py arm          # what `make check-arm` runs
python patches/build.py edit DIR     # the series as commits, to change it
python patches/build.py export DIR   # the commits back to patches/
python patches/build.py bump TREE    # try the series on another llama.cpp
python patches/build.py ui           # what `make ui` runs: the web page of llama-server
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

from .bump import bump
from .check import build_kernels, check, check_arm
from .rebase import edit, export
from .source import BuildError, say
from .stock import build_stock
from .ui import build_ui
from .wheel import build_wheel, cmake_args, deliver, describe, install


def here(**options: Any) -> None:
    """Build the wheel and install it into this environment."""
    install(cmake_args(**options))


def wheel(folder: Path, **options: Any) -> None:
    """Build the wheel, put it into a folder and print what it is."""
    flags = cmake_args(**options)
    print(describe(deliver(build_wheel(flags), folder), flags))


def page() -> None:
    """Build the web page of llama-server and print where it is."""
    print(build_ui())


def arguments() -> dict[str, Any]:
    """What the command line asks for: `does`, and its keyword arguments."""
    parser = argparse.ArgumentParser(description="Build, install, check or change the patched llama-cpp-python.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, does: Callable[..., int | None], about: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=about, description=about)
        added.set_defaults(does=does)
        return added

    def kinds(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("--cuda", action=argparse.BooleanOptionalAction, help="for NVIDIA's GPUs")
        added.add_argument("--metal", action="store_true", help="for Apple's GPUs; on macOS the default")
        added.add_argument("--vulkan", action="store_true", help="for GPUs with a Vulkan driver")
        added.add_argument("--portable", action="store_true", help="for every CPU of this architecture")
        return added

    kinds(action("install", here, "build it and install it here"))
    made = kinds(action("wheel", wheel, "build it, to be installed elsewhere"))
    made.add_argument("folder", nargs="?", type=Path, default=Path("dist"), help="where the wheel goes (dist)")
    action("check", check, "apply the series, export it again, compile every prefix of it")
    action("stock", build_stock, "build the unpatched llama.cpp, to compare with")
    action("kernels", build_kernels, "build libggml for other instruction sets")
    action("arm", check_arm, "build libggml for ARM and test it under emulation")
    action("ui", page, "build the web page of llama-server with Node and keep it in the cache")
    made = action("edit", edit, "make a work tree with the series as commits")
    made.add_argument("into", type=Path, metavar="DIR", help="the folder to make")
    made.add_argument("--onto", type=Path, metavar="TREE", help="rebase them onto a folder or an sdist")
    made = action("export", export, "write the commits of such a work tree back to patches/")
    made.add_argument("tree", type=Path, metavar="DIR", help="a folder that `edit` made")
    made = action("bump", bump, "try the series on another llama.cpp and say what does not apply")
    made.add_argument("path", type=Path, metavar="TREE", help="a folder or an sdist (.tar.gz, .zip) of a llama.cpp")
    made.add_argument("--json", action="store_true", dest="as_json", help="print the report as JSON")
    return vars(parser.parse_args())


def main() -> int:
    given = arguments()
    does = given.pop("does")
    # As Ctrl-C: what was begun is cleared away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return does(**given) or 0
    except BuildError as problem:
        say(f"error: {problem}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was installed")
        return 130


if __name__ == "__main__":
    sys.exit(main())
