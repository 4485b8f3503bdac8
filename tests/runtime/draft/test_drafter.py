"""Converted F32 files against transformers: the target's logits, and the drafts of its own candidate generator.

llama.cpp runs with an F32 cache and without flash attention here, which leaves the least to differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.draft import drafter
from gemma_mtp.runtime.draft.drafter import DraftSettings
from mtp_library import candidates, round_with_chances
from tiny import PAIR
from transformers import Gemma4ForConditionalGeneration, GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator
from transformers.models.gemma4_assistant import Gemma4AssistantForCausalLM

EXACT: dict[str, Any] = {
    "n_ctx": 1024, "verbose": False, "flash_attn": False, "type_k": 0, "type_v": 0,
    "n_threads": 1, "n_threads_batch": 1,
}  # fmt: skip
DRAFTED = 5
# Two tokens whose logits are this close may change places between two implementations.
NEAR_TIE = 0.02


class Reference:
    """The bundled pair in transformers, in float32."""

    def __init__(self) -> None:
        load: dict[str, Any] = {"dtype": torch.float32}
        self.target = Gemma4ForConditionalGeneration.from_pretrained(PAIR / "gemma-4-demo", **load).eval()
        self.drafter = Gemma4AssistantForCausalLM.from_pretrained(PAIR / "gemma-4-demo-assistant", **load).eval()
        self.window = self.target.config.text_config.sliding_window

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """All rows for a sequence, [n, vocab]."""
        rows: np.ndarray[Any, Any] = self.target(input_ids=torch.tensor([ids])).logits[0].numpy()
        return rows

    @torch.no_grad()
    def round(self, ids: list[int]) -> tuple[int, list[int]]:
        """The target's token after a prompt, and what the candidate generator drafts after that."""
        prompt = torch.tensor([ids])
        out = self.target(input_ids=prompt, output_hidden_states=True, return_shared_kv_states=True)
        token = int(out.logits[0, -1].argmax())
        generator = SinglePositionMultiTokenCandidateGenerator(
            self.drafter, self.target.get_input_embeddings(), GenerationConfig(max_length=4096)
        )
        generator.num_assistant_tokens = DRAFTED
        drafted, _ = generator.get_candidates(torch.cat([prompt, torch.tensor([[token]])], 1), {}, out, False, 0)
        return token, drafted[0, len(ids) + 1 :].tolist()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
    return convert_pair(*folders, tmp_path_factory.mktemp("f32"), "F32", "F32")


@pytest.fixture(scope="module")
def llm(pair: Pair) -> Iterator[Llama]:
    with closing(Llama(pair.target, **EXACT)) as opened:
        yield opened


@pytest.fixture(scope="module")
def texts(llm: Llama) -> list[list[int]]:
    """Held-out prompts, one after another, as ids of 330 tokens and more."""
    prompts = [prompt["text"] for prompt in json.loads((PAIR / "prompts.json").read_text())["prompts"]]
    joined = ["\n\n".join(prompts[i : i + 5]) for i in range(0, 40, 5)]
    return [llm.tokenize(text.encode())[:330] for text in joined]


def rows_of(path: Path, texts: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    """Logits of every position, by llama.cpp alone."""
    with closing(Llama(path, drafter=None, logits_all=True, **EXACT)) as plain:
        found = []
        for ids in texts:
            plain.reset()
            plain.eval(ids)
            found.append(plain.scores[: len(ids)].copy())
    return found


def test_tokens_are_those_of_transformers(llm: Llama) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "gemma-4-demo")
    texts = [p["text"] for p in json.loads((PAIR / "prompts.json").read_text())["prompts"]]
    texts += ["<|turn>user\nhi<turn|>\n", "héé → 漢字 \U0001f642", "\t\tx\n\n\n  y", "  a   b"]
    for text in texts:
        assert llm.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


def test_target_logits(
    reference: Reference, pair: Pair, texts: list[list[int]], upstream: Path, tmp_path: Path
) -> None:
    """No further from transformers than upstream's file is, and the same argmax but for near-ties."""
    import subprocess
    import sys

    theirs = tmp_path / "upstream.gguf"
    script = upstream / "convert_hf_to_gguf.py"
    command = [sys.executable, script, PAIR / "gemma-4-demo", "--outtype", "f32", "--outfile", theirs]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    wanted = [reference.logits(ids) for ids in texts]
    worst, rows, other, margins = {}, 0, 0, []
    for name, path in (("ours", pair.target), ("upstream", theirs)):
        found = rows_of(path, texts)
        worst[name] = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
        if name == "ours":
            for got, want in zip(found, wanted, strict=True):
                rows += len(got)
                for row in np.flatnonzero(got.argmax(1) != want.argmax(1)):
                    other += 1
                    margins.append(float(want[row].max() - want[row, got[row].argmax()]))
    print(json.dumps({"rows": rows, "max_abs": worst, "argmax_differs": other, "margins": margins}))
    assert len(texts) >= 5
    assert worst["ours"] <= worst["upstream"]
    assert all(margin < NEAR_TIE for margin in margins)
    assert other <= rows // 200


def drafted(llm: Llama, ids: list[int], token: int) -> list[int]:
    """Our drafter's guesses after a prompt and the target's next token."""
    llm.reset()
    row = llm.decode(ids, [])
    assert llm.drafter is not None
    return list(llm.drafter.draft(token, llm.hidden(row), len(ids), DRAFTED, DraftSettings()))


def test_drafts_within_the_window(reference: Reference, llm: Llama, texts: list[list[int]]) -> None:
    lengths = (6, 24, 60, 100, reference.window - 1)
    rounds = [(text[:length]) for text in texts for length in lengths]
    assert len(rounds) >= 20
    for ids in rounds:
        token, wanted = reference.round(ids)
        assert len(wanted) == DRAFTED
        assert drafted(llm, ids, token) == wanted, len(ids)


def beyond(reference: Reference, texts: list[list[int]]) -> list[list[int]]:
    return [text[:length] for text in texts for length in (reference.window + 1, 200, 330)]


def test_drafts_beyond_the_window(reference: Reference, llm: Llama, texts: list[list[int]]) -> None:
    for ids in beyond(reference, texts):
        token, wanted = reference.round(ids)
        assert drafted(llm, ids, token) == wanted, len(ids)


def overriding(monkeypatch: pytest.MonkeyPatch, **numbers: int) -> None:
    """Have a drafter's metadata keys below "mtp." read as these numbers."""
    read = drafter.metadata
    mine = {f"mtp.{name}": number for name, number in numbers.items()}
    monkeypatch.setattr(drafter, "metadata", lambda target: {**read(target), **mine})


def test_upstreams_head_and_window_on_request(
    reference: Reference, pair: Pair, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense head, and W - 1 keys of a sliding layer where transformers shows a drafter W + 1."""
    config = reference.drafter.config.get_text_config()
    monkeypatch.setattr(reference.drafter.config, "use_ordered_embeddings", False)
    rounds = [*beyond(reference, texts), texts[0][: reference.window - 1]]
    sure: list[list[list[float]]] = []
    for extra in (0, 2):
        overriding(monkeypatch, **{"ordered.top_k": 0, "sliding_window.extra": extra})
        monkeypatch.setattr(config, "sliding_window", reference.window - 2 + extra)
        with closing(Llama(pair.target, **EXACT)) as dense:
            assert dense.drafter is not None
            sure.append([])
            for ids in rounds:
                token, wanted = reference.round(ids)
                assert drafted(dense, ids, token) == wanted, len(ids)
                assert candidates(dense.drafter.ctx, 0) is None
                place = dense.drafter, token, dense.hidden(len(ids) - 1), len(ids)
                sure[-1].append(round_with_chances(*place, 1, DraftSettings())[1])
    changed = [a != b for a, b in zip(*sure, strict=True)]
    print(json.dumps({"rounds": len(rounds), "changed_by_the_window": sum(changed)}))
    # two keys more of W move a draft that is all but sure by less than a float shows
    assert sum(changed[:-1]) > len(changed) // 2
    assert not changed[-1]
