"""The command over the series. Standard library only: it runs before anything is installed.

python patches/build.py install    # what `make native` runs
python patches/build.py check      # what `make check-patches` runs
python patches/build.py stock      # what `make check-stock` runs
python patches/build.py kernels    # what `make check-kernels` runs
python patches/build.py arm        # what `make check-arm` runs
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if not __package__:  # run as a script: relative imports need to know the package (PEP 366)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "patches"

from .check import build_kernels, check, check_arm
from .source import BuildError, say
from .stock import build_stock
from .wheel import install


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
