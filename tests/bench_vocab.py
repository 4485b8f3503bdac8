"""CPU time of a conversion to one and to four formats at once with the real vocabulary of Gemma 4, 262,144 tokens.

    python tests/bench_vocab.py [--runs N] [--folder FOLDER] [--tree CHECKOUT]

The vocabulary comes from the pinned llama.cpp (models/ggml-vocab-gemma-4.gguf), the weights are random and next to
nothing. With --tree the converter of another checkout is measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from real_vocab import make_folders

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("Q4_K_M", "Q8_0", "Q4_0", "BF16")


def run(folders: tuple[Path, Path], tree: Path, out: Path, formats: Sequence[str]) -> dict[str, float]:
    """CPU seconds, seconds and peak resident megabytes of one conversion by the converter of a checkout."""
    module, name = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["gemma-mtp"].split(":")
    code = f"from {module} import {name}; {name}()"
    command: list[str | Path] = [sys.executable, "-c", code, "convert", *folders, "-o", out]
    for quant in formats:
        command += ["-q", quant]
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(tree / "build" / "types")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    seconds = time.perf_counter() - start
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "seconds": seconds, "rss_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-vocab")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout with build/types (CONTRIBUTING)")
    chosen = parser.parse_args()
    folders = make_folders(chosen.folder)
    result: dict[str, Any] = {"runs": chosen.runs}
    for formats in (FORMATS[:1], FORMATS):
        found: list[dict[str, float]] = []
        for _ in range(chosen.runs):
            with tempfile.TemporaryDirectory(dir=chosen.folder) as out:
                found.append(run(folders, chosen.tree.resolve(), Path(out), formats))
            print(len(formats), found[-1], flush=True)
        result[" ".join(formats)] = {key: round(median(each[key] for each in found), 2) for key in found[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
