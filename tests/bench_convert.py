"""Time, memory and bytes of a conversion beside upstream's two steps, on a random checkpoint at E2B's proportions.

Runs alternate; medians count. The last line is one JSON object. What is converted: a target; ours converts its drafter
in the same run, upstream's figure is for the target alone, which is to upstream's advantage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import llama_cpp
from bench_checkpoint import SCALES, make
from gemma_mtp.patches import source

FORMATS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
OURS = "from gemma_mtp.runtime.cli.main import main; main()"
# Ends by saying what the process wrote, as Linux counts it.
SAY = "import sys, atexit; atexit.register(lambda: sys.stderr.write('\\n' + open('/proc/self/io').read())); "


class Run(NamedTuple):
    """Seconds, peak resident megabytes, and megabytes written of one command or of several in a row."""

    seconds: float
    rss: float
    written: float


def run(*command: str | Path) -> Run:
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read()
    if process.returncode:
        sys.exit(text[-2000:])
    wrote = [int(line.split()[1]) for line in text.splitlines() if line.startswith("wchar:")]
    return Run(seconds, usage.ru_maxrss / 1024, wrote[-1] / 1e6 if wrote else 0.0)


def ours(folders: tuple[Path, Path], quant: str, out: Path) -> tuple[Run, float]:
    command = ["convert", *map(str, folders), "-o", str(out), "-q", quant, "--force", "--json"]
    measured = run(sys.executable, "-c", SAY + OURS, *command)
    return measured, sum(path.stat().st_size for path in out.glob("*.gguf")) / 1e6


def upstream(folder: Path, quant: str, out: Path) -> Run:
    kept = source.cache_dir() / "upstream" / source.upstream().sha256[:16] / "convert_hf_to_gguf.py"
    first = run(sys.executable, kept, folder, "--outtype", "bf16", "--outfile", out / "upstream-BF16.gguf")
    if quant == "BF16":
        return first
    quantizer = Path(llama_cpp.__file__).parent / "lib" / "llama-quantize"
    second = run(quantizer, out / "upstream-BF16.gguf", out / f"upstream-{quant}.gguf", quant)
    (out / f"upstream-{quant}.gguf").unlink()
    return Run(first.seconds + second.seconds, max(first.rss, second.rss), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-convert"))
    parser.add_argument("--size", type=float, choices=SCALES, default=1.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--ours-only", action="store_true")
    chosen = parser.parse_args()
    folders = make(chosen.folder, chosen.size)
    source = sum((folder / "model.safetensors").stat().st_size for folder in folders) / 1e6
    for folder in folders:  # into the page cache
        with (folder / "model.safetensors").open("rb") as file:
            while file.read(1 << 24):
                pass
    found = {}
    for quant in chosen.formats:
        mine, theirs, size = [], [], 0.0
        for _ in range(chosen.runs):
            with tempfile.TemporaryDirectory(dir=chosen.folder) as out:
                measured, size = ours(folders, quant, Path(out))
                mine.append(measured)
            with tempfile.TemporaryDirectory(dir=chosen.folder) as out:
                theirs += [] if chosen.ours_only else [upstream(folders[0], quant, Path(out))]
        found[quant] = {
            "source_mb": round(source), "output_mb": round(size, 1), "written_mb": round(mine[0].written, 1),
            "ours_s": round(median(each.seconds for each in mine), 2),
            "ours_rss_mb": round(max(each.rss for each in mine)),
        }  # fmt: skip
        if theirs:
            seconds = median(each.seconds for each in theirs)
            found[quant] |= {
                "upstream_s": round(seconds, 2),
                "upstream_rss_mb": round(max(each.rss for each in theirs)),
                "times_faster": round(seconds / found[quant]["ours_s"], 2),
            }
        print(quant, found[quant], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
