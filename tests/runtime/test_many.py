"""Many prompts at once: each answer is that of its prompt alone, whatever the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.draft.costs import STEP, Costs
from gemma_mtp.runtime.many.job import Working
from gemma_mtp.runtime.many.slots import Slots
from llama_cpp import LlamaGrammar, _internals
from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry, register_chat_completion_handler
from llamas import OPTIONS
from prompts import PROMPT, held_out

GREEDY: dict[str, Any] = {"temperature": 0.0, "seed": 3}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "seed": 11}
SHORT: dict[str, Any] = {"max_tokens": 8, **GREEDY}
ANY = LlamaGrammar.from_string("root ::= [^~]*", verbose=False)
MESSAGES = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def llm(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **(OPTIONS | {"draft_length": "auto"}))) as made:
        yield made


def passes_cost(monkeypatch: pytest.MonkeyPatch, row: float) -> None:
    """A pass costs this much more with every row; nothing else is learned."""

    def load(path: Path, most: int) -> Costs:
        del path
        costs = Costs(most)
        for _ in range(20):
            for n in range(1, most + 1):
                costs.observe(n, 1.0 + row * n)
            costs.observe(STEP, 0.001)
        monkeypatch.setattr(costs, "observe", lambda place, seconds: None)
        return costs

    monkeypatch.setattr(Costs, "load", load)


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes cost so little more with more rows that drafting always pays."""
    passes_cost(monkeypatch, 0.001)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, tuple[int, int]]]:
    """What is decoded: for each sequence of a batch where it begins and how many tokens."""
    found: list[dict[int, tuple[int, int]]] = []
    real = Slots.decode

    def decode(self: Slots, tokens: Mapping[int, tuple[int, Sequence[int]]], every: bool = True) -> None:
        found.append({number: (past, len(ids)) for number, (past, ids) in tokens.items()})
        real(self, tokens, every)

    monkeypatch.setattr(Slots, "decode", decode)
    return found


def said(answer: Any) -> Any:
    """What an answer says, without its name and the clock's."""
    assert not isinstance(answer, Exception), answer
    return answer["choices"], answer["usage"], answer["seed"]


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def twelve(llm: Llama, request: pytest.FixtureRequest) -> tuple[list[dict[str, Any]], list[Any]]:
    """Prompts, and what is said to each alone, without drafts."""
    prompts = [{"prompt": text, "max_tokens": 6 + 3 * i, **request.param} for i, text in enumerate(held_out(12))]
    return prompts, [said(llm.create_completion(**each, mtp=False)) for each in prompts]


@pytest.mark.parametrize(("count", "length"), [(1, "auto"), (3, 0), (3, 3), (4, 0), (4, "auto")])
def test_texts_are_those_alone(llm: Llama, twelve: Any, count: int, length: Any, paying: None) -> None:
    """Without drafts, with a number of them, and as far as it pays, which is always here."""
    prompts, alone = twelve
    together = list(llm.create_completions(prompts, n_parallel=count, draft_length=length))
    assert [said(answer) for answer in together] == alone
    assert (llm.stats.accepted > 0) == (length != 0)


def test_each_has_its_own_arguments(llm: Llama) -> None:
    """Sampling, seeds, stops, grammars, penalties, biases, log-probabilities, drafts."""
    grammar = LlamaGrammar.from_string('root ::= "a" [b-d]+ "e"', verbose=False)
    asked: list[dict[str, Any]] = [
        {"prompt": PROMPT, "max_tokens": 30, **GREEDY},
        {"prompt": PROMPT, "max_tokens": 30, **SAMPLED, "stop": ["\n", "):"]},
        {"prompt": PROMPT, "max_tokens": 20, **SAMPLED, "seed": 5, "grammar": grammar},
        {"prompt": PROMPT, "max_tokens": 20, **SAMPLED, "repeat_penalty": 1.3, "presence_penalty": 0.5},
        {"prompt": PROMPT, "max_tokens": 20, **GREEDY, "logit_bias": {300: 4.0}, "min_tokens": 10},
        {"prompt": PROMPT, "max_tokens": 20, **GREEDY, "logprobs": 3},
        {"prompt": PROMPT, "max_tokens": 10, **SAMPLED, "logprobs": 2, "echo": True},
        {"prompt": llm.tokenize(PROMPT.encode()), "max_tokens": 0, "seed": 1},
        {"prompt": "", "max_tokens": 9, **SAMPLED},
        {"prompt": PROMPT, "max_tokens": 30, **SAMPLED, "draft_length": 2},
        {"prompt": PROMPT, "max_tokens": 30, **SAMPLED, "mtp": False},
        {"prompt": "def f(", "suffix": "return 1", "max_tokens": 9, **SAMPLED},
    ]
    alone = [said(llm.create_completion(**each)) for each in asked]
    assert [said(answer) for answer in llm.create_completions(asked, n_parallel=4)] == alone


def test_processors_and_criteria_see_their_own_tokens(llm: Llama) -> None:
    def asked(seen: list[list[int]]) -> dict[str, Any]:
        def processor(ids: Any, scores: Any) -> Any:
            seen.append(ids.tolist())
            return scores

        def criterion(ids: Any, logits: Any) -> bool:
            del logits
            return len(ids) >= 30

        return {"logits_processor": processor, "stopping_criteria": criterion, **GREEDY, "max_tokens": 40}

    prompts, alone, together = held_out(3), [[] for _ in range(3)], [[] for _ in range(3)]  # type: list[str], Any, Any
    before = [said(llm.create_completion(text[:40], **asked(alone[i]))) for i, text in enumerate(prompts)]
    items = [{"prompt": text[:40], **asked(together[i])} for i, text in enumerate(prompts)]
    assert [said(answer) for answer in llm.create_completions(items)] == before
    assert together == alone


def test_seeds_of_the_object_go_on(demo: Pair) -> None:
    """As they do from one completion to the next."""
    with closing(Llama(demo.target, seed=4, **OPTIONS)) as llm:
        alone = [said(llm.create_completion(PROMPT, max_tokens=9)) for _ in range(3)]
    with closing(Llama(demo.target, seed=4, **OPTIONS)) as llm:
        assert [said(answer) for answer in llm.create_completions([PROMPT] * 3, max_tokens=9)] == alone


def test_chats(llm: Llama) -> None:
    """Formats and answers of the chat handler; each with its own arguments."""
    asked: list[dict[str, Any]] = [
        {"messages": MESSAGES, **GREEDY, "max_tokens": 20},
        {"messages": [{"role": "user", "content": "naïve 東京"}], **SAMPLED, "max_tokens": 20},
        {"messages": MESSAGES, **SAMPLED, "max_tokens": 30, "response_format": {"type": "json_object"}},
        {"messages": MESSAGES, **GREEDY, "max_tokens": 8, "logprobs": True, "top_logprobs": 2},
        {"messages": MESSAGES, **GREEDY, "max_tokens": 8, "chat_template_kwargs": {"enable_thinking": True}},
    ]
    alone = [said(llm.create_chat_completion(**each)) for each in asked]
    assert [said(answer) for answer in llm.create_chat_completions(asked, n_parallel=3)] == alone
    [first, second] = llm.create_chat_completions([MESSAGES, MESSAGES], **GREEDY, max_tokens=20)
    assert said(first) == said(second)
    assert said(first)[0] == alone[0][0]
    assert {"seed", "timings"} <= first.keys()


def test_a_chat_format_whose_handler_asks_twice(demo: Pair) -> None:
    """Each time it gets what it would get alone."""

    def handler(*, llama: Any, messages: Any, **others: Any) -> Any:
        del others
        first = llama.create_completion(messages[0]["content"], **SHORT)
        return llama.create_completion(prompt=first["choices"][0]["text"] + "(", **SHORT)

    chats = [[{"role": "user", "content": text}] for text in held_out(5)]
    register_chat_completion_handler("twice")(handler)
    try:
        with closing(Llama(demo.target, chat_format="twice", **OPTIONS)) as llm:
            alone = [said(llm.create_chat_completion(each))[:2] for each in chats]
            assert [said(answer)[:2] for answer in llm.create_chat_completions(chats, n_parallel=2)] == alone
    finally:
        LlamaChatCompletionHandlerRegistry().unregister_chat_handler("twice")


def test_prompts_are_taken_when_there_is_room(llm: Llama) -> None:
    taken: list[int] = []

    def prompts() -> Iterator[str]:
        for i in range(1000):
            taken.append(i)
            yield PROMPT + str(i)

    with closing(llm.create_completions(prompts(), n_parallel=3, **SHORT)) as answers:
        assert not taken
        for read in range(1, 6):
            assert said(next(answers))
            assert len(taken) <= read + 3


def test_one_that_fails_is_told_in_its_place(llm: Llama) -> None:
    def broken(ids: Any, scores: Any) -> Any:
        if len(ids) > 14:
            raise KeyError("mine")
        return scores

    long, bad = "import os\n" * 400, LlamaGrammar.from_string("root ::= nothing", verbose=False)
    items: list[Any] = [
        PROMPT, long, {"prompt": PROMPT, "grammar": bad}, 7, {"prompt": PROMPT, "temperature": "hot"},
        {"prompt": PROMPT, "logits_processor": broken}, OSError("unreadable"), {"prompt": PROMPT, "colour": 1},
        {"prompt": PROMPT, "mirostat_mode": 2, "temperature": 1.0}, {"prompt": PROMPT, "stream": True},
        {"text": PROMPT}, [10**9],
        PROMPT,
    ]  # fmt: skip
    answers = list(llm.create_completions(items, n_parallel=3, **SHORT))
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["dict", *["ValueError"] * 4, "KeyError", "OSError", "TypeError", *["ValueError"] * 2,
                     "TypeError", "ValueError", "dict"]  # fmt: skip
    assert said(answers[0])[0] == said(answers[-1])[0] == said(llm.create_completion(PROMPT, **SHORT))[0]
    assert "raise n_ctx" in str(answers[1])
    with pytest.raises(ValueError, match="hot"):
        raise answers[4]
    [refused] = llm.create_chat_completions([[{"role": "user", "content": [{"type": "image_url"}]}]])
    assert "has no image_url" in str(refused)


def test_as_they_get_ready(llm: Llama) -> None:
    """A short one does not wait for a long one before it; in order it does."""
    items = [{"prompt": PROMPT, "max_tokens": most, **GREEDY} for most in (60, 3, 3, 3)]
    pairs = list(llm.create_completions(items, n_parallel=2, as_completed=True))
    assert [number for number, _ in pairs] == [1, 2, 3, 0]
    in_order = list(llm.create_completions(items, n_parallel=2))
    assert [said(answer)[0] for _, answer in sorted(pairs)] == [said(answer)[0] for answer in in_order]


def test_what_prompts_begin_with_is_decoded_once(llm: Llama, passes: list[Any]) -> None:
    """Also where the sequence that has it is at work, and where the text that follows it differs."""
    begins = llm.tokenize(held_out(1)[0].encode())
    assert len(begins) > 60
    items = [[*begins, *llm.tokenize(f" {i} and more".encode(), add_bos=False)] for i in range(9)]
    alone = [said(llm.create_completion(each, **SHORT))[0] for each in items]
    passes.clear()
    answers = list(llm.create_completions(items, n_parallel=3, draft_length=0, **SHORT))
    assert [said(answer)[0] for answer in answers] == alone
    read = [count for each in passes for past, count in each.values() if count > 1]
    assert read[0] == len(items[0])
    assert sum(read) < len(begins) + sum(len(each) - len(begins) + 1 for each in items)
    assert [answer["timings"]["cache_n"] for answer in answers[1:]] >= [len(begins)] * 8
    assert llm.stats.prompt_tokens == sum(read)


def test_a_pass_is_one_over_all_of_them(llm: Llama, passes: list[Any]) -> None:
    """As many rows of each, and of sequences side by side, also when there are fewer prompts than sequences."""
    items = [
        {"prompt": text[:60], "max_tokens": most}
        for text, most in zip(held_out(6), (5, 20, 3, 15, 10, 25), strict=True)
    ]
    list(llm.create_completions(items, n_parallel=4, draft_length=0, **GREEDY))
    together = [each for each in passes if len(each) > 1]
    assert {len(each) for each in together} == {2, 3, 4}
    for each in together:
        assert len({count for _, count in each.values()}) == 1
        assert sorted(each) == list(range(min(each), max(each) + 1))


@pytest.mark.parametrize(("wish", "each"), [({}, False), ({"draft_length": 2}, True), ({"grammar": ANY}, True)])
def test_nobody_is_asked_for_drafts_in_most_rounds_where_none_pays(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, passes: list[Any], wish: dict[str, Any], each: bool
) -> None:
    """Asking takes longer than a pass of a small model; but a length that is wanted, and what a grammar forces, are."""
    passes_cost(monkeypatch, 100.0)
    asked = [0]
    real = Working.offered

    def offered(self: Working, most: int) -> Any:
        asked[0] += 1
        return real(self, most)

    monkeypatch.setattr(Working, "offered", offered)
    items = [{"prompt": text, "max_tokens": 24, **wish} for text in held_out(3)]
    list(llm.create_completions(items, n_parallel=3, **GREEDY))
    rounds = sum(len(found) for found in passes if max(count for _, count in found.values()) < 24)
    assert asked[0] > rounds - len(items) if each else 0 < asked[0] < rounds / 2


def test_at_the_end_of_the_context(llm: Llama) -> None:
    """One that is nearly full drafts less, and the others with it; no token is lost."""
    text = (held_out(1)[0] + "\n") * 20
    tokens = llm.tokenize(text.encode())[: llm.n_ctx() - 9]
    items = [{"prompt": tokens}, {"prompt": PROMPT, "max_tokens": 30}, {"prompt": tokens[:-4], "max_tokens": 30}]
    alone = [said(llm.create_completion(**each, **GREEDY)) for each in items]
    for length in (0, 3, 15):
        together = [said(each) for each in llm.create_completions(items, draft_length=length, **GREEDY)]
        assert [each[:2] for each in together] == [each[:2] for each in alone]


def test_a_sliding_window_that_forgets(demo: Pair) -> None:
    """With swa_full=False only what is all there is reused."""
    options = OPTIONS | {"n_ctx": 1024, "swa_full": False, "n_batch": 64, "n_ubatch": 64}
    begins = (held_out(1)[0] + "\n") * 9
    with closing(Llama(demo.target, **options)) as llm:
        window = 9 + len(llm.tokenize(begins.encode()))
        assert window > 500
        items = [begins + end for end in ("import", "class", "def", "x = ")]
        items += [begins[: 100 * i] for i in range(1, 5)]
        settings = {"max_tokens": 30, **SAMPLED}
        alone = [said(llm.create_completion(each, **settings))[0] for each in items]
        assert [said(each)[0] for each in llm.create_completions(items, n_parallel=3, **settings)] == alone


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_parallel": 0}, ValueError, "n_parallel is 0"),
    ({"n_parallel": 1000}, ValueError, "n_parallel is 1000"),
    ({"as_completed": 2}, ValueError, "as_completed"),
    ({"temperature": "hot"}, ValueError, "temperature"),
    ({"stream": True}, ValueError, "stream"),
    ({"mirostat_mode": 1}, ValueError, "mirostat"),
    ({"draft_length": 99}, ValueError, "draft_length is 99"),
    ({"logit_bias": {10**9: 1.0}}, ValueError, "logit_bias"),
    ({"grammar": LlamaGrammar.from_string("root ::= nothing", verbose=False)}, ValueError, "grammar"),
    ({"colour": 1}, TypeError, "colour"),
]


@pytest.mark.parametrize(("options", "kind", "words"), WRONG, ids=lambda value: str(value)[:20])
def test_what_is_wrong_for_all_is_told_at_once(llm: Llama, options: Any, kind: type[Exception], words: str) -> None:
    """Before anything is read."""
    with pytest.raises(kind, match=words):
        llm.create_completions([PROMPT], **options)
    with pytest.raises(kind, match=words):
        llm.create_chat_completions([MESSAGES], **options)


@pytest.mark.parametrize("prompts", [PROMPT, {"prompt": PROMPT}, 3, None])
def test_what_is_no_list_of_prompts(llm: Llama, prompts: Any) -> None:
    with pytest.raises(ValueError, match="give a list of them, or an iterator"):
        llm.create_completions(prompts)


def test_none_at_all(llm: Llama) -> None:
    assert list(llm.create_completions([])) == []
    assert list(llm.create_chat_completions(iter([]), as_completed=True)) == []


def test_the_object_is_free_afterwards(llm: Llama) -> None:
    """After the last answer, one that is not waited for, an iterator that raises; nested calls are its own matter."""
    alone = said(llm.create_completion(PROMPT, **SHORT))[0]
    answers = llm.create_completions([PROMPT] * 4, n_parallel=2, **SHORT)
    assert said(next(answers))[0] == alone
    assert said(llm.create_completion(PROMPT, **SHORT))[0] == alone
    with pytest.raises(RuntimeError, match="ended when a later call used the same Llama"):
        next(answers)

    def prompts() -> Iterator[str]:
        yield PROMPT
        assert said(llm.create_completion(PROMPT, **SHORT))[0] == alone
        yield PROMPT
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        list(llm.create_completions(prompts(), n_parallel=2, **SHORT))
    assert [said(each)[0] for each in llm.create_completions([PROMPT], **SHORT)] == [alone]


def test_closing_ends_them(demo: Pair) -> None:
    llm = Llama(demo.target, **OPTIONS)
    answers = llm.create_completions([PROMPT] * 4, n_parallel=2, **SHORT)
    next(answers)
    llm.close()
    with pytest.raises(RuntimeError):
        next(answers)


def test_what_they_cost_together(llm: Llama) -> None:
    """`stats` adds the requests up; what is the clock's, and passes that they share, are counted once."""
    answers = list(llm.create_completions([PROMPT] * 4, n_parallel=4, draft_length=0, max_tokens=11, **GREEDY))
    stats = llm.stats
    assert stats.tokens == 44
    assert stats.target_passes == 10
    assert 0 < stats.time_to_first_token < stats.seconds
    assert max(each["timings"]["predicted_ms"] for each in answers) <= stats.seconds * 1e3
    assert stats.pass_seconds < stats.seconds


def test_without_a_drafter(demo: Pair, llm: Llama) -> None:
    alone = said(llm.create_completion(PROMPT, **SHORT))[0]
    with closing(Llama(demo.target, **(OPTIONS | {"drafter": None}))) as plain:
        assert [said(each)[0] for each in plain.create_completions([PROMPT] * 2, **SHORT)] == [alone] * 2
        with pytest.raises(ValueError, match="MTP was asked for"):
            plain.create_completions([PROMPT], mtp=True)


def test_no_memory_for_so_many(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error with the next step, and the object is free."""

    def none(**options: Any) -> Any:
        raise ValueError("Failed to create llama_context")

    with monkeypatch.context() as patch:
        patch.setattr(_internals, "LlamaContext", none)
        with pytest.raises(RuntimeError, match="lower n_parallel"):
            list(llm.create_completions([PROMPT], **SHORT))
    assert said(llm.create_completion(PROMPT, **SHORT))


def test_ctrl_c(llm: Llama) -> None:
    """In the middle of a round: nothing is swallowed, and the object works afterwards."""

    def stopping(ids: Any, scores: Any) -> Any:
        if len(ids) > 14:
            raise KeyboardInterrupt
        return scores

    call: Callable[..., Any] = llm.create_completions
    with pytest.raises(KeyboardInterrupt):
        list(call([PROMPT, {"prompt": PROMPT, "logits_processor": stopping}], **SHORT))
    assert len(list(call([PROMPT] * 3, **SHORT))) == 3
