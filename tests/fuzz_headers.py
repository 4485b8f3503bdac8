"""Mutated safetensors and GGUF files against the readers, with the libraries behind them as judges (`make fuzz`).

Whatever a reader of ours refuses must be refused with one line; whatever it accepts, libggml, llama.cpp and safetensors
must read without a crash, and to the same result. A child process does each batch, so that a crash of native code is
seen; the file that caused it is kept in --keep under its seed. The same seed gives the same file.

    python tests/fuzz_headers.py --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 200
EDGES = (0, 1, 2, 3, 4, 7, 8, 31, 32, 63, 64, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62,
         2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
# Keys that llama.cpp computes with.
KEYS = re.compile(rb"gemma4(-assistant)?\.[a-z_.]+[a-z]|tokenizer\.ggml\.\w+_id|mtp\.ordered\.\w+|general\.alignment")
WORDS = re.compile(rb"[A-Za-z_]{3,}|\d+")


def numbers(data: bytearray, rng: random.Random, limit: int) -> None:
    """Put an edge case, or a neighbour of what is there, over a number of 1 to 8 bytes."""
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, limit - width))
    was = int.from_bytes(data[at : at + width], "little")
    value = rng.choice((*EDGES, was + 1, was - 1, was * 2, was ^ (1 << rng.randrange(8 * width))))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def pieces(data: bytearray, rng: random.Random, limit: int) -> None:
    """Cut out, double, move or overwrite a piece of the header, or cut the file off."""
    start = rng.randrange(limit)
    length = min(rng.choice((1, 2, 4, 8, 16, 100, 1000)), limit - start)
    piece = data[start : start + length]
    kind = rng.randrange(5)
    if kind == 0:
        del data[start : start + length]
    elif kind == 1:
        data[start:start] = piece
    elif kind == 2:
        at = rng.randrange(limit)
        data[at : at + length] = piece
    elif kind == 3:
        data[start : start + length] = rng.randbytes(length)
    else:
        del data[rng.choice((start, len(data) - rng.randrange(1, 2000))) :]


def words(data: bytearray, rng: random.Random, limit: int) -> None:
    """Exchange one number or word of the text in a header for another."""
    found = list(WORDS.finditer(bytes(data[:limit])))
    if not found:
        return
    one, other = rng.choice(found), rng.choice(found)
    edge = str(rng.choice((*EDGES, -1, 1e300, "true", "null", "[]", '"x"'))).encode()
    data[one.start() : one.end()] = rng.choice((other.group(), edge, one.group() + b"0", one.group()[:-1]))


def values(data: bytearray, rng: random.Random, limit: int) -> None:
    """Put an edge case over type, value, or number of values of one of KEYS."""
    found = list(KEYS.finditer(bytes(data[:limit])))
    if found:
        at = rng.choice(found).end() + rng.choice((0, 4, 4, 4, 8, 16))
        data[at : at + 4] = (rng.choice(EDGES) % 2**32).to_bytes(4, "little")


def mutate(seed: Path, header: int, rng: random.Random) -> bytes:
    """One to four mutations of a valid file, all within its header of that many bytes."""
    data = bytearray(seed.read_bytes())
    ways: tuple[Callable[[bytearray, random.Random, int], None], ...] = (numbers, pieces, words, values)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        limit = max(1, min(header, len(data)))
        if rng.random() < 0.5:  # the first bytes and the tables near the end hold the counts
            limit = rng.choice((min(limit, 64), min(limit, 2000), limit))
        rng.choice(ways)(data, rng, limit)
    return bytes(data)


def judge_gguf(path: Path) -> str:
    """Read one GGUF file here and, if it is accepted, with libggml and llama.cpp; what happened, in a word."""
    import llama_cpp
    from gemma_mtp.convert import link
    from gemma_mtp.convert.cli.inspect import plain_header
    from gemma_mtp.convert.integrity import verify_files

    try:
        header = link.read_header(path)
        json.dumps(plain_header(header))
    except link.MtpError as problem:
        assert "\n" not in str(problem), problem
        return "refused"
    try:
        verify_files(path)
    except link.MtpError as problem:
        assert "\n" not in str(problem), problem

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    lib = llama_cpp.llama_cpp._lib
    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = ctypes.c_void_p, (ctypes.c_char_p, Params)
    lib.gguf_get_data_offset.restype, lib.gguf_get_data_offset.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
    lib.gguf_get_n_tensors.restype, lib.gguf_get_n_tensors.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    lib.gguf_free.argtypes = (ctypes.c_void_p,)
    opened = lib.gguf_init_from_file(str(path).encode(), Params(True, None))
    assert opened, "accepted, but libggml refuses it"
    assert lib.gguf_get_n_tensors(opened) == len(header.tensors)
    assert lib.gguf_get_data_offset(opened) == header.data_start
    lib.gguf_free(opened)
    if header.arch in (link.TARGET_ARCH, link.DRAFTER_ARCH):
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            return "not loaded"
        if header.arch == link.TARGET_ARCH:
            decode(model)
        llama_cpp.llama_model_free(model)
        return "loaded"
    return "accepted"


def decode(model: object) -> None:
    """One token through a model, where a context can be made for it."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads = 64, 8, 1
    context = llama_cpp.llama_init_from_model(model, params)
    if context:
        tokens = (llama_cpp.llama_token * 1)(2)
        llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 1))
        llama_cpp.llama_free(context)


def judge_safetensors(path: Path) -> str:
    """Check one safetensors file here and, if it is accepted, read every tensor with safetensors."""
    from gemma_mtp.convert.errors import MtpError
    from gemma_mtp.convert.safetensors_file import read_entries
    from safetensors import safe_open

    try:
        read_entries(path)
    except MtpError as problem:
        assert "\n" not in str(problem), problem
        return "refused"
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            file.get_slice(name).get_shape()
    return "accepted"


JUDGES = {".gguf": judge_gguf, ".safetensors": judge_safetensors}


def batch(seeds: list[Path], headers: list[int], start: int, count: int, folder: Path) -> None:
    """Judge files `start` to `start + count`, leaving each on disk while it is read."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    seen: Counter[str] = Counter()
    for number in range(start, start + count):
        rng = random.Random(number)
        which = rng.randrange(len(seeds))
        path = folder / f"{number}{seeds[which].suffix}"
        path.write_bytes(mutate(seeds[which], headers[which], rng))
        seen[f"{seeds[which].suffix[1:]} {JUDGES[seeds[which].suffix](path)}"] += 1
        path.unlink()
    print(json.dumps(seen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="number of the first file")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fuzz"), help="where files that break something are kept"
    )
    parser.add_argument("--files", type=Path, nargs="+", help="valid files to start from")
    parser.add_argument("--batch", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.files:
        options.files = made(Path("build/fuzz-seeds"))
    headers = [header_bytes(path) for path in options.files]
    if options.batch:
        first, count = options.batch
        batch(options.files, headers, first, count, options.keep)
        return 0
    options.keep.mkdir(parents=True, exist_ok=True)
    end, number, total, broken = time.monotonic() + options.seconds, options.seed, Counter[str](), 0
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--keep", folder, "--batch", str(number), str(BATCH), "--files",
                       *map(str, options.files)]  # fmt: skip
            quick = {**os.environ, "GGML_NO_BACKTRACE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=quick)
            if done.returncode:
                broken += 1
                for path in Path(folder).iterdir():
                    path.rename(options.keep / path.name)
                    said = (done.stderr.strip() or "?").splitlines()[-1]
                    print(f"{path.name}: status {done.returncode}: {said}", flush=True)
                    number = int(path.stem) + 1 - BATCH
            else:
                total.update(json.loads(done.stdout.splitlines()[-1]))
        number += BATCH
    print(json.dumps({"files": sum(total.values()), "next seed": number, "broken": broken, **total}))
    return 1 if broken else 0


def header_bytes(path: Path) -> int:
    from gemma_mtp.convert import link

    if path.suffix == ".gguf":
        return link.read_header(path).data_start
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def made(folder: Path) -> list[Path]:
    """Valid files: a tiny random pair, its two GGUF files in F32 and Q4_0, and a shard of a few tensors."""
    from gemma_mtp.convert import convert_pair
    from tiny import make_drafter, make_target

    if not folder.exists():
        few: dict[str, Any] = {
            "num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0, "hidden_size": 64, "hidden_size_per_layer_input": 0, "intermediate_size": 64,
            "head_dim": 32, "global_head_dim": 32,
        }  # fmt: skip
        target = make_target(folder / "target", **few)
        same = {key: few[key] for key in ("intermediate_size", "head_dim", "global_head_dim")}
        drafter = make_drafter(folder / "drafter", ordered=True, backbone=64, **same)
        for quant in ("F32", "Q4_0"):
            convert_pair(target, drafter, folder / quant, quant, quant)
    return sorted([*folder.glob("*/*.gguf"), *folder.glob("*/*.safetensors")])


if __name__ == "__main__":
    sys.exit(main())
