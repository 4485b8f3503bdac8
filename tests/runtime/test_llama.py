"""The drop-in: every way of calling llama_cpp.Llama, with MTP, without, and when something is wrong."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from children import MAIN
from click.testing import CliRunner
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.runtime import Llama, Stats, native, open_pair
from gemma_mtp.runtime.cli.main import main
from llama_cpp import llama_cpp as lib
from prompts import PROMPT

OPTIONS: dict[str, Any] = {"n_ctx": 512, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "seed": 11}
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, draft_length=3, **OPTIONS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, drafter=None, **OPTIONS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def stock(demo: Pair) -> Iterator[llama_cpp.Llama]:
    with closing(llama_cpp.Llama(str(demo.target), **OPTIONS)) as llm:
        yield llm


def shape(value: Any) -> Any:
    """Keys and types of a response, nothing of its content."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def test_the_drafter_is_found_named_or_off(demo: Pair, mtp: Llama, plain: Llama, tmp_path: Path) -> None:
    assert mtp.drafter is not None
    assert plain.drafter is None
    alone = shutil.copy(demo.target, tmp_path)
    with closing(Llama(alone, **OPTIONS)) as llm:
        assert llm.drafter is None
        assert llm(PROMPT, max_tokens=4, **GREEDY)["choices"][0]["text"]
        assert llm.stats.drafted == 0
    with closing(Llama(alone, drafter=demo.drafter, draft_length=3, **OPTIONS)) as llm:
        llm(PROMPT, max_tokens=8, **GREEDY)
        assert llm.stats.drafted > 0


def test_greedy_is_what_stock_llama_says(mtp: Llama, stock: llama_cpp.Llama) -> None:
    """Stock's own greedy choice, on a prompt without near-ties, token for token."""
    settings = {"max_tokens": 48, "temperature": 0.0, "repeat_penalty": 1.0}
    ours, theirs = mtp(PROMPT, **settings), stock(PROMPT, **settings)
    assert ours["choices"] == theirs["choices"]
    assert ours["usage"] == theirs["usage"]
    assert mtp.stats.accepted > 0


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_way_of_calling_gives_the_same_text(settings: dict[str, Any], mtp: Llama, plain: Llama) -> None:
    wanted = plain(PROMPT, max_tokens=64, **settings)["choices"][0]["text"]
    assert len(wanted) > 20
    assert mtp(PROMPT, max_tokens=64, **settings)["choices"][0]["text"] == wanted
    assert mtp.create_completion(PROMPT, max_tokens=64, **settings)["choices"][0]["text"] == wanted
    chunks = mtp(PROMPT, max_tokens=64, stream=True, **settings)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chat(settings: dict[str, Any], mtp: Llama, plain: Llama) -> None:
    messages = [{"role": "user", "content": "Continue this file:\nimport os\n"}]
    wanted = plain.create_chat_completion(messages, max_tokens=48, **settings)["choices"][0]["message"]["content"]
    made = mtp.create_chat_completion(messages, max_tokens=48, **settings)
    assert made["choices"][0]["message"]["content"] == wanted
    chunks = mtp.create_chat_completion(messages, max_tokens=48, stream=True, **settings)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == wanted


def test_responses_have_the_shape_of_stocks(mtp: Llama, stock: llama_cpp.Llama) -> None:
    """With the seed and the timings beside it: in an answer, and in the last chunk of a stream."""
    messages, seed = [{"role": "user", "content": "hi"}], {"seed": "int", "timings": shape(Stats(0).timings())}
    calls: list[tuple[Callable[[Any], Any], dict[str, Any]]] = [
        (lambda llm: llm(PROMPT, max_tokens=6, **GREEDY), seed),
        (lambda llm: llm(PROMPT, max_tokens=6, echo=True, stop=["x"], **GREEDY), seed),
        (lambda llm: next(iter(list(llm(PROMPT, max_tokens=6, stream=True, **GREEDY)))), {}),
        (lambda llm: list(llm(PROMPT, max_tokens=6, stream=True, **GREEDY))[-1], seed),
        (lambda llm: llm.create_chat_completion(messages, max_tokens=6, **GREEDY), seed),
        (lambda llm: list(llm.create_chat_completion(messages, max_tokens=6, stream=True, **GREEDY))[1], {}),
        (lambda llm: list(llm.create_chat_completion(messages, max_tokens=6, stream=True, **GREEDY))[-1], seed),
    ]
    for call, more in calls:
        ours = call(mtp)
        if more:  # beside what is told without drafts
            assert ours["timings"]["draft_n"] > 0
            told = ours["timings"].items()
            ours["timings"] = {name: it for name, it in told if not name.startswith("draft_") and name != "speedup"}
        assert shape(ours) == shape(call(stock)) | more


def test_the_signature_of_generate_is_stocks() -> None:
    ours, theirs = (inspect.signature(kind.generate).parameters for kind in (Llama, llama_cpp.Llama))
    added = {"mtp": None, "draft_length": None}
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()} | added


def test_generate_yields_tokens_one_by_one(mtp: Llama, plain: Llama) -> None:
    ids = mtp.tokenize(PROMPT.encode())
    made = []
    for llm in (mtp, plain):
        tokens: list[int] = []
        for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
            assert llm.n_tokens == len(ids) + len(tokens)
            assert list(llm._input_ids) == ids + tokens
            tokens.append(token)
            if len(tokens) == 40:
                break
        made.append(tokens)
    assert made[0] == made[1]


def test_penalties_and_processors_reach_every_token(mtp: Llama, plain: Llama) -> None:
    def no_newline(ids: Any, scores: Any) -> Any:
        del ids
        scores[breaks] = -np.inf
        return scores

    breaks = [token for token in range(mtp.n_vocab()) if b"\n" in mtp.detokenize([token])]
    processors = llama_cpp.LogitsProcessorList([no_newline])
    for settings in (
        {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1, **GREEDY},
        {"logits_processor": processors, **GREEDY},
        {"repeat_penalty": 1.2, **SAMPLED},
        {"typical_p": 0.9, **SAMPLED},
    ):
        ours, wanted = (llm(PROMPT, max_tokens=48, **settings)["choices"][0]["text"] for llm in (mtp, plain))
        assert ours == wanted
    assert "\n" not in mtp(PROMPT, max_tokens=48, logits_processor=processors, **GREEDY)["choices"][0]["text"]


def test_a_grammar_is_kept_with_drafts(mtp: Llama, plain: Llama) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("ab" | "cd" | "e")+ "\\n"', verbose=False)
    for settings in (GREEDY, SAMPLED):
        ours = mtp(PROMPT, max_tokens=32, grammar=grammar, **settings)["choices"][0]["text"]
        assert ours == plain(PROMPT, max_tokens=32, grammar=grammar, **settings)["choices"][0]["text"]
        assert set(ours) <= set("abcde\n")
    assert mtp.stats.drafted > 0


def test_stops(mtp: Llama, plain: Llama) -> None:
    text = plain(PROMPT, max_tokens=64, **GREEDY)["choices"][0]["text"]
    word = text[20:24]
    ours, wanted = (llm(PROMPT, max_tokens=64, stop=[word], **GREEDY)["choices"][0] for llm in (mtp, plain))
    assert ours == wanted
    assert ours["finish_reason"] == "stop"
    assert word not in ours["text"]


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 15])
def test_any_draft_length_gives_the_same_text(length: int, demo: Pair, plain: Llama) -> None:
    wanted = plain(PROMPT, max_tokens=48, **GREEDY)["choices"][0]["text"]
    with closing(Llama(demo.target, draft_length=length, **OPTIONS)) as llm:
        assert llm(PROMPT, max_tokens=48, **GREEDY)["choices"][0]["text"] == wanted
        assert len(llm.stats.drafted_per_position) == length
        assert (llm.stats.drafted > 0) == (length > 0)


WRONG = {
    "draft_length": ([-1, 16, 2.5, True, "3", "foo", [3]],
                     r'^draft_length is .+; give a number of tokens, 0 for none and 15 at most, or "auto"\.$'),
    "mtp": (["no", "auto", 0, 1, 2.5, []], r"^mtp is .+; give True, False or None\.$"),
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "x"}]


def setting(llm: Llama, name: str, value: Any) -> str:
    setattr(llm, name, value)
    return name


# Every way to say how far, and whether, to draft.
LOADING: dict[str, Callable[..., Any]] = {
    "Llama": lambda path, **wish: Llama(path, **OPTIONS, **wish),
    "open_pair": lambda path, **wish: open_pair(path, **OPTIONS, **wish).__enter__(),
    "from_pretrained": lambda path, **wish: Llama.from_pretrained("nobody/asks-for-this", path.name, **wish),
}
ASKING: dict[str, Callable[..., Any]] = {
    "call": lambda llm, **wish: llm(PROMPT, max_tokens=4, **wish),
    "completion": lambda llm, **wish: llm.create_completion(PROMPT, max_tokens=4, **wish),
    "stream": lambda llm, **wish: list(llm(PROMPT, max_tokens=4, stream=True, **wish)),
    "chat": lambda llm, **wish: llm.create_chat_completion(MESSAGES, max_tokens=4, **wish),
    "chat stream": lambda llm, **wish: list(llm.create_chat_completion(MESSAGES, max_tokens=4, stream=True, **wish)),
    "generate": lambda llm, **wish: next(llm.generate([2, 5], **wish)),
    "attribute": lambda llm, **wish: [setting(llm, *each) for each in wish.items()],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name][0]])
def test_wishes_are_checked_wherever_they_are_given(name: str, value: Any, demo: Pair, mtp: Llama) -> None:
    """One rule, which names what is allowed: beyond 15 the text would depend on how far was drafted."""
    for subject, ways in ((demo.target, LOADING), (mtp, ASKING)):
        for way in ways.values():
            with pytest.raises(ValueError, match=WRONG[name][1]):
                way(subject, **{name: value})
    assert mtp(PROMPT, max_tokens=8, **GREEDY) and mtp.stats.drafted > 0


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["chat"], ["bench"]], ids=lambda words: words[0])
def test_the_commands_check_the_draft_length(command: list[str], demo: Pair) -> None:
    for length in ("16", "-1", "2.5", "True", "foo"):
        wrong = CliRunner().invoke(main, [*command, str(demo.target), "--draft", length])
        assert wrong.exit_code == 2
        said = " ".join(wrong.stderr.split())
        assert 'a number of tokens, 0 for none and 15 at most, or "auto"' in said or "not a list of numbers" in said


def test_a_draft_length_may_be_of_any_whole_number_type(mtp: Llama) -> None:
    kept = mtp.draft_length
    setting(mtp, "draft_length", np.int64(4))
    assert (mtp.draft_length, type(mtp.draft_length)) == (4, int)
    mtp.draft_length = kept
    assert mtp(PROMPT, max_tokens=2, draft_length="auto")["choices"]


@pytest.mark.parametrize("way", ASKING)
def test_mtp_asked_for_where_it_cannot_be_had_is_an_error(way: str, plain: Llama, mtp: Llama) -> None:
    with pytest.raises(ValueError, match=r"^MTP was asked for, but drafter=None was given .+; load it with"):
        ASKING[way](plain, mtp=True)
    with pytest.raises(ValueError, match=r"^MTP was asked for, but draft_length is 0"):
        ASKING[way](mtp, draft_length=0, mtp=True)
    if way != "attribute":
        assert ASKING[way](plain, mtp=False)
        assert ASKING[way](mtp, mtp=True)
        if not way.startswith("chat"):
            with pytest.raises(ValueError, match=r"^MTP was asked for, but mirostat draws .+mirostat_mode"):
                ASKING[way](mtp, mtp=True, mirostat_mode=2)
    mtp.mtp, mtp.draft_length = None, 3


def test_mtp_of_an_object(demo: Pair, tmp_path: Path) -> None:
    """What requests go by that say nothing; and with True there must be a drafter, before anything is loaded."""
    with closing(Llama(demo.target, draft_length=3, mtp=False, **OPTIONS)) as llm:
        assert llm.drafter is not None and llm.mtp is False
        for wish, drafts in (({}, False), ({"mtp": True}, True), ({"draft_length": 2}, False)):
            llm(PROMPT, max_tokens=8, **GREEDY, **wish)
            assert (llm.stats.drafted > 0) == drafts
        llm.mtp = None
        llm(PROMPT, max_tokens=8, **GREEDY)
        assert llm.stats.drafted > 0
    alone = shutil.copy(demo.target, tmp_path)
    for path, options, reason in (
        (alone, {}, "no linked drafter beside"),
        (demo.target, {"drafter": None}, "drafter=None"),
        (demo.target, {"embedding": True}, "embedding=True .+ leave that argument out"),
        (demo.target, {"vocab_only": True}, "vocab_only=True"),
        (demo.target, {"draft_length": 0}, "draft_length is 0"),
    ):
        with pytest.raises(ValueError, match=f"^MTP was asked for, but {reason}"):
            Llama(path, mtp=True, **OPTIONS, **options)
    with pytest.raises(ValueError, match="does not exist"):
        Llama(tmp_path / "none.gguf", mtp=True, **OPTIONS)


def told(capfd: pytest.CaptureFixture[str], path: Path, **options: Any) -> list[str]:
    """The lines on stderr from loading a target and two requests to it."""
    capfd.readouterr()
    with closing(Llama(path, **OPTIONS, **options)) as llm:
        for _ in range(2):
            llm(PROMPT, max_tokens=2, **GREEDY)
        assert llm.drafter is None or options
    return capfd.readouterr().err.splitlines()


def test_a_missing_drafter_is_said_once(demo: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """To those who did not ask for none, with verbose=False too; not by every request, nor again by the command."""
    alone = Path(shutil.copy(demo.target, tmp_path))
    line = (
        f"gemma-mtp: generating without MTP: no linked drafter beside {alone}; put {demo.drafter.name!r} there, or "
        "name one with drafter= (--drafter)."
    )
    assert told(capfd, alone) == [line]
    for options in ({"mtp": False}, {"drafter": None}, {"drafter": demo.drafter}):
        assert told(capfd, alone, **options) == []
    command = [sys.executable, "-c", MAIN, "run", str(alone), "-p", PROMPT, "-n", "2", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[:-1] == [line]
    assert "without MTP, seed" in done.stderr.splitlines()[-1]
    assert "MTP: no" not in subprocess.run([*command, "--no-mtp"], capture_output=True, text=True, check=True).stderr


def test_whose_the_drafter_is_that_lies_there(
    demo: Pair, tiny_f32: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under the name of this target's own, or under any; and one that is linked to no target."""
    alone = Path(shutil.copy(demo.target, tmp_path))
    theirs, ours = (link.read_header(path).metadata[link.KEY_SOURCE][:12] for path in (tiny_f32.target, demo.target))
    for name in (demo.drafter.name, "sha256-0"):
        other = Path(shutil.copy(tiny_f32.drafter, tmp_path / name))
        (line,) = told(capfd, alone)
        assert line == (
            f"gemma-mtp: generating without MTP: no linked drafter beside {alone}: {other} lies there, but is of "
            f"another target: {tiny_f32.target.name!r}, fingerprint {theirs}, here {ours}; put its own there, or name "
            "one with drafter= (--drafter)."
        )
        with pytest.raises(link.PairError, match="lies there, but is of another target"), open_pair(alone, **OPTIONS):
            pass
        assert "lies there, but is of another target" in CliRunner().invoke(main, ["verify", str(alone)]).stderr
        other.unlink()
    unlinked = tmp_path / "d.gguf"
    unlinked.write_bytes(demo.drafter.read_bytes().replace(link.KEY_TARGET.encode(), b"mtp.target.fingerprinX"))
    (line,) = told(capfd, alone)
    assert line.endswith(f": {unlinked} is linked to no target; run gemma-mtp link {alone} {unlinked}.")


def test_parts_of_a_split_target(tiny: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is asked for: the second part names the first, a missing or renamed one the name that it needs."""
    made = convert_pair(tiny["target"], tiny["dense"], tmp_path, "Q8_0", name="x", split_max_size=2_000_000)
    first, second, *_ = [path for path in made.files if "assistant" not in path.name]
    count = len(made.files) - 1

    def fails(path: Path, *words: str) -> None:
        for options in ({}, {"drafter": None}, {"mtp": False}):
            with pytest.raises(link.MtpError) as caught:
                Llama(path, **OPTIONS, **options)
            for word in words:
                assert word in str(caught.value)
        done = CliRunner().invoke(main, ["run", str(path), "-p", "x"])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert words[0] in done.stderr

    assert told(capfd, first, drafter=made.drafter) == []
    fails(second, f"is part 2 of {count}; name the first part: {first}.")
    (tmp_path / "t.gguf").symlink_to(first)
    fails(tmp_path / "t.gguf", f"name it itself: {first}")
    second.rename(tmp_path / "kept")
    fails(first, f"{second}, part 2 of {count}, is missing")
    fails(tmp_path / "kept", f"is part 2 of {count} under another name", f"-00002-of-{count:05}.gguf")
    (tmp_path / "kept").rename(second)
    first.rename(tmp_path / "one.gguf")
    fails(tmp_path / "one.gguf", f"is part 1 of {count} under another name", f"one-00001-of-{count:05}.gguf")


def test_stats_add_up(mtp: Llama) -> None:
    before = mtp.total_stats.tokens
    made = mtp(PROMPT, max_tokens=64, **GREEDY)
    stats = mtp.stats
    assert stats.tokens == made["usage"]["completion_tokens"]
    assert stats.accepted == sum(stats.accepted_per_position)
    assert stats.drafted == sum(stats.drafted_per_position)
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)
    # Every pass gives one token of the target's own beside those accepted; the prompt's own pass gives the first.
    assert stats.tokens <= 1 + stats.target_passes + stats.accepted
    assert stats.target_passes < stats.tokens
    assert stats.seconds > 0
    assert mtp.total_stats.tokens == before + stats.tokens


def test_seconds_are_what_the_user_waits_for(mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only stands still where nothing outside of the loop is done."""
    now, piece = 100.0, mtp.tokenizer_.piece

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal now
        now += 1.0
        return piece(*args, **kwargs)

    monkeypatch.setattr("gemma_mtp.runtime.stats.perf_counter", lambda: now)
    monkeypatch.setattr(mtp.tokenizer_, "piece", slow)
    made = mtp(PROMPT, max_tokens=32, **GREEDY)["usage"]["completion_tokens"]
    assert made == 32
    assert mtp.stats.time_to_first_token == 0.0
    assert mtp.stats.seconds == now - 100.0 >= made
    assert mtp.stats.tokens_per_second <= 1.0
    assert 0 < mtp.stats.loop_seconds < 30 * 60  # by the true clock, which this test does not look at
    assert f"{mtp.stats.tokens_per_second:.1f} tokens/s" in mtp.stats.line()
    told = mtp.stats.as_dict()
    assert told["generation_seconds"] == told["seconds"] == mtp.stats.seconds
    monkeypatch.setattr(mtp.tokenizer_, "piece", piece)
    before = mtp.total_stats.seconds
    for _ in mtp(PROMPT, max_tokens=8, stream=True, **GREEDY):
        now += 10.0
    assert mtp.stats.time_to_first_token == 0.0
    assert mtp.stats.seconds == 80.0  # the reader's time after the last chunk is its own
    assert mtp.total_stats.seconds == before + 80.0
    for _ in zip(range(5), mtp.generate(mtp.tokenize(PROMPT.encode()), temp=0.0), strict=False):
        now += 10.0
    assert mtp.stats.seconds == 40.0


def test_a_follow_up_reuses_the_cache(mtp: Llama) -> None:
    first = mtp(PROMPT, max_tokens=32, **GREEDY)["choices"][0]["text"]
    second = mtp(PROMPT + first, max_tokens=32, **GREEDY)["choices"][0]["text"]
    assert mtp.stats.prompt_tokens < 8
    mtp.reset()
    assert mtp(PROMPT + first, max_tokens=32, **GREEDY)["choices"][0]["text"] == second
    assert mtp.stats.prompt_tokens > 8


@pytest.mark.parametrize("n_ctx", [64, 256], ids=["rounded up by llama.cpp", "exact"])
def test_the_context_runs_out(n_ctx: int, demo: Pair) -> None:
    made = {}
    for name, drafter in (("mtp", "auto"), ("plain", None)):
        with closing(Llama(demo.target, drafter=drafter, draft_length=3, **OPTIONS | {"n_ctx": n_ctx})) as llm:
            made[name] = llm(PROMPT, max_tokens=None, **GREEDY)["choices"][0]
            assert llm.n_tokens <= llm.n_ctx()
            with pytest.raises(ValueError, match=r"context window of \d+|raise n_ctx"):
                llm("x = 1\n" * 100, max_tokens=4)
            assert llm(PROMPT, max_tokens=4, **GREEDY)["choices"][0]["text"]
    assert made["mtp"] == made["plain"]
    assert made["mtp"]["finish_reason"] == "length"


def test_a_prompt_longer_than_a_batch(demo: Pair) -> None:
    text = "import os\nimport sys\n" * 20
    made = []
    for drafter in ("auto", None):
        with closing(Llama(demo.target, drafter=drafter, draft_length=3, n_batch=32, **OPTIONS)) as llm:
            made.append(llm(text, max_tokens=24, **GREEDY)["choices"][0]["text"])
    assert made[0] == made[1]


def test_no_array_of_all_logits(demo: Pair) -> None:
    with closing(Llama(demo.target, **OPTIONS | {"n_ctx": 2048})) as llm:
        llm(PROMPT, max_tokens=16, **GREEDY)
        assert llm.scores.shape[0] <= llm.n_batch
        assert not llm._logits_all


ON, OFF = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
LAYERS: list[dict[str, Any]] = [{}, {"n_gpu_layers": 0}, {"n_gpu_layers": -1}, {"n_gpu_layers": 99}]
needs_series = pytest.mark.skipif(not native.patched(), reason="the default without our series is stock's")


@needs_series
@pytest.mark.parametrize("given", LAYERS, ids=str)
def test_flash_attention_is_the_default_on_a_cpu(
    given: dict[str, Any], demo: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of layers is to go to a GPU: what counts is whether there is one."""
    for gpu in (False, True):
        monkeypatch.setattr(native, "has_gpu", lambda gpu=gpu: gpu)
        default = OFF if gpu and given.get("n_gpu_layers") else ON
        tried: list[tuple[dict[str, Any], int]] = [
            ({}, default),
            ({"flash_attn": False}, OFF),
            ({"flash_attn": True}, ON),
        ]
        for asked, wanted in tried:
            with closing(Llama(demo.target, drafter=None, **OPTIONS, **given, **asked)) as llm:
                assert llm.context_params.flash_attn_type == wanted, (gpu, asked)


@needs_series
@pytest.mark.parametrize("command", ["run", "chat"])
def test_flash_attention_in_the_commands(command: str, demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Noted(Llama):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self.context_params.flash_attn_type)

    monkeypatch.setattr(native, "has_gpu", lambda: False)
    monkeypatch.setattr("gemma_mtp.runtime.llama.Llama", Noted)
    arguments = {"run": ["-p", "x", "-n", "2"], "chat": ["-n", "2"]}[command]
    for asked, wanted in (([], ON), (["-ngl", "99"], ON), (["-ngl", "0"], ON)):
        done = CliRunner().invoke(main, [command, str(demo.target), "-t", "1", *arguments, *asked], input="x\n")
        assert done.exit_code == 0, done.output
        assert made.pop() == wanted
        assert not made


def test_a_gpu_is_a_device_not_an_ability_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for GPUs, or for devices of another machine, where there are none."""
    there = any(lib._lib.ggml_backend_dev_by_type(kind) for kind in (native.GPU, native.IGPU))
    monkeypatch.setattr(lib, "llama_supports_gpu_offload", lambda: True)
    assert native.has_gpu.__wrapped__() == there


def test_an_abandoned_stream_leaves_a_usable_state(mtp: Llama, plain: Llama) -> None:
    stream = mtp(PROMPT, max_tokens=64, stream=True, **GREEDY)
    for _ in range(5):
        next(stream)
    stream.close()
    wanted = plain(PROMPT, max_tokens=32, **GREEDY)["choices"][0]["text"]
    assert mtp(PROMPT, max_tokens=32, **GREEDY)["choices"][0]["text"] == wanted


def test_pickling_keeps_the_drafter(demo: Pair) -> None:
    with closing(Llama(demo.target, draft_length=2, **OPTIONS)) as llm:
        copy = pickle.loads(pickle.dumps(llm))
    with closing(copy):
        assert copy.drafter is not None
        assert copy.draft_length == 2


def test_open_pair_wants_a_pair(demo: Pair, tmp_path: Path) -> None:
    with open_pair(demo.target, **OPTIONS) as llm:
        assert llm.drafter is not None
    alone = shutil.copy(demo.target, tmp_path)
    with pytest.raises(link.PairError, match="no linked drafter"), open_pair(alone, **OPTIONS):
        pass


def test_a_wrong_drafter_is_refused(demo: Pair, tiny_f32: Pair) -> None:
    with pytest.raises(link.PairError, match="fingerprint"):
        Llama(demo.target, drafter=tiny_f32.drafter, **OPTIONS)
    with pytest.raises(link.PairError, match="not a drafter"):
        Llama(demo.target, drafter=demo.target, **OPTIONS)
    with pytest.raises(link.MtpError, match="No such file"):
        Llama(demo.target, drafter="nowhere.gguf", **OPTIONS)


def test_run_prints_text_and_one_line_of_statistics(demo: Pair) -> None:
    command = ["run", str(demo.target), "-p", PROMPT, "-n", "24", "--temp", "0", "--draft", "3", "-t", "1"]
    done, without = (CliRunner().invoke(main, [*command, *more]) for more in ([], ["--no-mtp"]))
    assert done.exit_code == without.exit_code == 0, done.output
    assert done.stdout == without.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert "accepted" in done.stderr
    assert "accepted" not in without.stderr
    found = json.loads(CliRunner().invoke(main, [*command, "--json", "--draft", "2"]).stdout)
    assert found["text"] == done.stdout.removesuffix("\n")
    assert len(found["stats"]["accepted_per_position"]) == 2


def test_run_tells_the_seed_it_drew(demo: Pair) -> None:
    command = ["run", str(demo.target), "-p", PROMPT, "-n", "24", "--temp", "1.5", "-t", "1"]
    first, second = (CliRunner().invoke(main, command) for _ in range(2))
    seed, other = (re.search(r", seed (\d+)$", done.stderr) for done in (first, second))
    assert seed is not None and other is not None
    assert seed[1] != other[1]
    again = CliRunner().invoke(main, [*command, "--seed", seed[1], "--json"])
    assert json.loads(again.stdout)["text"] + "\n" == first.stdout
    assert json.loads(again.stdout)["stats"]["seed"] == int(seed[1])
    assert f"seed           {seed[1]}" in CliRunner().invoke(main, [*command, "--seed", seed[1], "--stats"]).stderr


def test_run_stats_are_for_people(demo: Pair) -> None:
    command = ["run", str(demo.target), "-p", PROMPT, "-n", "24", "--temp", "0", "--stats", "-t", "1"]
    told = CliRunner().invoke(main, [*command, "--draft", "3"]).stderr
    for heading in ("target passes", "accepted", "by position", "from mtp", "time", "speed"):
        assert heading in told
    assert "from mtp" not in CliRunner().invoke(main, [*command, "--no-mtp"]).stderr


def test_the_default_length_goes_by_cost(demo: Pair, plain: Llama) -> None:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        assert llm.draft_length == "auto"
        made = llm(PROMPT, max_tokens=64, **GREEDY)["choices"][0]["text"]
        assert made == plain(PROMPT, max_tokens=64, **GREEDY)["choices"][0]["text"]
        assert llm.stats.speedup is not None
        assert llm._costs.seen(1) >= 2
        assert llm._costs_path.exists()


def test_run_names_what_is_wrong_in_one_line(demo: Pair, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo.target.read_bytes()[:-50000])
    for target in (tmp_path / "none.gguf", cut, demo.drafter):
        command = [sys.executable, "-c", MAIN, "run", str(target), "-p", "x"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1
