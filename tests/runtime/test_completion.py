"""Completions: one text for a request, whole or streamed; where it ends; what the answer tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from children import post, serving
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, as_async
from gemma_mtp.runtime.logprobs import top_logprobs
from gemma_mtp.runtime.programs import program
from gemma_mtp.runtime.text import Tokenizer
from llama_cpp import llama_cpp as lib
from llamas import OPTIONS
from prompts import PROMPT

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
CHAT = [{"role": "user", "content": "Continue:\nimport os\n"}]


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def text(mtp: Llama) -> str:
    return str(mtp(PROMPT, **GREEDY)["choices"][0]["text"])


def whole(llm: Llama, **given: Any) -> tuple[str, str]:
    """Text and reason of an answer, which must be those of the same answer in chunks."""
    answer = llm(PROMPT, **GREEDY | given)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in llm(PROMPT, **GREEDY | given, stream=True)]
    made = "".join(chunk["text"] for chunk in chunks), str(chunks[-1]["finish_reason"])
    assert made == (answer["text"], answer["finish_reason"])
    return made


def spelling(llm: Llama, tokens: list[int]) -> llama_cpp.LogitsProcessorList:
    """A processor that leaves no choice but these tokens, over and over."""
    begun: list[int] = []

    def only(ids: Any, scores: Any) -> Any:
        if not begun or len(ids) < begun[-1]:
            begun.append(len(ids))
        wanted = tokens[(len(ids) - begun[-1]) % len(tokens)]
        scores[np.arange(llm.n_vocab()) != wanted] = -np.inf
        return scores

    return llama_cpp.LogitsProcessorList([only])


def test_stops(mtp: Llama, text: str) -> None:
    """Wherever in a token they begin and end; empty ones are none, a tuple is a list, of two the first counts."""
    assert len(text) > 40
    for start in range(0, 40, 3):
        for length in (1, 2, 5, 11):
            stop = text[start : start + length]
            cut = text[: text.index(stop)], "stop"
            assert whole(mtp, stop=stop) == whole(mtp, stop=("", stop, "not there")) == cut
            longer = text[max(start - 2, 0) : start + length]
            assert whole(mtp, stop=[stop, longer]) == (min(cut[0], text[: text.index(longer)], key=len), "stop")
    for none in (None, [], "", [""], (), ["not there"], [text + "x"]):
        assert whole(mtp, stop=none) == (text, "length")


def test_a_control_token_is_a_stop(mtp: Llama) -> None:
    """Though no text shows it."""
    tokens = mtp.tokenize(b"ab<|turn>cd", add_bos=False, special=True)
    turn = tokens.index(mtp.tokenize(b"<|turn>", add_bos=False, special=True)[0])
    given = {"logits_processor": spelling(mtp, tokens)}
    assert whole(mtp, **given)[0].startswith("abcdab")
    assert whole(mtp, **given, stop=["x", "<|turn>"]) == ("ab", "stop")
    assert mtp(PROMPT, **GREEDY, **given, stop="<|turn>")["usage"]["completion_tokens"] == turn


def test_a_character_that_is_not_finished(mtp: Llama, demo: Pair) -> None:
    """The text is what is whole, by max_tokens and by the end of the context; no token more is made."""
    snow = mtp.tokenize("☃".encode(), add_bos=False)
    assert len(snow) == 3
    given = {"logits_processor": spelling(mtp, snow)}
    for most in range(1, 9):
        assert whole(mtp, **given, max_tokens=most) == ("☃" * (most // 3), "length")
        assert mtp(PROMPT, **GREEDY | {"max_tokens": most}, **given)["usage"]["completion_tokens"] == most
    assert whole(mtp, **given, stop=["☃☃"]) == ("", "stop")
    with closing(Llama(demo.target, **OPTIONS | {"n_ctx": 256})) as small:
        prompt = len(small.tokenize(PROMPT.encode()))
        for less in range(3):
            given = {"logits_processor": spelling(small, [*snow[less:], *snow]), "max_tokens": None}
            made, finish = whole(small, **given)
            assert finish == "length"
            assert small.stats.tokens == 256 - prompt
            assert set(made) == {"☃"}


def test_how_many_tokens(mtp: Llama, text: str) -> None:
    prompt = len(mtp.tokenize(PROMPT.encode()))
    for most in (0, 1, 2, 3):
        answer = mtp(PROMPT, **GREEDY | {"max_tokens": most})
        assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": most, "total_tokens": prompt + most}
        assert text.startswith(answer["choices"][0]["text"])
        assert answer["choices"][0]["finish_reason"] == "length"
        assert [c["choices"][0]["finish_reason"] for c in mtp(PROMPT, **GREEDY | {"max_tokens": most}, stream=True)][
            -1
        ] == "length"
    for unlimited in (-1, -7, None):
        answer = mtp("x", temperature=0.0, max_tokens=unlimited)
        assert answer["usage"]["total_tokens"] == 512 or answer["choices"][0]["finish_reason"] == "stop"


def test_no_tokens_evaluate_the_prompt(mtp: Llama) -> None:
    mtp.reset()
    answer = mtp(PROMPT, max_tokens=0, echo=True, logprobs=2)
    tokens = mtp.tokenize(PROMPT.encode())
    assert answer["choices"][0]["text"] == PROMPT
    assert mtp.n_tokens == len(tokens)
    assert mtp.stats.prompt_tokens == len(tokens)
    longer = mtp(PROMPT, **GREEDY, echo=True, logprobs=2)["choices"][0]["logprobs"]
    for key, values in answer["choices"][0]["logprobs"].items():
        assert values == longer[key][: len(tokens) - 1]
    mtp(PROMPT, max_tokens=0)
    assert mtp(PROMPT, **GREEDY)["timings"]["cache_n"] == len(tokens) - 1
    assert mtp("", max_tokens=0)["usage"] == {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
    assert mtp.create_chat_completion(CHAT, max_tokens=0)["choices"][0]["message"]["content"] == ""


def test_min_tokens_knows_every_end(mtp: Llama) -> None:
    """As a keyword, and as the processor that llama-cpp-python has for it, which knows one of them."""
    ends = [token for token in range(mtp.n_vocab()) if mtp.ends(token)]
    assert len(ends) == 3
    theirs = llama_cpp.llama.MinTokensLogitsProcessor(8, mtp.token_eos())
    for end in ends:

        def favor(ids: Any, scores: Any, end: int = end) -> Any:
            scores[end] += 1000
            return scores

        def made(end_first: Any = favor, *more: Any, **given: Any) -> int:
            processors = llama_cpp.LogitsProcessorList([end_first, *more])
            answer = mtp(PROMPT, **GREEDY, logits_processor=processors, **given)
            assert answer["choices"][0]["finish_reason"] == "stop"
            return int(answer["usage"]["completion_tokens"])

        assert made() == 0
        assert made(min_tokens=5) == made(min_tokens=5) == 5
        assert made(favor, theirs) == made(favor, theirs) == 8
        chat = mtp.create_chat_completion(CHAT, logits_processor=[favor], min_tokens=3, **GREEDY)
        assert chat["usage"]["completion_tokens"] == 3


def test_a_seed_of_one_request_is_not_the_object_s(mtp: Llama) -> None:
    after = []
    for _ in range(2):
        assert mtp(PROMPT, seed=5, max_tokens=1)["seed"] == 5
        after.append(mtp(PROMPT, max_tokens=1)["seed"])
    assert after[0] != after[1]


REQUESTS: dict[str, Callable[[Llama, dict[str, Any]], Any]] = {
    "plain": lambda llm, given: llm(PROMPT * 8, **given),
    "again": lambda llm, given: llm(PROMPT * 8, **given),
    "logprobs": lambda llm, given: llm(PROMPT * 8, **given, logprobs=2),
    "echo": lambda llm, given: llm(PROMPT * 8, **given, echo=True, logprobs=1),
    "after half of it": lambda llm, given: (llm(PROMPT * 4 + "x", max_tokens=3), llm(PROMPT * 8, **given))[1],
    "as tokens": lambda llm, given: llm(llm.tokenize((PROMPT * 8).encode(), special=True), **given),
    "stops that do not come": lambda llm, given: llm(PROMPT * 8, **given, stop=["never there", "nor this"]),
    "without drafts": lambda llm, given: llm(PROMPT * 8, **given, mtp=False),
    "long drafts": lambda llm, given: llm(PROMPT * 8, **given, draft_length=15),
}


@pytest.mark.parametrize("n_batch", [512, 24, 3])
def test_one_request_one_text(n_batch: int, demo: Pair, mtp: Llama) -> None:
    """Whatever is asked for beside it, whatever was done before, however its prompt is cut."""
    given = {"temperature": 1.0, "seed": 11, "max_tokens": 40, "top_k": 64, "min_p": 0.0}
    wanted = mtp(PROMPT * 8, **given)["choices"][0]["text"]
    with closing(Llama(demo.target, **OPTIONS | {"n_batch": n_batch})) as llm:
        for name, ask in REQUESTS.items():
            assert ask(llm, given)["choices"][0]["text"].removeprefix(PROMPT * 8) == wanted, name
        state = llm.save_state()
        llm("y = 1\n" * 60, max_tokens=20)
        llm.load_state(state)
        assert llm(PROMPT * 8, **given)["choices"][0]["text"] == wanted
        llm.set_cache(llama_cpp.LlamaRAMCache())
        for _ in range(2):
            assert llm(PROMPT * 8, **given)["choices"][0]["text"] == wanted
            llm("y = 1\n" * 60, max_tokens=20)


@pytest.mark.parametrize("swa_full", [True, False])
def test_a_shorter_prompt_after_a_state_was_loaded(swa_full: bool, demo: Pair) -> None:
    """What a sliding window has let go is decoded again."""
    with closing(Llama(demo.target, **OPTIONS | {"swa_full": swa_full, "n_ctx": 1024})) as llm:
        window = lib.llama_model_n_swa(llm._model.model)
        tokens = llm.tokenize(b"".join(b"x%d = %d\n" % (i, i * i) for i in range(90)))
        assert len(tokens) > 3 * window
        for cut in (len(tokens) - 5, len(tokens) - window, 2 * window):
            llm.reset()
            wanted = [token for token, _ in zip(llm.generate(tokens[:cut], temp=0.0), range(12), strict=False)]
            llm.reset()
            assert list(zip(llm.generate(tokens, temp=0.0), range(12), strict=False))
            state = llm.save_state()
            llm("y = 1\n" * 60, max_tokens=20)
            llm.load_state(state)
            assert [t for t, _ in zip(llm.generate(tokens[:cut], temp=0.0), range(12), strict=False)] == wanted


@pytest.mark.parametrize("given", [{}, {"stream": True}, {"logprobs": 2}, {"logprobs": 2, "stream": True}], ids=str)
def test_a_token_is_spelled_as_often_in_a_long_answer(given: Any, mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock spells all of them anew for each."""
    ends = {token: -1e9 for token in range(mtp.n_vocab()) if mtp.ends(token)}
    real, spelled = Tokenizer.piece, 0

    def counted(*args: Any) -> bytes:
        nonlocal spelled
        spelled += 1
        return real(*args)

    monkeypatch.setattr(Tokenizer, "piece", counted)
    monkeypatch.setattr(lib, "llama_detokenize", None)
    counts = []
    for most in (50, 400):
        spelled = 0
        answer = mtp("x", temperature=1.0, seed=3, max_tokens=most, logit_bias=ends, **given)
        assert list(answer)
        assert mtp.stats.tokens == most
        counts.append(spelled / most)
    assert 1 <= counts[1] <= counts[0] + 0.1 <= 8


def test_pieces_of_any_length(mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of more than 32 bytes, of which stock shows nothing, and those that the first try has no room for."""
    vocab = mtp._model.vocab
    sizes = {token: len(mtp.detokenize([token])) for token in range(mtp.n_vocab())}
    for room in (1, 4, 256):
        monkeypatch.setattr("gemma_mtp.runtime.text.PIECE_BYTES", room)
        tokens = Tokenizer(mtp)
        for token, size in sizes.items():
            made = tokens.detokenize([token])
            assert len(made) == size
            if 0 < size <= 32:
                assert made == mtp._model.detokenize([token])
    assert lib.llama_vocab_n_tokens(vocab) == len(sizes)
    everything = Tokenizer(mtp).detokenize(list(sizes))
    assert len(everything) == sum(sizes.values())


@pytest.mark.parametrize("token", [-1, 10**6, "n_vocab"])
def test_what_is_no_token_is_an_error(token: Any, mtp: Llama) -> None:
    """llama.cpp ends the process."""
    wrong = mtp.n_vocab() if token == "n_vocab" else token
    with pytest.raises(TypeError, match="bytes"):
        mtp.tokenize("x")
    with pytest.raises(TypeError, match="float"):
        mtp.detokenize([2.5])
    with pytest.raises(
        IndexError, match=rf"{wrong} is no token of this model; its ids go from 0 to {mtp.n_vocab() - 1}"
    ):
        mtp.detokenize([2, wrong])
    if wrong > 0:
        calls: list[Callable[[list[int]], Any]] = [mtp.create_completion, lambda tokens: next(mtp.generate(tokens))]
        for call in calls:
            with pytest.raises(ValueError, match=rf"{wrong} is no token"):
                call([2, wrong])


TIMINGS = [
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
]  # fmt: skip
DRAFTED = [
    "draft_n", "draft_n_accepted", "draft_n_per_position", "draft_n_accepted_per_position",
    "draft_n_from", "draft_n_accepted_from",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["completion", "stream", "chat", "chat stream", "mirostat", "without drafts"])
def test_timings_are_told(mode: str, mtp: Llama) -> None:
    """They are those of `stats`."""
    given = GREEDY | {"stream": "stream" in mode, "mtp": False if mode == "without drafts" else None}
    given |= {"mirostat_mode": 2, "temperature": 1.0} if mode == "mirostat" else {}
    mtp.reset()
    answer = mtp.create_chat_completion(CHAT, **given) if "chat" in mode else mtp(PROMPT, **given)
    chunks = list(answer) if given["stream"] else [answer]
    assert not [chunk for chunk in chunks[:-1] if "timings" in chunk]
    found, stats = chunks[-1]["timings"], mtp.stats
    drafted = mode not in ("mirostat", "without drafts")
    assert [name for name in found if name != "speedup"] == TIMINGS + DRAFTED * drafted
    assert found.get("speedup") == stats.speedup
    if drafted:
        assert found["draft_n"] == sum(found["draft_n_per_position"]) == sum(found["draft_n_from"].values())
        assert found["draft_n_accepted"] == sum(found["draft_n_accepted_per_position"])
        assert found["draft_n_accepted"] == sum(found["draft_n_accepted_from"].values())
    assert found["predicted_n"] == stats.tokens
    assert found["cache_n"] + found["prompt_n"] == mtp.n_tokens - stats.tokens + 1
    assert 0 < found["prompt_ms"] + found["predicted_ms"] <= stats.seconds * 1e3 + 1e-6
    assert found["predicted_per_second"] == pytest.approx((stats.tokens - 1) / found["predicted_ms"] * 1e3)
    assert stats.draft_length == (0 if mode == "without drafts" else 3)


def test_timings_are_named_as_llama_server_names_them(demo: Pair, tmp_path: Path, mtp: Llama) -> None:
    given = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0.0}
    options = ("-c", 512, "-md", demo.drafter, "--spec-type", "draft-mtp", "--spec-draft-n-max", 3)
    with serving(program("llama-server"), tmp_path / "log", "-m", demo.target, *options) as url:
        theirs = post(f"{url}/v1/completions", given)["timings"]
    mtp.reset()
    ours = mtp(**given)["timings"]
    # A speed-up is told where a pass over one token was timed, which either may have done.
    assert [name for name in ours if name != "speedup"] == [name for name in theirs if name != "speedup"]
    counted = ("cache_n", "prompt_n", "predicted_n")
    assert {name: ours[name] for name in counted} == {name: theirs[name] for name in counted}


def test_asyncio(mtp: Llama, text: str) -> None:
    """Whole answers and streams from tasks, and a task that is cancelled."""

    async def read(most: int | None = None) -> str:
        made = ""
        async for chunk in as_async(mtp(PROMPT, **GREEDY, stream=True)):
            made += chunk["choices"][0]["text"]
            if most is not None and len(made) >= most:
                break
        return made

    async def ask() -> None:
        answer = await asyncio.to_thread(mtp, PROMPT, **GREEDY)
        assert answer["choices"][0]["text"] == text
        assert await read() == text
        assert text.startswith(await read(5))
        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await read() == text

    asyncio.run(ask())


def test_the_prompt_of_tokens_is_echoed(mtp: Llama, text: str) -> None:
    tokens = mtp.tokenize(PROMPT.encode())
    for prompt in (tokens, tuple(tokens), np.array(tokens)):
        assert mtp(prompt, **GREEDY, echo=True)["choices"][0]["text"] == PROMPT + text


def test_a_text_that_begins_with_a_space(mtp: Llama) -> None:
    """Stock takes it for the space that other vocabularies put before every text."""
    tokens = mtp.tokenize(b"  x")
    assert tokens[0] == mtp.token_bos()
    assert mtp.detokenize(tokens) == b"  x"
    chunks = mtp("", **GREEDY, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == mtp("", **GREEDY)["choices"][0]["text"]


@pytest.mark.parametrize("seed", range(8))
def test_the_most_likely_tokens_are_those_of_the_sorted_row(seed: int) -> None:
    """As stock sorts them: of equal ones the higher id first."""
    draw = np.random.default_rng(seed)
    row = draw.integers(-9, 9, 300).astype(np.float32) if seed % 2 else draw.normal(0, 4, 300).astype(np.float32)
    row[draw.integers(0, 300, 40)] = -np.inf
    logprobs = llama_cpp.Llama.logits_to_logprobs(row)
    ordered = sorted(zip(logprobs.tolist(), range(300), strict=True), reverse=True)
    for top in (0, 1, 5, 64, 300, 400):
        chosen, best = top_logprobs(row, 7, top)
        assert chosen == pytest.approx(float(logprobs[7]))
        assert [token for token, _ in best] == [token for _, token in ordered[:top]]
        assert [value for _, value in best] == pytest.approx([value for value, _ in ordered[:top]])
