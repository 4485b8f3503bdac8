"""A pair on a GPU: the same tokens with MTP as without, drafts of one call, the ordered head, graphs and waits.

Marked `gpu`: skipped where llama.cpp finds no device that layers could go to. tests/gpu/run.sh runs them from the GPU
kit (docs/gpu.md), which names the pair (GPU_KIT_PAIR) and takes the figures (GPU_KIT_FIGURES); with GPU_KIT_DRY=1 they
run on the CPU.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from gemma_mtp.convert import link
from gemma_mtp.runtime import Llama, native
from gemma_mtp.runtime.draft import drafter
from gemma_mtp.runtime.draft.drafter import DraftSettings
from gemma_mtp.runtime.sampling import Choose, gumbel
from mtp_library import candidates

DRY = os.environ.get("GPU_KIT_DRY") == "1"
NO_GPU = "no GPU: llama.cpp finds no device that layers could go to"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DRY and not native.has_gpu(), reason=NO_GPU)]

PAIR = Path(__file__).resolve().parents[1] / "pair"
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_gpu_layers": -1, "verbose": False}
PROMPTS, TOKENS, DRAFT, SEED = (4, 24, 3, 5) if DRY else (20, 96, 3, 5)
# At which two scores count as equal: one row and four are other kernels on a GPU, and round otherwise.
NEAR = 0.1
# Of the largest logit: a product on the CPU rounds the hidden state to 8 bits, on a GPU perhaps not.
TOLERANCE = 2e-2
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temp": 0.0},
    "temperature 1": {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
}
ACCEPTED = {"greedy": 0.3, "temperature 1": 0.1}  # at least; on CPUs 0.6 and 0.26 of 20 prompts


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a test measured, kept beside its result if the kit asked for it."""
    found: dict[str, Any] = {}
    yield found
    if path := os.environ.get("GPU_KIT_FIGURES"):
        kept = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(kept | {request.node.name: found}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Target and drafter: those of the folder that the kit names, else the bundled pair, converted."""
    if named := os.environ.get("GPU_KIT_PAIR"):
        found = {link.read_header(path).arch: path for path in Path(named).glob("*.gguf")}
        return found[link.TARGET_ARCH], found[link.DRAFTER_ARCH]
    from gemma_mtp.convert import convert_pair

    folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
    pair = convert_pair(*folders, tmp_path_factory.mktemp("pair"), "Q8_0")
    return pair.target, pair.drafter


@pytest.fixture(scope="module")
def llm(files: tuple[Path, Path]) -> Iterator[Llama]:
    with closing(Llama(files[0], drafter=files[1], **OPTIONS)) as opened:
        yield opened


def prompts(llm: Llama) -> list[list[int]]:
    texts = json.loads((PAIR / "prompts.json").read_text())["prompts"][:PROMPTS]
    return [llm.tokenize(text["text"].encode()) for text in texts]


def continued(llm: Llama, prompt: list[int], length: int, settings: dict[str, Any]) -> list[int]:
    """Tokens of a request with a draft length, 0 for none."""
    llm.draft_length = length
    llm.set_seed(SEED)
    llm.reset()  # the last token of a prompt that is there already would be decoded alone
    made: list[int] = []
    with closing(llm.generate(prompt, **settings)) as tokens:
        for token in tokens:
            made.append(token)
            if len(made) == TOKENS or token == llm.token_eos():
                break
    return made


def margin(llm: Llama, prefix: list[int], pair: list[int], temp: float) -> float:
    """By how much the score of one token after a prefix differs from that of another."""
    llm.reset()
    logits = llm.logits(llm.decode(prefix, [])).astype(np.float64)[pair]
    if temp:
        logits = logits + gumbel(SEED, len(prefix), np.array(pair, np.int32))
    return float(abs(logits[0] - logits[1]))


@pytest.mark.parametrize("name", SAMPLING)
def test_tokens_are_those_without_mtp(name: str, llm: Llama, figures: dict[str, Any]) -> None:
    """Token for token, but for choices that are near-ties, from which on two texts are different ones."""
    settings, margins, same, accepted, drafted, seconds = SAMPLING[name], [], 0, 0, 0, [0.0, 0.0]
    for prompt in prompts(llm):
        plain = continued(llm, prompt, 0, settings)
        seconds[0] += llm.stats.generation_seconds
        mtp = continued(llm, prompt, DRAFT, settings)
        seconds[1] += llm.stats.generation_seconds
        accepted, drafted = accepted + llm.stats.accepted, drafted + llm.stats.drafted
        apart = next((i for i, two in enumerate(zip(plain, mtp, strict=False)) if two[0] != two[1]), None)
        same += plain == mtp
        if apart is not None:
            at = [*prompt, *plain[:apart]]
            margins.append(round(margin(llm, at, [plain[apart], mtp[apart]], settings["temp"]), 5))
    figures |= {"prompts": PROMPTS, "identical": same, "margins_where_not": margins,
                "acceptance": round(accepted / drafted, 4), "plain_s": round(seconds[0], 2),
                "mtp_s": round(seconds[1], 2)}  # fmt: skip
    assert max(margins, default=0.0) < NEAR, "MTP changed a token that was no near-tie"
    assert accepted / drafted > ACCEPTED[name]


def states(llm: Llama) -> Iterator[tuple[int, Any, int]]:
    """The next token, the hidden row and the position after prefixes of a text: what a round begins with."""
    ids = [token for prompt in prompts(llm)[:5] for token in prompt]
    for n in range(5, min(len(ids) - 1, 200), 24):
        llm.reset()
        yield ids[n], llm.hidden(llm.decode(ids[:n], [])), n


def timed(draft: Callable[[], list[int]]) -> tuple[list[int], float]:
    begun = perf_counter()
    made = draft()
    return made, (perf_counter() - begun) * 1e3


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_round_in_one_call_is_that_of_single_steps(temp: float, llm: Llama, figures: dict[str, Any]) -> None:
    assert native.drafts_rounds(), "libllama has no llama_mtp_draft"
    assert llm.drafter is not None
    settings, length = DraftSettings(temp=temp, seed=SEED), 5
    taken: dict[str, list[float]] = {"one call": [], "steps": []}
    for token, hidden, position in states(llm):
        made = {}
        # A Choose that is no DraftSettings is asked after each step.
        ways: dict[str, Choose] = {"one call": settings, "steps": lambda logits, position: settings(logits, position)}
        for way, choose in ways.items():
            draft = partial(llm.drafter.draft, token, hidden, position, length, choose)
            draft()  # warms up
            made[way], ms = timed(draft)
            taken[way].append(ms)
        assert made["one call"] == made["steps"]
        assert len(made["steps"]) == length
    figures |= {f"{way}, ms for {length} tokens": round(median(ms), 3) for way, ms in taken.items()}


def test_ordered_head_scores_as_the_dense_one(
    llm: Llama, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    """Of each candidate the dense head's logit, on the same device, and the candidates that the CPU finds."""
    if not link.read_header(files[1]).metadata.get(link.KEY_N_CENTROIDS):
        pytest.skip("this drafter has a dense head only")
    keys = drafter.metadata
    ours = list(heads(llm))
    with closing(Llama(files[0], drafter=files[1], **OPTIONS | {"n_gpu_layers": 0})) as cpu:
        known = list(heads(cpu))
    monkeypatch.setattr(drafter, "metadata", lambda target: keys(target) | {link.KEY_TOP_K: 0})
    with closing(Llama(files[0], drafter=files[1], **OPTIONS)) as dense:
        full = list(heads(dense))
    apart, among, shared = [], 0, []
    for (ids, logits), (none, every), (others, _) in zip(ours, full, known, strict=True):
        assert none is None and ids is not None and others is not None
        apart.append(float(np.abs(logits - every[ids]).max() / np.abs(every[ids]).max()))
        among += int(every.argmax()) in ids
        shared.append(len(np.intersect1d(ids, others)) / len(ids))
    figures |= {"largest_error": max(apart), "dense_best_among_candidates": f"{among} of {len(ours)}",
                "candidates_as_on_the_cpu": round(float(np.mean(shared)), 4)}  # fmt: skip
    assert max(apart) < TOLERANCE
    assert np.mean(shared) > 0.95  # hidden rows of two devices differ, and so may the last of the clusters


def heads(llm: Llama) -> Iterator[tuple[Any, Any]]:
    """Candidates (None of a dense head) and logits of one draft step after each prefix."""
    assert llm.drafter is not None
    for token, hidden, position in states(llm):
        llm.drafter.draft(token, hidden, position, 1, lambda row, at: int(row.argmax()))
        found = candidates(llm.drafter.ctx, 0)
        if found is None:
            yield None, native.logits_row(llm.drafter.ctx, 0, llm.n_vocab()).copy()
        else:
            yield found[0].copy(), found[1].copy()


COUNTS = ("graphs", "waits", "reads", "writes", "copies")


def counted(work: Callable[[], Any]) -> Any:
    """What tests/gpu/counts.c counts while something runs, and its milliseconds."""
    counts = (ctypes.c_long * len(COUNTS)).in_dll(ctypes.CDLL(None), "gpu_kit_counts")
    before = np.array(counts)
    _, ms = timed(work)
    return np.append(np.array(counts) - before, ms)


def test_a_draft_step_is_one_graph_on_one_device(llm: Llama, figures: dict[str, Any]) -> None:
    """No part of a draft step goes to the CPU and back; how often it is waited for is told, not judged."""
    if not hasattr(ctypes.CDLL(None), "gpu_kit_counts"):
        pytest.skip("counts.c is not preloaded: run by tests/gpu/run.sh")
    loaded = llm.drafter
    assert loaded is not None
    if llm.n_vocab() > 100000:  # random weights: any tokens will do
        state = range(1000, 1040)
        hidden = llm.hidden(llm.decode(list(state), []))
        token, position = 1000, len(state)
    else:
        token, hidden, position = list(states(llm))[-1]

    def round_of(length: int) -> Any:
        work = partial(loaded.draft, token, hidden, position, length, DraftSettings())
        work()
        return np.median([counted(work) for _ in range(5)], axis=0)

    def target_pass() -> None:
        llm.logits(llm.decode([token], []))

    step = (round_of(7) - round_of(3)) / 4
    target_pass()
    passed = np.median([counted(target_pass) for _ in range(5)], axis=0)
    for name, found in {"a draft step": step, "a target pass": passed}.items():
        figures[name] = dict(zip((*COUNTS, "ms"), found.round(3).tolist(), strict=True))
    assert step[0] == 1
