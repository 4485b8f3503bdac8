"""Install what the tests need; `make test` runs it before them.

Standard library only. On Linux on x86-64 torch is taken as its CPU build, from the index that pip is set up for or from
PyTorch's own: the default index has the one for CUDA, gigabytes that the tests do not use. Elsewhere the default index
has the CPU build. All other packages come from the index that pip is set up for.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU = "https://download.pytorch.org/whl/cpu"
SIZE = "2.7 GB"  # of the wheels of torch and of what it needs of CUDA
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def pinned() -> str:
    """The version of torch that the tests are for, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = project["optional-dependencies"]["test"]
    return next(each.removeprefix("torch==") for each in wanted if each.startswith("torch=="))


def installed() -> str:
    """The version of torch that is installed, without the name of its build; "" if none is."""
    try:
        return version("torch").partition("+")[0]
    except PackageNotFoundError:
        return ""


def offered(build: str, *index: str) -> bool:
    """Whether an index can be reached and has a build of torch; `index` are pip's options that name it."""
    patience = ("--timeout", "5", "--retries", "0")
    try:
        found = subprocess.run(
            [*PIP, "index", "versions", "torch", *index, *patience],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return build in found.stdout.replace(",", " ").split()


def install(*arguments: str) -> None:
    """Run `pip install`; where it fails it has said why, and this process ends as it did."""
    if status := subprocess.call([*PIP, "install", "--quiet", *arguments]):
        sys.exit(status)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    say("installing the packages of the tests")
    build = f"{pinned()}+cpu"
    if (sys.platform, platform.machine()) == ("linux", "x86_64") and installed() != pinned():
        for index in ((), ("--index-url", CPU)):
            if offered(build, *index):
                # Without what it depends on: no package but torch is ever taken from that index.
                install("--no-deps", *index, f"torch=={build}")
                break
        else:
            say(f"no index that can be reached has torch for CPUs alone: downloading the one for CUDA, about {SIZE}")
    install("--no-build-isolation", "-e", f"{ROOT}[test]")


if __name__ == "__main__":
    main()
