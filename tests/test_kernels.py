"""Kernels for a few rows: equal to llama.cpp's own, row by row, to the last bit; and what follows for logits."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.patches import build
from gemma_mtp.runtime import Llama
from tiny import PAIR

X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS = {"installed": Path(llama_cpp.__file__).parent / "lib"}
VARIANTS |= {name: build.kernels_dir(name) for name in build.KERNEL_VARIANTS}
# How many rows our kernels serve.
MOST = {"Q4_0": 16, "Q4_K": 16, "Q5_K": 9, "Q6_K": 16, "Q8_0": 16}
SHAPES = [(256, 8), (512, 64), (1536, 264), (2048, 1000)]


def products(folder: Path, kind: str, shape: tuple[int, int], seed: int, mode: str, **env: str) -> str:
    script = Path(__file__).with_name("mul_mat.py")
    command = [sys.executable, script, folder, kind, *map(str, (*shape, seed, MOST[kind])), mode]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not X86, reason="the kernels are for x86; other machines keep llama.cpp's")
@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_are_those_of_one_row_kernels(variant: str, kind: str) -> None:
    """1 to 9 or 16 rows at once by our kernels, one after the other by stock's."""
    folder = VARIANTS[variant]
    if not folder.exists():
        pytest.skip(f"no {variant} build here; make check-kernels builds it")
    seed = random.randrange(1 << 30)
    for shape in SHAPES if variant == "installed" else SHAPES[1:3]:
        stock = products(folder, kind, shape, seed, "alone", GGML_SMALL_BATCH_ROWS="0")
        assert products(folder, kind, shape, seed, "batch") == stock, (shape, seed)
        assert products(folder, kind, shape, seed + 1, "batch") != stock


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "no flash"])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "Q8_0", "BF16"])
def test_a_token_has_the_same_logits_alone_and_in_a_batch(quant: str, flash: bool, tmp_path: Path) -> None:
    """Every logit of 2 to 9 tokens decoded together, on a short and a long context."""
    folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
    pair: Pair = convert_pair(*folders, tmp_path, quant)
    prompts = json.loads((PAIR / "prompts.json").read_text())["prompts"]
    text = "\n".join(prompt["text"] for prompt in prompts)
    with closing(Llama(pair.target, drafter=None, n_ctx=1024, flash_attn=flash, n_threads=2, verbose=False)) as llm:
        ids = llm.tokenize(text.encode())
        for start in (64, 600):
            llm.reset()
            llm.eval(ids[:start])
            alone = []
            for token in ids[start : start + 18]:
                alone.append(llm.logits(llm.decode([token], [])).copy())
            for n in range(2, 10) if X86 else []:
                llm.n_tokens = start
                for at in range(0, len(alone) - n + 1, n):
                    row = llm.decode([ids[start + at]], ids[start + at + 1 : start + at + n])
                    for i in range(n):
                        assert np.array_equal(llm.logits(row + i), alone[at + i]), (start, n, at + i)
                    llm.n_tokens += n - 1
