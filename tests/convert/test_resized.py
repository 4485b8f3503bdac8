"""An embedding that transformers resized for new tokens: the same model in llama.cpp, and drafts as for its base."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.runtime import Llama, Stats
from llamas import OPTIONS
from prompts import held_out
from reference import CLOSE, by_llama_cpp, by_transformers, furthest
from tiny import PAIR, VOCAB
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGET, DRAFTER = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
ADDED = [f"<tool_{n}>" for n in range(4)]
TEXT = "<tool_0>import os\n\ndef main(argv):\n    <tool_3>return <tool_1><tool_2>os.path.join(argv[1])\n"
PROMPTS, TOKENS = 4, 48


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target with four more tokens."""
    folder = tmp_path_factory.mktemp("resized") / "gemma-4-demo-tools"
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TARGET)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extended(resized: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """That target and the drafter of its base."""
    return convert_pair(resized, DRAFTER, tmp_path_factory.mktemp("extended"), "Q8_0", drafter_vocab="extend")


def test_logits_are_those_of_transformers(resized: Path, tmp_path: Path) -> None:
    made = convert_pair(resized, DRAFTER, tmp_path, "F32", "F32", drafter_vocab="extend")
    with closing(Llama(made.target, drafter=None, **OPTIONS)) as llm:
        ids = llm.tokenize(TEXT.encode(), special=True)
    assert ids == AutoTokenizer.from_pretrained(resized)(TEXT)["input_ids"]
    assert set(range(VOCAB, VOCAB + len(ADDED))) < set(ids)
    ours, theirs = by_llama_cpp(made.target, ids), by_transformers(resized, ids)
    assert ours.shape[1] == VOCAB + len(ADDED)
    print(f"logits differ by {furthest(ours, theirs):.5f} at most, spread {theirs.std():.2f}")
    assert furthest(ours, theirs) < CLOSE


def continued(target: Path, drafter: str | None, prompts: list[str]) -> tuple[list[str], Stats]:
    texts, total = [], Stats()
    with closing(Llama(target, drafter=drafter, **OPTIONS)) as llm:
        for prompt in prompts:
            texts.append(llm(prompt, max_tokens=TOKENS, temperature=0.0)["choices"][0]["text"])
            total.add(llm.stats)
    return texts, total


def test_drafts_are_accepted_as_those_for_its_base(demo: Pair, extended: Pair) -> None:
    prompts = held_out(PROMPTS)
    before, after = (continued(target, "auto", prompts)[1] for target in (demo.target, extended.target))
    print(json.dumps({"without": before.acceptance, "extended": after.acceptance, "drafted": after.drafted}))
    assert after.drafted > PROMPTS * TOKENS / 2
    assert abs(after.acceptance - before.acceptance) < 0.05


def test_tokens_are_those_without_a_drafter(extended: Pair) -> None:
    prompts = [*held_out(PROMPTS), TEXT]
    texts, stats = continued(extended.target, "auto", prompts)
    assert texts == continued(extended.target, None, prompts)[0]
    assert stats.accepted > 0
