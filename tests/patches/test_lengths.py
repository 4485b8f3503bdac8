"""llama-server of our build drafts as far as it pays: the same answers, counted by position and source, within bounds.

How far it drafts depends on the machine. What does not is that it tries: after two plain passes a first draft is made.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from children import post, serving
from gemma_mtp.convert import Pair
from prompts import held_out

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
SLOTS, BOUND = 3, 5
LINES = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 3}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "lines": LINES}}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1, "seed": 7},
    "schema": {"temperature": 1, "seed": 7, "json_schema": SCHEMA | {"required": ["name", "lines"]}},
    "fixed": {"temperature": 0, "speculative.n_max": 2},
    "none": {"temperature": 0, "speculative.n_max": 0},
}


@pytest.fixture(scope="module")
def servers(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """One that drafts as far as it pays, with Ollama's flags and a KV cache for each slot; and one without drafter."""
    folder = tmp_path_factory.mktemp("servers")
    options = "-m", demo.target, "-c", "3072", "-np", str(SLOTS), "-fa", "on", "-t", "1"
    drafts = "--spec-draft-model", demo.drafter, "--spec-type", "draft-mtp", "--spec-draft-backend-sampling"
    with (
        serving(SERVER, folder / "auto", *options, *drafts, "--spec-draft-n-max", str(BOUND), "--metrics") as auto,
        serving(SERVER, folder / "plain", *options, "--spec-draft-model", "none") as plain,
    ):
        yield auto, plain


def answers(url: str, asked: dict[str, Any], at_once: int = 1, n_predict: int = 64) -> list[dict[str, Any]]:
    """Those to some prompts that the pair was not trained on."""
    more = {"cache_prompt": False, "n_predict": n_predict, "return_tokens": True, **asked}
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(lambda text: post(f"{url}/completion", {"prompt": text, **more}), held_out(6)))


def tokens(found: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in found]


@pytest.mark.parametrize("name", ASKED)
def test_answers_are_those_without_drafts_alone_and_in_company(name: str, servers: tuple[str, str]) -> None:
    auto, plain = servers
    wanted = tokens(answers(plain, ASKED[name]))
    for at_once in (1, SLOTS):
        found = answers(auto, ASKED[name], at_once)
        assert tokens(found) == wanted
        for answer in found:
            check_counts(answer["timings"], ASKED[name].get("speculative.n_max", BOUND))


def check_counts(timings: dict[str, Any], most: int) -> None:
    """Sums by position and by source are the wholes, and no draft is longer than it may be."""
    if "draft_n" not in timings:
        assert not any(name.startswith("draft") for name in timings)
        return
    for whole, parts in (("draft_n", "draft_n"), ("draft_n_accepted", "draft_n_accepted")):
        assert sum(timings[f"{parts}_per_position"]) == timings[whole]
        assert sum(timings[f"{parts}_from"].values()) == timings[whole]
        assert set(timings[f"{parts}_from"]) <= {"mtp", "lookup", "grammar"}
    assert 1 <= len(timings["draft_n_per_position"]) <= most
    assert timings.get("speedup", 1.0) > 0.0


def test_drafts_are_tried_and_told(servers: tuple[str, str]) -> None:
    """Since the server started, as it does not try again soon where drafts do not pay."""
    found = answers(servers[0], {"temperature": 0})
    assert all(answer["timings"]["speedup"] > 0 for answer in found)
    with urllib.request.urlopen(f"{servers[0]}/metrics") as told:
        lines = [line.rpartition(" ") for line in told.read().decode().splitlines() if line[0] != "#"]
    metrics = {name.removeprefix("llamacpp:spec_decode_"): float(value) for name, _, value in lines}
    assert metrics["num_draft_tokens_total"] >= metrics['num_draft_tokens_from_total{source="mtp"}'] > 0
    assert metrics['num_draft_tokens_per_pos_total{position="0"}'] > 0
    assert metrics['num_accepted_tokens_from_total{source="lookup"}'] >= 0
    assert metrics["speedup"] > 0 and metrics["plain_seconds_total"] > 0


def test_a_request_may_fix_its_length(servers: tuple[str, str]) -> None:
    for answer in answers(servers[0], ASKED["fixed"]):
        timings = answer["timings"]
        rounds = timings["draft_n_per_position"]
        # but for the last of an answer, which has room for fewer
        assert len(rounds) == 2 and rounds[0] - rounds[1] <= 1
        assert timings["predicted_n"] - 1 - timings["draft_n_accepted"] <= rounds[0] + 1
    assert all("draft_n" not in answer["timings"] for answer in answers(servers[0], ASKED["none"]))


@pytest.mark.parametrize(("flags", "most"), [((), 15), (("--spec-draft-adaptive", "off"), 3)])
def test_bounds_where_nobody_says_more(flags: tuple[str, ...], most: int, demo: Pair, tmp_path: Path) -> None:
    """15 as far as it pays, in one KV cache for all; llama.cpp's own 3 where the length is fixed."""
    with serving(SERVER, tmp_path / "log", "-m", demo.target, "-c", "2048", "-t", "1", *flags) as url:
        found = answers(url, {"temperature": 0}, 2)
    assert f"up to {most} tokens a round" in (tmp_path / "log").read_text()
    for answer in found:
        check_counts(answer["timings"], most)
    if flags:
        assert all(len(answer["timings"]["draft_n_per_position"]) == most for answer in found)


def test_a_batch_holds_the_drafts_of_all_slots(demo: Pair, tmp_path: Path) -> None:
    """Four of fifteen tokens each would be 64 rows."""
    options = "-m", demo.target, "-c", "2048", "-np", "4", "-b", "24", "-ub", "24", "-t", "1"
    fixed = "--spec-draft-adaptive", "off", "--spec-draft-n-max", "15"
    with serving(SERVER, tmp_path / "log", *options, *fixed) as url:
        found = answers(url, {"temperature": 0}, 4)
    assert all(answer["timings"]["draft_n"] > 0 for answer in found)


def test_synthetic_acceptance_learns_too(demo: Pair, tmp_path: Path) -> None:
    """Of drafts that are always right, by position; nothing is drafted from what the text so far holds then."""
    rates = "--spec-synth-rates", ",".join(["1"] * 4), "--spec-draft-n-max", "4"
    with serving(SERVER, tmp_path / "log", "-m", demo.target, "-c", "2048", "-t", "1", *rates) as url:
        found = answers(url, {"temperature": 0, "ignore_eos": True}, n_predict=48)
    timings = [answer["timings"] for answer in found if "draft_n" in answer["timings"]]
    assert timings
    assert all(set(each["draft_n_from"]) == {"mtp"} for each in timings)
    assert sum(each["draft_n_accepted"] for each in timings) > 0.8 * sum(each["draft_n"] for each in timings)
