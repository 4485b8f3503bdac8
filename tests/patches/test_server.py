"""llama-server of our build: an answer with drafts is the one without, to the last token and its probability."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from children import post, serving
from gemma_mtp.convert import Pair
from prompts import held_out

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
DRAFTS = "--spec-type", "draft-mtp", "--spec-draft-n-max", "4", "--spec-draft-adaptive", "off"
# Far beyond the window of 128 and a batch of 512, where the cells of the window have wrapped around.
CONTEXT = 2048


@pytest.fixture(scope="module")
def servers(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The same server twice: with the drafter, and without."""
    folder = tmp_path_factory.mktemp("servers")
    options = "-m", demo.target, "-c", str(CONTEXT), "-fa", "on"
    with (
        serving(SERVER, folder / "drafts", *options, "--spec-draft-model", demo.drafter, *DRAFTS) as drafts,
        serving(SERVER, folder / "plain", *options, "--spec-draft-model", "none") as plain,
    ):
        yield drafts, plain


def both(servers: tuple[str, str], **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two answers to a request; the first was drafted."""
    drafted, plain = (post(f"{url}/completion", {"cache_prompt": False, **body}) for url in servers)
    assert drafted["timings"]["draft_n_accepted"] > 0
    assert "draft_n" not in plain["timings"]
    return drafted, plain


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_ends_where_the_context_does(temperature: int, servers: tuple[str, str]) -> None:
    for seed, prompt in enumerate(held_out(3)):
        drafted, plain = both(servers, prompt=prompt, n_predict=-1, ignore_eos=True, temperature=temperature, seed=seed)
        assert drafted["truncated"] and plain["truncated"]
        assert drafted["tokens_predicted"] == plain["tokens_predicted"] > CONTEXT // 2
        assert drafted["content"] == plain["content"]


def test_probabilities_of_drafted_tokens(servers: tuple[str, str]) -> None:
    for prompt in held_out(3):
        drafted, plain = both(servers, prompt=prompt, n_predict=48, temperature=0, n_probs=3)
        assert drafted["completion_probabilities"] == plain["completion_probabilities"]
        assert len({each["logprob"] for each in drafted["completion_probabilities"]}) > 10


def test_penalties_over_the_whole_context(servers: tuple[str, str]) -> None:
    body = {"prompt": held_out(1)[0], "n_predict": 64, "temperature": 0, "repeat_penalty": 1.3}
    drafted, plain = both(servers, repeat_last_n=-1, **body)
    assert drafted["content"] == plain["content"]
    assert plain["content"] != both(servers, repeat_last_n=1, **body)[1]["content"]
