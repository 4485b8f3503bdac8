"""Logits of a folder by transformers, and those of the file made from it by llama.cpp."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gemma_mtp.runtime import Llama
from tiny import VOCAB
from transformers import AutoModelForCausalLM

Logits = np.ndarray[Any, Any]

# F32 cache and no flash attention leave the least to differ.
EXACT: dict[str, Any] = {
    "n_ctx": 256, "verbose": False, "flash_attn": False, "type_k": 0, "type_v": 0,
    "n_threads": 1, "n_threads_batch": 1,
}  # fmt: skip
# The models' logits have a spread of several units; llama.cpp rounds its GELU to 16 bits.
CLOSE = 0.15
# Tokens that mean nothing, more of them than two sliding windows hold.
IDS: list[int] = torch.randint(5, VOCAB - 5, (80,), generator=torch.Generator().manual_seed(3)).tolist()


def by_transformers(folder: Path, ids: list[int] = IDS) -> Logits:
    """Logits of all positions, [tokens, vocabulary], in float32; every weight of the model is in the folder."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"], told
    with torch.no_grad():
        rows: Logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    return rows


def by_llama_cpp(target: Path, ids: list[int] = IDS) -> Logits:
    """The same of a GGUF file."""
    with closing(Llama(target, drafter=None, logits_all=True, **EXACT)) as llm:
        llm.eval(ids)
        return llm.scores[: len(ids)].copy()


def furthest(one: Logits, other: Logits) -> float:
    """The largest difference between two models' logits."""
    return float(np.abs(one - other).max())
