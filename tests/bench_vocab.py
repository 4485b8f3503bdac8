"""CPU time of a conversion to four formats at once with the real vocabulary of Gemma 4, 262,144 tokens.

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
from pathlib import Path
from statistics import median
from typing import Any

from gemma_mtp.convert.gguf_io.read import read
from gemma_mtp.patches import source
from tiny import NO_PER_LAYER, make_drafter, make_target

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("Q4_K_M", "Q8_0", "Q4_0", "BF16")
VOCABULARY = f"{source.VENDORED}/models/ggml-vocab-gemma-4.gguf"
WIDTH = 64  # of the hidden states
NORMAL, BYTE = 1, 6  # llama.h, `llama_token_type`: all others are added tokens


def tokenizer() -> str:
    """tokenizer.json with the tokens and merges of llama.cpp's file."""
    with tempfile.TemporaryDirectory() as work:
        metadata = read(source.unpack(Path(work), VOCABULARY) / VOCABULARY).metadata
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].tolist()
    added = [
        {"id": place, "content": token, "special": True}
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind not in (NORMAL, BYTE)
    ]
    merges = [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]]
    model = {"type": "BPE", "byte_fallback": True, "merges": merges, "vocab": {t: n for n, t in enumerate(tokens)}}
    return json.dumps({"added_tokens": added, "model": model}, ensure_ascii=False)


def make(folder: Path) -> tuple[Path, Path]:
    """Folders of a target and its drafter, made only where they are not there yet."""
    folders = folder / "target", folder / "drafter"
    if not (folders[1] / "tokenizer.json").exists():
        text = tokenizer()
        size: dict[str, Any] = {"vocab_size": len(json.loads(text)["model"]["vocab"])}
        make_target(folders[0], **NO_PER_LAYER, **size, hidden_size=WIDTH)
        make_drafter(folders[1], ordered=False, backbone=WIDTH, **size, hidden_size=WIDTH // 2)
        for each in folders:
            (each / "tokenizer.json").write_text(text, encoding="utf-8")
    return folders


def run(folders: tuple[Path, Path], tree: Path, out: Path) -> dict[str, float]:
    """CPU seconds, seconds and peak resident megabytes of one conversion by the converter of a checkout."""
    module, name = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["gemma-mtp"].split(":")
    code = f"from {module} import {name}; {name}()"
    command: list[str | Path] = [sys.executable, "-c", code, "convert", *folders, "-o", out]
    for quant in FORMATS:
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
    folders = make(chosen.folder)
    found: list[dict[str, float]] = []
    for _ in range(chosen.runs):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as out:
            found.append(run(folders, chosen.tree.resolve(), Path(out)))
        print(found[-1], flush=True)
    result: dict[str, Any] = {key: round(median(each[key] for each in found), 2) for key in found[0]}
    print(json.dumps(result | {"formats": FORMATS, "runs": chosen.runs}))


if __name__ == "__main__":
    main()
