"""Side by side with stock llama_cpp.Llama: the same call, the same answer."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama
from llamas import OPTIONS
from prompts import PROMPT

MESSAGES = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Continue:\nimport os\n"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def stock(demo: Pair) -> Iterator[llama_cpp.Llama]:
    """With all logits, as it needs for log-probabilities."""
    with closing(llama_cpp.Llama(str(demo.target), logits_all=True, **OPTIONS)) as llm:
        yield llm


def grammar(llm: Any) -> llama_cpp.LlamaGrammar:
    del llm
    return llama_cpp.LlamaGrammar.from_string('root ::= ("ab" | "cd" | "e")+ "\\n"', verbose=False)


def bans(llm: Any) -> llama_cpp.LogitsProcessorList:
    """A processor that bans the word `self` and everything with a newline."""
    banned = [t for t in range(llm.n_vocab()) if b"\n" in llm.detokenize([t]) or b"self" in llm.detokenize([t])]

    def ban(ids: Any, scores: Any) -> Any:
        assert len(ids) >= 9
        scores[banned] = -np.inf
        return scores

    return llama_cpp.LogitsProcessorList([ban])


def five_more(llm: Any) -> llama_cpp.StoppingCriteriaList:
    start = len(llm.tokenize(PROMPT.encode())) + 5
    return llama_cpp.StoppingCriteriaList([lambda ids, logits: len(ids) >= start and len(logits) == llm.n_vocab()])


def bias(llm: Any) -> dict[int, float]:
    return dict.fromkeys(llm.tokenize(b" import", add_bos=False), 4.0)


Call = Callable[[Any], Any]
TEXT: dict[str, Call] = {
    "call": lambda llm: llm(PROMPT, **GREEDY),
    "tokens as prompt": lambda llm: llm.create_completion(llm.tokenize(PROMPT.encode()), **GREEDY),
    "stop": lambda llm: llm(PROMPT, **GREEDY, stop=["path", "sys"]),
    "one stop": lambda llm: llm(PROMPT, **GREEDY, stop="\n"),
    "one token": lambda llm: llm(PROMPT, temperature=0.0, max_tokens=1),
    "two tokens": lambda llm: llm(PROMPT, temperature=0.0, max_tokens=2),
    "until the context is full": lambda llm: llm(PROMPT * 40, temperature=0.0, max_tokens=None),
    "echo": lambda llm: llm(PROMPT, **GREEDY, echo=True),
    "suffix": lambda llm: llm(PROMPT, **GREEDY, suffix="\n    return 0\n"),
    "model": lambda llm: llm(PROMPT, **GREEDY, model="mine"),
    "logit_bias": lambda llm: llm(PROMPT, **GREEDY, logit_bias=bias(llm)),
    "logits_processor": lambda llm: llm(PROMPT, **GREEDY, logits_processor=bans(llm)),
    "stopping_criteria": lambda llm: llm(PROMPT, **GREEDY, stopping_criteria=five_more(llm)),
    "penalties": lambda llm: llm(PROMPT, **GREEDY, repeat_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3),
    "grammar": lambda llm: llm(PROMPT, **GREEDY, grammar=grammar(llm)),
    "truncating samplers": lambda llm: llm(PROMPT, **GREEDY | {"temperature": 0.7}, top_k=1, min_p=0.2, typical_p=0.9),
    "mirostat, greedy": lambda llm: llm(PROMPT, **GREEDY, mirostat_mode=2),
    "logprobs": lambda llm: llm(PROMPT, **GREEDY, logprobs=3),
    "logprobs and stop": lambda llm: llm(PROMPT, **GREEDY, logprobs=1, stop=["path"]),
    "logprobs and echo": lambda llm: llm(PROMPT, **GREEDY, logprobs=2, echo=True),
    "no top logprobs": lambda llm: llm(PROMPT, **GREEDY, logprobs=0),
    "chat": lambda llm: llm.create_chat_completion(MESSAGES, **GREEDY),
    "chat logprobs": lambda llm: llm.create_chat_completion(MESSAGES, **GREEDY, logprobs=True, top_logprobs=2),
    "tools": lambda llm: llm.create_chat_completion(MESSAGES, **GREEDY, tools=TOOLS, tool_choice="auto"),
}
OURS = {"mtp", "draft_length", "min_tokens", "chat_template_kwargs", "parallel_tool_calls", "reasoning_effort"}
SAMPLED = {"temperature": 0.9, "max_tokens": 16, "seed": 5}
SHAPE: dict[str, Call] = {
    "sampled": lambda llm: llm(PROMPT, **SAMPLED),
    "sampled, all of it": lambda llm: llm(PROMPT, **SAMPLED, top_k=0, top_p=1.0, min_p=0.0),
    "mirostat": lambda llm: llm(PROMPT, **SAMPLED, mirostat_mode=1),
    "mirostat 2": lambda llm: llm(PROMPT, **SAMPLED, mirostat_mode=2, logprobs=1),
    "negative temperature": lambda llm: llm(PROMPT, **SAMPLED | {"temperature": -1.0}),
    "save_state": lambda llm: vars(llm.save_state()),
    "getstate": lambda llm: {
        k: v for k, v in llm.__getstate__().items() if k not in {"drafter", "mmproj", "rpc_servers", *OURS}
    },
}


def plain(value: Any) -> Any:
    """A response without what differs from call to call; numbers in it as floats, as JSON has them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("id", "created", "seed", "timings")}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return float(value) if isinstance(value, np.floating) else value


def same(ours: Any, theirs: Any) -> bool:
    """Equal, log-probabilities nearly; and a float must be one in ours."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return isinstance(ours, list) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, float):
        return isinstance(ours, float) and abs(ours - theirs) < 0.05
    return type(ours) is type(theirs) and bool(ours == theirs)


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__


def named(answer: Any) -> Any:
    """Tool calls carry the id of the completion."""
    return json.loads(json.dumps(plain(answer), default=float).replace(answer["id"].removeprefix("chat"), "ID"))


@pytest.mark.parametrize("call", TEXT.values(), ids=list(TEXT))
def test_the_same_answer(call: Call, mtp: Llama, stock: llama_cpp.Llama) -> None:
    ours, theirs = call(mtp), call(stock)
    assert same(named(ours), named(theirs)), (ours, theirs)
    json.dumps(ours)


STREAMED = {name: call for name, call in TEXT.items() if name not in ("echo", "logprobs and echo", "suffix")}
# Of a whole answer to no prompt stock drops the space that it begins with.
STREAMED["empty prompt"] = lambda llm: llm("", **GREEDY)


class Streaming:
    """A Llama whose completions are streamed."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return list(self._llm(*args, stream=True, **kwargs))

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        return list(self._llm.create_completion(*args, stream=True, **kwargs))

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        return list(self._llm.create_chat_completion(*args, stream=True, **kwargs))


@pytest.mark.parametrize("call", STREAMED.values(), ids=list(STREAMED))
def test_the_same_chunks(call: Call, mtp: Llama, stock: llama_cpp.Llama) -> None:
    ours, theirs = call(Streaming(mtp)), call(Streaming(stock))
    made, expected = ([named(chunk) for chunk in chunks] for chunks in (ours, theirs))
    if theirs[0]["object"] == "chat.completion.chunk":  # how much a chunk holds is a matter of time
        made, expected = together(made), together(expected)
    assert same(made, expected)


def together(chunks: list[Any]) -> list[Any]:
    """The chunks of a chat with one for all that have content."""
    whole: list[Any] = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if "content" not in choice["delta"] or not whole or "content" not in whole[-1]["choices"][0]["delta"]:
            whole.append(chunk)
            continue
        last = whole[-1]["choices"][0]
        last["delta"]["content"] += choice["delta"]["content"]
        if last["logprobs"] and choice["logprobs"]:
            last["logprobs"]["content"] += choice["logprobs"]["content"]
    return whole


@pytest.mark.parametrize("call", SHAPE.values(), ids=list(SHAPE))
def test_the_same_keys_and_types(call: Call, mtp: Llama, stock: llama_cpp.Llama) -> None:
    assert shape(plain(call(mtp))) == shape(plain(call(stock)))


METHODS = [name for name, kind in inspect.getmembers(llama_cpp.Llama, callable) if not name.startswith("_")]


@pytest.mark.parametrize("name", [*METHODS, "__call__"])
def test_the_same_arguments(name: str) -> None:
    """Every public method takes what stock's takes, in the same order and with the same defaults."""
    theirs = inspect.signature(getattr(llama_cpp.Llama, name)).parameters
    ours = inspect.signature(getattr(Llama, name)).parameters
    more = OURS if "chat" in name else {*OURS, "response_format"}
    kept = {n: (p.kind, p.default) for n, p in ours.items() if n not in more}
    if name == "from_pretrained":
        assert list(kept)[:2] == list(theirs)[:2]
        return
    assert kept == {n: (p.kind, p.default) for n, p in theirs.items()}


@pytest.mark.parametrize("mode", ["completion", "stream", "chat", "chat stream", "tokens"])
def test_wishes_of_one_request(mode: str, mtp: Llama) -> None:
    def drafted(**wish: Any) -> list[int]:
        if mode == "tokens":
            list(zip(range(20), mtp.generate(mtp.tokenize(PROMPT.encode()), temp=0.0, **wish), strict=False))
        elif mode.startswith("chat"):
            answer = mtp.create_chat_completion(MESSAGES, **GREEDY, stream="stream" in mode, **wish)
            assert list(answer)
        else:
            answer = mtp(PROMPT, **GREEDY, stream=mode == "stream", **wish)
            assert list(answer)
        return mtp.stats.drafted_per_position

    assert drafted(mtp=False) == []
    assert len(drafted(draft_length=5)) == 5
    assert len(drafted(draft_length=1)) == 1
    assert sum(drafted(mtp=True, draft_length=2)) > 0
    assert sum(drafted()) > 0  # nothing of the last request is left
    with pytest.raises(ValueError, match="draft_length"):
        drafted(draft_length=-2)
    with pytest.raises(RuntimeError, match="boom"):
        mtp(PROMPT, **GREEDY, mtp=False, logits_processor=llama_cpp.LogitsProcessorList([boom]))
    assert sum(drafted()) > 0


def boom(ids: Any, scores: Any) -> Any:
    raise RuntimeError("boom")


def test_wishes_pass_a_handler_that_knows_nothing_of_them(demo: Pair) -> None:
    """A handler like functionary's, whose stream makes its completions only when it is read."""

    def handler(*, llama: Any, messages: Any, stream: bool, **arguments: Any) -> Any:
        del arguments

        def chunks() -> Iterator[Any]:
            yield from llama.create_completion(messages[-1]["content"], stream=True, **GREEDY)

        return chunks() if stream else llama.create_completion(messages[-1]["content"], **GREEDY)

    with closing(Llama(demo.target, chat_handler=handler, **OPTIONS)) as llm:
        for stream in (False, True):
            for wish, count in (({"mtp": False}, 0), ({"draft_length": 2}, 2)):
                answer = llm.create_chat_completion([{"role": "user", "content": PROMPT}], stream=stream, **wish)
                list(answer)
                assert len(llm.stats.drafted_per_position) == count


def asked(llm: Llama, mode: str, **given: Any) -> tuple[str, int]:
    """The text of a drawn answer to a prompt that is read afresh, and the seed that it tells."""
    llm.reset()
    settings = {"temperature": 1.0, "max_tokens": 32, "top_k": 64, "min_p": 0.0} | given
    if mode == "mirostat":
        settings["mirostat_mode"] = 2
    stream = "stream" in mode
    if mode.startswith("chat"):
        answer = llm.create_chat_completion(MESSAGES, stream=stream, **settings)
    else:
        answer = llm.create_completion(PROMPT, stream=stream, **settings)
    chunks = list(answer) if stream else [answer]
    assert not [chunk for chunk in chunks[:-1] if "seed" in chunk]
    choices = [chunk["choices"][0] for chunk in chunks]
    parts = [choice.get("delta") or choice.get("message") or {"content": choice.get("text")} for choice in choices]
    return "".join(part.get("content") or "" for part in parts), chunks[-1]["seed"]


@pytest.mark.parametrize("given", [{}, {"seed": -1}, {"seed": 2**32 - 1}], ids=str)
@pytest.mark.parametrize("mode", ["completion", "stream", "chat", "chat stream", "mirostat"])
def test_the_seed_that_was_used_is_told(mode: str, given: dict[str, int], mtp: Llama) -> None:
    """Given back, it makes the same text, with drafts and without."""
    first = asked(mtp, mode, **given)
    assert mtp.stats.seed == first[1]
    assert asked(mtp, mode, **given)[1] != first[1]
    assert asked(mtp, mode, seed=first[1]) == first
    assert asked(mtp, mode, seed=first[1], mtp=False) == first
    assert asked(mtp, mode, seed=first[1] - 2**32) == first  # as llama.cpp takes it, in 32 bits


def test_without_a_seed_every_request_draws_one(demo: Pair) -> None:
    seeds: list[int | None] = []
    for options in ({}, {"seed": -1}, {"seed": None}):
        with closing(Llama(demo.target, **OPTIONS, **options)) as llm:
            tokens = []
            for _ in range(2):
                tokens.append([t for t, _ in zip(llm.generate([2, 5], temp=1.5), range(20), strict=False)])
                seeds.append(llm.stats.seed)
            llm.set_seed(llm.stats.seed)
            assert [t for t, _ in zip(llm.generate([2, 5], temp=1.5), range(20), strict=False)] == tokens[1]
        with closing(Llama(demo.target, **OPTIONS, **options)) as llm:
            seeds += [llm(PROMPT, max_tokens=1)["seed"] for _ in range(2)]
    assert len(set(seeds)) == len(seeds) == 12
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 - 1 for seed in seeds)


def test_an_object_with_a_seed_makes_the_same_sequence_again(demo: Pair) -> None:
    """Its completions take the seeds that stock's take; what `generate` makes is the same each time, as stock's is."""
    made = []
    for kind, seed in ((Llama, 7), (Llama, 7), (Llama, 0), (Llama, 0), (llama_cpp.Llama, 7)):
        with closing(kind(str(demo.target), **OPTIONS | {"seed": seed})) as llm:
            tokens = [[t for t, _ in zip(llm.generate([2, 5], temp=1.5), range(8), strict=False)] for _ in range(2)]
            assert tokens[0] == tokens[1]
            answers = [(llm(PROMPT, temperature=1.5)["choices"][0]["text"], llm._seed) for _ in range(3)]
            made.append((tokens, answers))
    assert made[0] == made[1] != made[2] == made[3]
    assert [seed for _, seed in made[0][1]] == [seed for _, seed in made[4][1]]
    assert len({seed for _, seed in made[0][1]}) == 3


def test_a_seed_is_a_whole_number(mtp: Llama) -> None:
    wrong: list[Any] = ["x", 2.5, []]
    for seed in wrong:
        with pytest.raises(ValueError, match=r"seed is .+; give a whole number"):
            mtp(PROMPT, seed=seed)


def test_thinking_on_and_off(mtp: Llama) -> None:
    asked = []
    template = mtp._chat_handlers["chat_template.default"]
    for thinking in (True, False):
        answer = mtp.create_chat_completion(MESSAGES, **GREEDY, chat_template_kwargs={"enable_thinking": thinking})
        asked.append(mtp.detokenize(mtp._input_ids.tolist(), special=True))
        assert answer["object"] == "chat.completion"
    assert [b"<|think|>" in prompt for prompt in asked] == [True, False]
    assert mtp._chat_handlers["chat_template.default"] is template


def test_logit_bias_and_a_processor_together(mtp: Llama) -> None:
    """Stock applies neither, and adds the bias to the caller's list."""
    processors = bans(mtp)
    word = mtp.tokenize(b" import", add_bos=False)[0]
    text = mtp(PROMPT, **GREEDY, logits_processor=processors, logit_bias={word: 100.0})["choices"][0]["text"]
    assert text == " import" * GREEDY["max_tokens"] or set(text.split()) == {"import"}
    assert len(processors) == 1


def test_logprobs_of_characters_in_several_tokens(mtp: Llama) -> None:
    """Chunks of a stream say every token once, though some hold several."""
    snow = mtp.tokenize("☃".encode(), add_bos=False)
    assert len(snow) > 1
    after = dict(zip(snow, [*snow[1:], snow[0]], strict=True))

    def only_snow(ids: Any, scores: Any) -> Any:
        wanted = after.get(int(ids[-1]), snow[0])
        scores[np.arange(len(scores)) != wanted] = -np.inf
        return scores

    arguments = {**GREEDY, "max_tokens": 4 * len(snow), "logprobs": 1}
    processors = llama_cpp.LogitsProcessorList([only_snow])
    whole = mtp(PROMPT, logits_processor=processors, **arguments)["choices"][0]
    chunks = [c["choices"][0] for c in mtp(PROMPT, logits_processor=processors, stream=True, **arguments)]
    assert whole["text"] == "".join(chunk["text"] for chunk in chunks) == "☃" * 4
    told = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"]["token_logprobs"]]
    assert told == whole["logprobs"]["token_logprobs"]
    assert len(told) == arguments["max_tokens"]


def test_a_cache_of_states(demo: Pair, mtp: Llama) -> None:
    wanted = mtp(PROMPT, **GREEDY)["choices"][0]["text"]
    cache = llama_cpp.LlamaRAMCache()
    for _ in range(2):
        with closing(Llama(demo.target, **OPTIONS)) as llm:
            llm.set_cache(cache)
            assert llm(PROMPT, **GREEDY)["choices"][0]["text"] == wanted
            assert llm.stats.accepted > 0
    assert llm.stats.prompt_tokens == 1
    assert all(state.scores.nbytes < 100_000 for state in cache.cache_state.values())


def test_states_travel_to_and_from_stock(mtp: Llama, demo: Pair) -> None:
    wanted = mtp(PROMPT, **GREEDY)["choices"][0]["text"]
    with closing(llama_cpp.Llama(str(demo.target), **OPTIONS)) as theirs:
        theirs(PROMPT, **GREEDY)
        state = theirs.save_state()
        mtp.reset()
        mtp.load_state(state)
        assert mtp.n_tokens == state.n_tokens
        assert mtp(PROMPT, **GREEDY)["choices"][0]["text"] == wanted
        assert mtp.stats.prompt_tokens == 1
        theirs.reset()
        theirs.load_state(mtp.save_state())
        assert theirs(PROMPT, **GREEDY)["choices"][0]["text"] == wanted


def test_embedding(demo: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    made, texts = [], ["import os", "def f():"]
    for kind in (Llama, llama_cpp.Llama):
        with closing(kind(str(demo.target), embedding=True, **OPTIONS)) as llm:
            pooled = llm.embed(texts[0], normalize=True, return_count=True)
            answers = [llm.embed(texts[0]), list(pooled), llm.create_embedding(texts[:1]), llm(PROMPT, **GREEDY)]
            made.append(plain(answers))
            several = llm.create_embedding(texts)
            assert shape(several) == shape(llm.create_embedding(texts[0]))
            if kind is Llama:  # stock gets the second wrong
                assert [one["embedding"] for one in several["data"]] == [llm.embed(text) for text in texts]
    assert made[0] == made[1]
    assert "drafter is not loaded" in capsys.readouterr().err
    with closing(Llama(demo.target, **OPTIONS)) as llm, pytest.raises(RuntimeError, match="embedding=True"):
        llm.embed("import os")


def test_from_pretrained_fetches_the_drafter_too(demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub of one repository; the target's own metadata names the drafter's file."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    hub, missing = {f"gguf/{p.name}": p for p in (demo.target, demo.drafter)}, set()

    class Files:
        def ls(self, repo: str, recursive: bool) -> list[str]:
            assert recursive
            return [f"{repo}/{name}" for name in hub]

    def download(repo_id: str, filename: str, subfolder: str | None, cache_dir: Path, **rest: Any) -> str:
        name = f"{subfolder}/{filename}"
        if name in missing:
            raise EntryNotFoundError(name)
        there = cache_dir / "models--me--pair" / "snapshots" / "abc" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(hub[name], there))

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arguments = {"repo_id": "me/pair", "filename": f"*/{demo.target.name}", **OPTIONS}
    for number, (drafter, found) in enumerate((("auto", True), (None, False))):
        with closing(Llama.from_pretrained(cache_dir=tmp_path / str(number), drafter=drafter, **arguments)) as llm:
            assert (llm.drafter is not None) == found
            assert llm(PROMPT, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    missing.add(f"gguf/{demo.drafter.name}")
    with closing(Llama.from_pretrained(cache_dir=tmp_path / "none", **arguments)) as llm:
        assert llm.drafter is None


def test_requests_without_mtp_say_so_once(mtp: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Llama(**mtp.__getstate__())) as llm:
        for _ in range(2):
            llm(PROMPT, max_tokens=4, mirostat_mode=2)
            assert (llm.stats.tokens, llm.stats.drafted) == (4, 0)
    assert capsys.readouterr().err.count("without MTP") == 1
