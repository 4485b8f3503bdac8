"""Kernels for any number of rows: each has the same results in any company; and what follows for logits."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.convert.random_pair import write_pair
from gemma_mtp.patches import check, source, toolchain
from gemma_mtp.runtime import Llama
from tiny import PAIR

X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS = {"installed": Path(llama_cpp.__file__).parent / "lib"}
VARIANTS |= {name: check.kernels_dir(name) for name in check.KERNEL_VARIANTS}
# Variants of the portable wheel that have kernels of ours, and what a CPU must have for each.
PORTABLE = {"haswell": "avx2", "alderlake": "avx_vnni", "icelake": "avx512_vnni", "zen4": "avx512_bf16",
            "sapphirerapids": "amx_int8"}  # fmt: skip
# Formats of our kernels; a row of the first two is summed as by llama.cpp's kernels for one row.
SUMMED_AS_STOCK = ("Q4_0", "Q4_K")
FORMATS = (*SUMMED_AS_STOCK, "Q5_K", "Q6_K", "Q8_0")
SHAPES = [(256, 8), (512, 64), (1536, 264), (2048, 1000)]


def library(variant: str) -> Path:
    """The folder of libggml built for an instruction set; skips where there is none, or it would not run."""
    if not VARIANTS[variant].exists():
        pytest.skip(f"no {variant} build here; make check-kernels builds it")
    runs_here(check.KERNEL_NEEDS.get(variant))
    return VARIANTS[variant]


def runs_here(needed: str | None) -> None:
    if needed and needed not in toolchain.cpu_features().split():
        pytest.skip(f"this CPU has no {needed}")


def script(name: str, folder: Path, *arguments: Path | str, **env: str) -> str:
    command = [sys.executable, Path(__file__).parents[1] / name, folder, *arguments]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not X86, reason="the kernels are for x86; other machines keep llama.cpp's")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("program", ["mul_mat.py", "mul_mat_id.py"])
def test_a_row_has_the_same_products_in_any_company(program: str, variant: str, kind: str) -> None:
    """Up to 600 rows at once, or to an expert, against each of them alone; Q4_0 and Q4_K by stock's kernels."""
    folder, seed = library(variant), random.randrange(1 << 30)
    stock = {"GGML_SMALL_BATCH_ROWS": "0"} if kind in SUMMED_AS_STOCK else {}

    def digest(mode: str, seed: int, shape: tuple[int, int], **env: str) -> str:
        most = 600 if shape == SHAPES[1] and program == "mul_mat.py" else 96
        return script(program, folder, kind, *map(str, (*shape, seed, most)), mode, **env)

    for shape in SHAPES if variant == "installed" and program == "mul_mat.py" else SHAPES[1:3]:
        alone = digest("alone", seed, shape, **stock)
        assert digest("batch", seed, shape) == alone, (shape, seed)
        assert digest("batch", seed + 1, shape) != alone


@pytest.mark.skipif(not X86, reason="the kernels are for x86; other machines keep llama.cpp's")
@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_as_exact_as_those_of_stock(kind: str, tmp_path: Path) -> None:
    """They differ by the order of the sums alone: by some roundings of what the sums' parts are as large as."""

    def results(**env: str) -> Any:
        path = tmp_path / "results.npy"
        script("mul_mat.py", VARIANTS["installed"], kind, "2048", "264", "5", "20", "alone", path, **env)
        return np.load(path)

    ours, stock = results(), results(GGML_SMALL_BATCH_ROWS="0")
    assert np.sqrt(np.mean((ours - stock) ** 2)) < 4e-7 * np.std(stock)
    assert np.abs(ours - stock).max() < 4e-6 * np.std(stock)
    assert kind not in SUMMED_AS_STOCK or np.array_equal(ours, stock)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("variant", PORTABLE)
def test_each_variant_of_the_portable_wheel_has_our_kernels(
    variant: str, kind: str, portable: Path, tmp_path: Path
) -> None:
    built = portable / "llama_cpp" / "lib" / f"libggml-cpu-{variant}.so"
    assert b"GGML_SMALL_BATCH_ROWS" in built.read_bytes()
    runs_here(PORTABLE[variant])
    (tmp_path / "libggml-cpu.so").symlink_to(built)
    (tmp_path / "libggml-base.so").symlink_to(built.with_name("libggml-base.so"))
    arguments = (kind, *map(str, (*SHAPES[1], 1, 64)))
    assert script("mul_mat.py", tmp_path, *arguments, "batch") == script("mul_mat.py", tmp_path, *arguments, "alone")


def test_the_tile_configuration_of_amx_is_stored() -> None:
    """gcc 12 dropped the stores of widths and rows, which lie 16 and 48 bytes into it: an illegal instruction."""
    if not (built := VARIANTS["amx"] / "libggml-cpu.so").exists():
        pytest.skip("no amx build here; make check-kernels builds it")
    lines = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", built], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    loads = [place for place, line in enumerate(lines) if "ldtilecfg" in line]
    assert loads
    for place in loads:
        offset, base = re.findall(r"ldtilecfg\s+(-?\w*)\((%\w+)\)", lines[place])[0]
        begin = int(offset or "0", 16)
        stored = [int(at or "0", 16) - begin
                  for line in lines[place - 60 : place]
                  for at in re.findall(rf"mov\w*\s+\S+,(-?\w*)\({base}\)", line)]  # fmt: skip
        assert {0, 16, 48} <= set(stored), lines[place - 60 : place + 1]


def test_many_rows_are_multiplied_by_amx_where_there_is_one() -> None:
    """Tiles have to be asked for (arch_prctl): what was asked for says who multiplies. The results are the same."""
    if platform.system() != "Linux" or "amx_int8" not in toolchain.cpu_features().split():
        pytest.skip("no AMX here")
    code = f"""if True:
        import ctypes, pathlib
        from mul_mat import products
        had = ctypes.c_uint64()
        print(products(pathlib.Path({str(VARIANTS["installed"])!r}), "Q4_0", False, 512, 64, 1, MOST)[0])
        ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(had))  # arch_prctl, ARCH_GET_XCOMP_PERM
        print(had.value >> 18 & 1)"""

    def multiply(most: int, **env: str) -> list[str]:
        command = [sys.executable, "-c", code.replace("MOST", str(most))]
        environment = os.environ | {"GGML_AMX": "0", "PYTHONPATH": str(Path(__file__).parents[1])} | env
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    digest, tiles = multiply(64)
    assert tiles == "1"
    assert multiply(64, GGML_CPU_HIDE="amx_int8") == [digest, "0"]
    assert multiply(16)[1] == "0"


@pytest.mark.skipif("avx2" not in toolchain.cpu_features().split(), reason="Q4_0 is repacked for AVX2")
def test_weights_stay_where_our_kernels_read_them(tmp_path: Path) -> None:
    """On a CPU with AMX llama.cpp would put them into a layout that has kernels for one row and for sixteen."""
    pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", tmp_path, "Q4_0", "Q4_0")
    code = f"from gemma_mtp.runtime import Llama; Llama({str(pair.target)!r}, n_ctx=256)"

    def log(**env: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "GGML_AMX"} | env
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    assert "CPU_REPACK model buffer" in (said := log())
    assert "AMX model buffer" not in said
    if "amx_int8" in toolchain.cpu_features().split():
        assert "AMX model buffer" in log(GGML_AMX="1")


# queries, heads, KV heads, keys, width, sliding window; threads, and queries at once
ATTENTION = [
    ((9, 8, 1, 1100, 512, None), [(2, 9), (1, 1), (2, 1), (16, 1), (3, 2), (16, 9)]),
    ((5, 8, 1, 700, 256, 300), [(2, 5), (1, 1), (16, 1), (3, 2)]),
    ((600, 8, 1, 700, 64, 250), [(2, 600), (1, 1), (3, 17), (1, 64), (7, 600)]),
    ((90, 32, 16, 333, 80, None), [(2, 90), (1, 1), (3, 33), (1, 90)]),
    ((20, 4, 4, 77, 64, None), [(2, 20), (1, 1), (3, 19)]),
]
KV_TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_0": 2}


def attention(shape: tuple[int, int, int, int, int, int | None], kind: str, seed: int) -> dict[str, Any]:
    """Random queries over keys of which the last twenty are of no one's past, as in a KV cache with room left."""
    queries, heads, kv_heads, keys, width, window = shape
    rng, key = np.random.default_rng(seed), np.arange(keys)
    now = (keys - 20 - queries + np.arange(queries))[:, None]
    seen = (key <= now) & (key > now - (window or keys))
    return {
        "q": rng.standard_normal((queries, heads, width), np.float32),
        "k": rng.standard_normal((keys, kv_heads, width), np.float32),
        "v": rng.standard_normal((keys, kv_heads, width), np.float32),
        "mask": np.where(seen, 0, -np.inf).astype(np.float32),
        "type": KV_TYPES[kind],
        "scale": width**-0.5,
    }


def float_cases(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Weights and rows: lengths and columns that fill no register and no tile, heads that share keys, experts."""

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    # threads, and rows at once
    runs = [(1, 1), (2, 1), (1, 2), (3, 3), (2, 4), (1, 7), (3, 16), (2, 17), (2, 31)]
    return {
        "one row": {"w": normal(70, 1536), "x": normal(1, 1536), "runs": [(1, 1), (3, 1)]},
        "odd": {"w": normal(37, 1003), "x": normal(31, 1003), "runs": runs},
        "short": {"w": normal(3, 5), "x": normal(31, 5), "runs": runs},
        "long": {"w": normal(130, 6144), "x": normal(31, 6144), "runs": runs},
        "many": {"w": normal(66, 776), "x": normal(600, 776), "runs": [(2, 600), (1, 1), (3, 129), (2, 64)]},
        "heads": {"w": normal(2, 45, 72), "x": normal(8, 31, 72), "runs": runs},
        "experts": {"w": normal(4, 34, 268), "x": normal(31, 1, 268), "runs": runs,
                    "ids": rng.integers(0, 4, (31, 2), np.int32)},
        "down": {"w": normal(4, 34, 268), "x": normal(31, 2, 268), "runs": runs,
                 "ids": np.arange(62, dtype=np.int32).reshape(31, 2) % 4},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_with_weights_of_floats(variant: str, kind: str, tmp_path: Path) -> None:
    """A row has the same products whatever is computed with it, as near to the exact ones as llama.cpp's alone."""
    folder, path, found = library(variant), tmp_path / "case.npz", tmp_path / "found.npy"

    def multiply(case: dict[str, Any], **env: str) -> Any:
        np.savez(path, type=kind, **case)
        script("floats.py", folder, path, found, **env)
        return np.load(found)

    for name, case in float_cases(np.random.default_rng(0)).items():
        batch, *others = multiply(case)
        assert all(np.array_equal(other, batch) for other in others), name
        stock = multiply({**case, "runs": [(2, 1)]}, GGML_SMALL_BATCH_ROWS="0")[0]
        w, x = unpacked(case["w"], kind), case["x"].astype(np.float64)
        if "ids" in case:
            exact = np.einsum("nul,nucl->nuc", np.broadcast_to(x, (31, 2, 268)), w[case["ids"]], optimize=True)
        else:
            exact = x @ np.swapaxes(w if w.ndim == 2 else w.repeat(len(x) // len(w), 0), -1, -2)
        ours, theirs = (float(np.sqrt(np.mean((y - exact) ** 2))) for y in (batch, stock))
        # sums this short differ in the last bit or not at all
        assert ours <= theirs * (1.1 if kind == "F32" else 1) + 1e-7, (name, ours, theirs)


def elsewhere(case: dict[str, Any], keys: int) -> dict[str, Any]:
    """The same keys in as many cells, in their order, and in those between what would be noticed if it were seen."""
    rng, moved = np.random.default_rng(keys), {**case}
    cells = np.sort(rng.choice(keys, len(case["k"]), replace=False))
    for name in "kv":
        moved[name] = np.full((keys, *case[name].shape[1:]), 1e4, np.float32)
        moved[name][cells] = case[name]
    moved["mask"] = np.full((len(case["q"]), keys), -np.inf, np.float32)
    moved["mask"][:, cells] = case["mask"]
    return moved


@pytest.mark.skipif(not X86, reason="elsewhere `make check-arm` has the test")
@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_query_attends_alike_in_any_company(variant: str, kind: str, tmp_path: Path) -> None:
    """As near to the exact sums as llama.cpp's, or nearer; the same for any number of queries, and in other cells."""
    folder = library(variant)
    path, found = tmp_path / "case.npz", tmp_path / "found.npy"

    def attend(case: dict[str, Any], runs: list[tuple[int, int]], **env: str) -> Any:
        np.savez(path, runs=runs, **case)
        script("attention.py", folder, path, found, GGML_SHARE_CORES="0", **env)  # as many threads as we say
        return np.load(found)

    for seed, (shape, runs) in enumerate(ATTENTION):
        if kind in ("Q8_0", "Q4_0") and shape[4] % 32:
            continue
        case = attention(shape, kind, seed)
        batch, *others = attend(case, runs)
        assert all(np.array_equal(other, batch) for other in others), shape
        for keys in (shape[3] + 51, 2 * shape[3]):
            assert np.array_equal(attend(elsewhere(case, keys), runs[:1])[0], batch), (shape, keys)
        stock = attend(case, runs[:1], GGML_SMALL_BATCH_ROWS="0")[0]
        k, v = (unpacked(case[name], kind).repeat(shape[1] // shape[2], 1) for name in "kv")
        scores = (
            np.einsum("qhd,khd->hqk", case["q"].astype(np.float64), k, optimize=True) * case["scale"] + case["mask"]
        )
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        exact = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v, optimize=True)
        assert np.abs(batch - exact).max() < 2e-6
        # stock's kernel for 64 queries and more sums in F32 as well: it is as near as ours
        ours, theirs = (float(np.sqrt(np.mean((y - exact) ** 2))) for y in (batch, stock))
        assert kind == "F32" or ours < theirs * 1.05, (shape, ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rest_of_a_layer_is_the_same_in_any_company(variant: str) -> None:
    """Norms, RoPE, activations, softcap, routers, look-ups and KV writes of a row: up to 600 rows, 16 threads."""
    said = json.loads(script("layer.py", library(variant), "0", GGML_SHARE_CORES="0"))
    assert len(said["all"]) > 25
    assert not said["different"]


def unpacked(values: Any, kind: str) -> Any:
    """Keys or values as the cache of a type holds them."""
    blocks = gguf.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(values.shape).astype(np.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_for_k_quants_are_quantized_as_by_the_reference(variant: str, tmp_path: Path) -> None:
    """Values of any size; of two largest ones with other signs the first counts; zeros; what is no number."""
    folder, rng = library(variant), np.random.default_rng(0)
    values = rng.standard_normal((900, 8, 256)) * 10.0 ** rng.integers(-30, 30, (900, 8, 1))
    values[300:600] = np.round(values[300:600] / np.abs(values[300:600]).max(axis=2, keepdims=True) * 9)
    values[::5, 3] = 0
    values[::7, 5, ::50] = rng.choice([np.inf, -np.inf, np.nan, -0.0], (129, 6))
    np.save(tmp_path / "rows.npy", values.astype(np.float32))
    assert script("quantize_rows.py", folder, tmp_path / "rows.npy").strip() == "0"


@pytest.mark.skipif(not X86, reason="the kernels are for x86; other machines keep llama.cpp's")
@pytest.mark.parametrize("variant", VARIANTS)
def test_tanh_and_gelu(variant: str, tmp_path: Path) -> None:
    """Against float64; a value has the same result wherever it stands in a row."""
    folder = library(variant)
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1e-40, 11.0, -11.0, 1e30, -1e30, np.inf, -np.inf, np.nan]
    row = np.concatenate([rng.standard_normal(2000) * size for size in (1e-6, 1e-2, 1, 4, 20)] + [special])
    x = np.stack([np.roll(row, shift) for shift in range(3)]).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    wide = np.maximum(x.astype(np.float64), -20)
    exact = {
        "tanh": np.tanh(wide),
        "gelu": wide / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * wide * (1 + 0.044715 * wide**2))),
    }
    exact["geglu"] = exact["gelu"] * np.arange(1, 4)[:, None]
    for name, wanted in exact.items():
        script("activations.py", folder, name, tmp_path / "x.npy", tmp_path / "y.npy")
        y = np.load(tmp_path / "y.npy")
        # far out on the left GELU loses digits as 1 + tanh does
        np.testing.assert_allclose(y, wanted, rtol=5e-7 if name == "tanh" else 3e-6, atol=1e-7 if name != "tanh" else 0)
        if name != "geglu":
            rolled = [np.roll(row, -shift) for shift, row in enumerate(y)]
            assert all(np.array_equal(row, rolled[0], equal_nan=True) for row in rolled)


def cut(count: int, size: int | random.Random) -> list[slice]:
    """Pieces of a size, or of random ones, that `count` tokens are decoded in."""
    pieces, at = [], 0
    while at < count:
        n = min(count - at, size if isinstance(size, int) else size.choice([1, 2, 5, 9, 17, 40, 100]))
        pieces.append(slice(at, at + n))
        at += n
    return pieces


def check_rows(llm: Llama, ids: list[int], start: int, count: int, sizes: Sequence[int | random.Random]) -> None:
    """Every logit of tokens start to start + count, however they are cut, is the one of the token decoded alone."""
    llm.reset()
    llm.eval(ids[:start])
    text = ids[start : start + count]
    alone = [llm.logits(llm.decode([token], [])).copy() for token in text]
    for turn, size in enumerate(sizes if X86 else []):
        llama_cpp.llama_set_n_threads(llm.ctx, turn % 3 + 1, turn % 3 + 1)
        llm.n_tokens = start
        for piece in cut(count, size):
            first, *others = text[piece]
            row = llm.decode([first], others)
            for i in range(piece.stop - piece.start):
                assert np.array_equal(llm.logits(row + i), alone[piece.start + i]), (start, size, piece, i)
            llm.n_tokens = start + piece.stop
    llama_cpp.llama_set_n_threads(llm.ctx, 2, 2)


def demo_pair(folder: Path, quant: str) -> tuple[Pair, bytes]:
    """The bundled pair in a format, and a text of its held-out prompts."""
    pair: Pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", folder, quant)
    prompts = json.loads((PAIR / "prompts.json").read_text())["prompts"]
    return pair, "\n".join(prompt["text"] for prompt in prompts).encode()


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "no flash"])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "Q8_0", "BF16"])
def test_a_token_has_the_same_logits_alone_and_in_a_batch(quant: str, flash: bool, tmp_path: Path) -> None:
    pair, text = demo_pair(tmp_path, quant)
    sizes = (2, 3, 5, 8, 9, *((17, 40, random.Random(1)) if flash else ()))
    with closing(Llama(pair.target, drafter=None, n_ctx=1024, flash_attn=flash, n_threads=2, verbose=False)) as llm:
        for start in (64, 600):
            check_rows(llm, llm.tokenize(text), start, 40, sizes)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16"])
def test_weights_of_floats_give_the_same_logits_in_any_batch(quant: str, threads: int, tmp_path: Path) -> None:
    """Also products of keys and values, which flash attention does not come to."""
    pair, text = demo_pair(tmp_path, quant)
    options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "flash_attn": False, "verbose": False}
    with closing(Llama(pair.target, drafter=None, n_ctx=512, **options)) as llm:
        ids, start = llm.tokenize(text), 64
        llm.eval(ids[:start])
        alone = [llm.logits(llm.decode([token], [])).copy() for token in ids[start : start + 300]]
        for n in (2, 16, 17, 64, 300):
            llm.n_tokens = start
            row = llm.decode([ids[start]], ids[start + 1 : start + n])
            assert all(np.array_equal(llm.logits(row + i), alone[i]) for i in range(n)), n


def test_a_state_that_was_loaded_goes_on_like_the_one_that_was_saved(tmp_path: Path) -> None:
    """The next token lay before those it follows, in another order of keys, and sums were rounded otherwise."""
    pair, text = demo_pair(tmp_path, "Q8_0")
    options: dict[str, Any] = {"drafter": None, "n_ctx": 4096, "n_threads": 2, "verbose": False}
    with closing(Llama(pair.target, **options)) as llm, closing(Llama(pair.target, **options)) as other:
        ids = (llm.tokenize(text) * 20)[:3040]
        llm.eval(ids[:3000])
        other.load_state(llm.save_state())
        for token in ids[3000:]:
            llm.eval([token])
            other.eval([token])
            assert np.array_equal(llm.logits(0), other.logits(0)), other.n_tokens


@pytest.mark.invariance
@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "Q8_0"])
@pytest.mark.parametrize("weights", ["demo", "E2B"])
def test_three_hundred_tokens_alone_and_in_batches(weights: str, quant: str, kv: str, tmp_path: Path) -> None:
    """On the bundled pair and on random weights at the shape of E2B, on contexts up to 3000."""
    if weights == "demo":
        pair, text = demo_pair(tmp_path, quant)
        target = pair.target
    else:
        target, _ = write_pair(
            "E2B", source.cache_dir() / "shapes", quant=quant, drafter_quant="Q4_0", drafter_head="Q4_0"
        )
        text = b""
    options: dict[str, Any] = {"n_ctx": 4096, "n_threads": 2, "flash_attn": True, "verbose": False}
    with closing(Llama(target, drafter=None, type_k=KV_TYPES[kv], type_v=KV_TYPES[kv], **options)) as llm:
        ids = llm.tokenize(text) or random.Random(0).choices(range(1000, llm.n_vocab()), k=3400)
        ids = (ids * (3400 // len(ids) + 1))[:3400]
        for start, count in (64, 300), (600, 512), (3000, 300):
            check_rows(llm, ids, start, count, (2, 9, 17, 64, 300, 512, random.Random(start)))
