"""The command over the series. Standard library only: it runs before anything is installed.

python patches/build.py install    # what `make native` runs
python patches/build.py check      # what `make check-patches` runs
python patches/build.py stock      # what `make check-stock` runs
python patches/build.py kernels    # what `make check-kernels` runs
python patches/build.py arm        # what `make check-arm` runs
python patches/build.py edit DIR   # the series as commits, to change it
python patches/build.py export DIR # the commits back to patches/
python patches/build.py bump TREE  # try the series on another llama.cpp
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: relative imports need to know the package (PEP 366)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "patches"

from .bump import bump
from .check import build_kernels, check, check_arm
from .rebase import edit, export
from .source import BuildError, say
from .stock import build_stock
from .wheel import install


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build, install, check or change the patched llama-cpp-python.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("install", help="build it, or take it from the cache, and install it")
    actions.add_parser("check", help="apply the series, export it again, compile every prefix of it")
    actions.add_parser("stock", help="build the unpatched llama.cpp, to compare with")
    actions.add_parser("kernels", help="build libggml for other instruction sets")
    actions.add_parser("arm", help="build libggml for ARM and test it under emulation")
    action = actions.add_parser("edit", help="make a work tree with the series as commits")
    action.add_argument("dir", type=Path, help="the folder to make")
    action.add_argument("--onto", type=Path, metavar="TREE", help="rebase them onto a folder or an sdist")
    action = actions.add_parser("export", help="write the commits of such a work tree back to patches/")
    action.add_argument("dir", type=Path, help="a folder that `edit` made")
    action = actions.add_parser("bump", help="try the series on another llama.cpp and say what does not apply")
    action.add_argument("tree", type=Path, help="a folder or an sdist (.tar.gz, .zip) that holds a llama.cpp")
    action.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    # As Ctrl-C: what was begun is cleared away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        actions: dict[str, Callable[[], int | None]] = {
            "install": install,
            "check": check,
            "stock": build_stock,
            "kernels": build_kernels,
            "arm": check_arm,
            "edit": lambda: edit(given.dir, given.onto),
            "export": lambda: export(given.dir),
            "bump": lambda: bump(given.tree, given.json),
        }
        return actions[given.action]() or 0
    except BuildError as problem:
        say(f"error: {problem}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was installed")
        return 130


if __name__ == "__main__":
    sys.exit(main())
