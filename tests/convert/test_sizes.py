"""All five sizes as tiny random models: logits as transformers', and MTP in the runtime."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.runtime import Llama
from prompts import PROMPT
from reference import CLOSE, EXACT, by_llama_cpp, by_transformers
from tiny import SIZES, VOCAB

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
    wanted, got = by_transformers(sizes[size][0]), by_llama_cpp(pairs[size].target)
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
