"""All five sizes as tiny random models: logits as transformers', and MTP in the runtime."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.runtime import Llama
from prompts import PROMPT
from tiny import SIZES, VOCAB
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4_unified import Gemma4UnifiedForConditionalGeneration

# F32 cache and no flash attention leave the least to differ.
EXACT: dict[str, Any] = {
    "n_ctx": 256, "verbose": False, "flash_attn": False, "type_k": 0, "type_v": 0,
    "n_threads": 1, "n_threads_batch": 1,
}  # fmt: skip
# The models' logits have a spread of several units; llama.cpp rounds its GELU to 16 bits.
CLOSE = 0.15
# Rows of 80 in which the router's choice of experts may be so close that rounding decides it.
NEAR_TIES = {"26B-A4B": 2}


@pytest.fixture(scope="module")
def pairs(sizes: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("sizes-f32")
    return {size: convert_pair(*folders, root / size, "F32", "F32") for size, folders in sizes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_transformers(
    size: str, sizes: dict[str, tuple[Path, Path]], pairs: dict[str, Pair]
) -> None:
    kind = Gemma4UnifiedForConditionalGeneration if size == "12B" else Gemma4ForConditionalGeneration
    reference = kind.from_pretrained(sizes[size][0], dtype=torch.float32).eval()
    ids = torch.randint(5, VOCAB - 5, (1, 80), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = reference(input_ids=ids).logits[0].numpy()
    with closing(Llama(pairs[size].target, drafter=None, logits_all=True, **EXACT)) as llm:
        llm.eval(ids[0].tolist())
        got = llm.scores[: ids.shape[1]].copy()
    difference = np.sort(np.abs(got - wanted)[:, : VOCAB - 2].max(axis=1))[: len(got) - NEAR_TIES.get(size, 0)]
    print(f"{size}: logits differ by {difference.max():.4f} at most, spread {wanted.std():.2f}")
    assert difference.max() < CLOSE


@pytest.mark.parametrize("size", SIZES)
def test_mtp_gives_the_same_tokens(size: str, pairs: dict[str, Pair]) -> None:
    made = []
    for drafter in ("auto", None):
        options: dict[str, Any] = {"draft_length": 3} if drafter else {"drafter": None}
        with closing(Llama(pairs[size].target, **EXACT, **options)) as llm:
            made.append(llm(PROMPT, max_tokens=24, temperature=0.0)["choices"][0]["text"])
            if drafter:
                assert llm.stats.drafted > 0
    assert made[0] == made[1]


def test_suppressed_tokens_of_the_12b_reach_the_vocabulary(pairs: dict[str, Pair]) -> None:
    from gemma_mtp.convert import link

    target, drafter = (link.read_header(path) for path in (pairs["12B"].target, pairs["12B"].drafter))
    assert target.metadata["tokenizer.ggml.suppress_tokens"].tolist() == [3070, 3071]
    assert "tokenizer.ggml.suppress_tokens" not in drafter.metadata
