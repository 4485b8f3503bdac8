"""Where drafts come from: the text so far, the grammar, the drafter under penalties and grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, Stats, native
from gemma_mtp.runtime.draft.lookup import Lookup
from gemma_mtp.runtime.grammar import Mask
from gemma_mtp.runtime.request import MOST, DraftLength
from gemma_mtp.runtime.sampling import NoTokenLeft, Sampler, gumbel, likeliest, lowest_best, with_noise
from llama_cpp._internals import LlamaSampler
from llamas import drafting, see
from prompts import FIELDS, PROMPT

OPTIONS: dict[str, Any] = {"n_ctx": 512, "verbose": False, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1}
SAMPLED: dict[str, Any] = {"temp": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0}


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, draft_length=3, **OPTIONS)) as llm:
        yield llm


def tokens_of(llm: Llama, text: str, length: DraftLength, count: int = 64, seed: int = 5, **settings: Any) -> list[int]:
    """Tokens of a request with a draft length; the object keeps its own."""
    kept, llm.draft_length = llm.draft_length, length
    llm.set_seed(seed)
    made: list[int] = []
    for token in llm.generate(llm.tokenize(text.encode()), **settings):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token) or len(made) == count:
            break
        made.append(token)
    llm.draft_length = kept
    return made


def grammar(text: str) -> Any:
    return llama_cpp.LlamaGrammar.from_string(text, verbose=False)


def unlike_the_drafters_state(mtp: Llama) -> dict[str, dict[str, Any]]:
    def no_x(ids: Any, scores: Any) -> Any:
        scores[100:200] = -np.inf
        scores[[len(ids) % 3000, 7]] += 3.0
        return scores

    return {
        "greedy": {"temp": 0.0, "repeat_penalty": 1.0},
        "sampled": SAMPLED,
        "whole": {"temp": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        "top_p": {"temp": 0.9, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "typical_p": 0.9},
        "penalties": SAMPLED | {"repeat_penalty": 1.3, "frequency_penalty": 0.3, "presence_penalty": 0.2},
        "greedy penalties": {"temp": 0.0, "repeat_penalty": 1.2},
        "processor": SAMPLED | {"logits_processor": llama_cpp.LogitsProcessorList([no_x])},
        "grammar": SAMPLED | {"grammar": llama_cpp.LlamaGrammar.from_json_schema(json.dumps(FIELDS), verbose=False)},
    }


def test_tokens_depend_on_nothing_about_drafts(mtp: Llama) -> None:
    """Every kind of sampling, lengths fixed and chosen, with lookup and without."""
    text = PROMPT + "\nimport os\nimport sys\n\ndef "
    for name, settings in unlike_the_drafters_state(mtp).items():
        wanted = tokens_of(mtp, text, 0, 40, **settings)
        assert mtp.stats.drafted == 0
        for length in (1, 3, 7):
            assert tokens_of(mtp, text, length, 40, **settings) == wanted, (name, length)
            assert mtp.stats.drafted > 0
        with drafting(mtp):
            assert tokens_of(mtp, text, "auto", 40, **settings) == wanted, name
        assert mtp.stats.drafted > 0


def test_lookup_finds_the_longest_agreement() -> None:
    lookup = Lookup()
    assert lookup.find(4) == ([], 0)
    lookup.extend([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 7, 8, 1, 2, 3, 4])
    assert lookup.find(3) == ([5, 9, 2], 4)
    lookup.extend([6])
    assert lookup.find(2) == ([7, 8], 4)
    lookup.extend([77])
    assert lookup.find(2) == ([], 0)
    circle = Lookup()
    circle.extend([1, 2, 3] * 3)
    assert circle.find(7)[0] == [1, 2, 3, 1, 2, 3, 1]


def test_lookup_never_copies_an_image() -> None:
    """Ids below zero stand where it is: nothing equals them, and what is proposed ends before them."""
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, *[-9] * 6, 7, 1, 2, 3])
    assert lookup.find(5) == ([4], 3)
    lookup.extend([4])
    assert lookup.find(5) == ([], 0)
    lookup.extend([5, 1, 2, 3, 4])
    assert lookup.find(3) == ([5, 1, 2], 4)  # of two places the one that text follows
    inside = Lookup()
    inside.extend([1, 2, -9, -9, -9, -9, 3, 4, -9, -9])
    assert inside.find(4) == ([], 0)
    after = Lookup()
    after.extend([1, 2, -7, 8, 8, 8, 1, 2, -7, 8, 8, 8])
    assert after.find(3) == ([1, 2], 3)


LINES = ["import os\n", "import sys\n", "import re\n", "import json\n"]


def look(llm: Llama, seed: int = 0) -> list[int]:
    """Read lines, an image, and all lines but the last again, as a handler for images does; the ids of all that."""
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(llm.tokenize("".join(LINES).encode()))
    see(llm, 20, seed)
    llm.eval(llm.tokenize("".join(LINES[:-1]).encode(), add_bos=False))
    ids: list[int] = llm.input_ids[: llm.n_tokens].tolist()
    assert min(ids) < 0
    return ids


@pytest.fixture
def eager(mtp: Llama) -> Iterator[Llama]:
    """The pair, with costs under which "auto" always drafts."""
    with drafting(mtp):
        yield mtp


def test_drafts_hold_no_image(eager: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the text stood before, one followed. A draft is tokens, and no more than a pass can verify."""
    batches, decode, cut, find = [], eager.decode, [], Lookup.find

    def noted(tokens: Any, draft: Any) -> int:
        batches.append((len(tokens), list(draft)))
        return decode(tokens, draft)

    def watched(self: Lookup, length: int) -> tuple[list[int], int]:
        found = find(self, length)
        cut.append(0 < len(found[0]) < length)
        return found

    monkeypatch.setattr(eager, "decode", noted)
    monkeypatch.setattr(Lookup, "find", watched)
    ids, made = look(eager), {}
    for length in (0, "auto", MOST):
        made[length] = list(islice(eager.generate(ids, temp=0.0, draft_length=length), 60))
        assert eager.stats.prompt_tokens == 1  # the image is still there
    assert any(cut)
    assert made["auto"] == made[MOST] == made[0]
    assert all(min(draft, default=0) >= 0 for _, draft in batches)
    assert max(tokens + len(draft) for tokens, draft in batches if draft) == MOST + 1


def test_an_image_is_padding_to_processors_and_criteria(mtp: Llama) -> None:
    """As many ids as positions, each of which a row of logits has, in our loop and in stock's."""
    seen = []

    def processor(ids: Any, scores: Any) -> Any:
        seen.append(ids.tolist())
        scores[ids] -= 0.5
        return scores

    def criterion(ids: Any, logits: Any) -> bool:
        seen.append(ids.tolist())
        return False

    text = [max(token, 0) for token in look(mtp)]
    for settings in ({"temp": 0.0}, {"temp": 1.0}, {"temp": 1.0, "mirostat_mode": 2}):
        ids = look(mtp)
        hooks = {
            "logits_processor": llama_cpp.LogitsProcessorList([processor]),
            "stopping_criteria": llama_cpp.StoppingCriteriaList([criterion]),
        }
        list(islice(mtp.generate(ids, **settings, **hooks), 6))
        mtp.create_completion(ids, max_tokens=6, temperature=settings["temp"], **hooks)
    assert len(seen) > 60
    assert all(each[: len(text)] == text and min(each) >= 0 for each in seen)


def test_an_image_that_is_gone_is_an_error(mtp: Llama) -> None:
    """Its ids are not enough to see it again; and it has no text of which log-probabilities could be told."""
    ids = look(mtp)
    assert mtp.input_ids[len(ids)] == min(ids)
    other = look(mtp, 1)
    assert min(other) != min(ids)  # another image never passes for it
    with pytest.raises(ValueError, match="ask through the chat handler again"):
        next(mtp.generate(ids))
    with pytest.raises(ValueError, match="needs a prompt of text"):
        mtp.create_completion(other, logprobs=1, echo=True)
    assert mtp.create_completion(other, max_tokens=2, logprobs=1)["choices"][0]["logprobs"]["tokens"]
    assert mtp.stats.prompt_tokens == 1


def test_lookup_helps_where_the_text_repeats_itself(mtp: Llama) -> None:
    """Tokens per target pass, greedy, on a prompt of repeated lines, with lookup and with the drafter alone."""
    lines = "".join(f"    parser.add_argument('--option{i}', help='set option {i}', default=None)\n" for i in range(6))
    text, settings = f"def options(parser):\n{lines}{lines}", dict[str, Any](temp=0.0, repeat_penalty=1.0)
    with drafting(mtp):
        made = tokens_of(mtp, text, "auto", 128, **settings)
    with_lookup = mtp.stats
    assert tokens_of(mtp, text, 3, 128, **settings) == made
    print(json.dumps({"lookup": with_lookup.tokens_per_target_pass, "drafter": mtp.stats.tokens_per_target_pass}))
    assert with_lookup.accepted_from.get("lookup", 0) > 0
    assert with_lookup.tokens_per_target_pass > mtp.stats.tokens_per_target_pass


def test_grammars_mask_drafts(mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance of JSON with the mask on the drafter at least 1.5 times that without; the same tokens."""
    plain_fork, found = Sampler.fork, {}

    def unmasked(self: Sampler) -> Sampler:
        other = plain_fork(self)
        other.mask = None
        return other

    for temp in (0.0, 1.0):
        rules = llama_cpp.LlamaGrammar.from_json_schema(json.dumps(FIELDS), verbose=False)
        for name, fork in (("masked", plain_fork), ("unmasked", unmasked)):
            monkeypatch.setattr(Sampler, "fork", fork)
            total, made = Stats(), []
            for seed in range(4):
                settings = SAMPLED | {"temp": temp, "grammar": rules}
                made.append(tokens_of(mtp, "Describe this module as JSON.\n", 3, 96, seed, **settings))
                total.add(mtp.stats)
            found[name] = total.acceptance, made
        print(json.dumps({"temperature": temp} | {name: round(each[0], 3) for name, each in found.items()}))
        assert found["masked"][1] == found["unmasked"][1]
        assert found["masked"][0] > 1.5 * found["unmasked"][0]
        assert json.loads(mtp.detokenize(found["masked"][1][0]))


def test_forced_tokens_cost_no_drafter_pass(mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits are tokens of their own, so a number that the grammar spells out is forced."""
    calls: list[int] = []
    run = mtp.drafter.draft  # type: ignore[union-attr]

    def counted(token: int, hidden: Any, position: int, length: int, choose: Any) -> Any:
        calls.append(length)
        return run(token, hidden, position, length, choose)

    monkeypatch.setattr(mtp.drafter, "draft", counted)
    made = tokens_of(mtp, PROMPT, 4, temp=0.0, grammar=grammar('root ::= "7391" "2846" "5"'))
    assert mtp.detokenize(made) == b"739128465"
    assert mtp.stats.accepted_from["grammar"] == mtp.stats.drafted_from["grammar"] > 4
    assert sum(calls) <= 4


def test_the_drafter_reads_forced_tokens(mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round begins at the last token of the text and its hidden row; it returns what is forced before its own."""
    rounds: list[tuple[int, int, list[int]]] = []
    run = mtp.drafter.draft  # type: ignore[union-attr]

    def noted(token: int, hidden: Any, position: int, length: int, choose: Any) -> Any:
        drafted = run(token, hidden, position, length, choose)
        rounds.append((token, position, drafted))
        return drafted

    monkeypatch.setattr(mtp.drafter, "draft", noted)
    made = tokens_of(mtp, PROMPT, 6, 60, temp=0.0, grammar=grammar('root ::= ("12" [a-z] "34" [a-z] [a-z])+'))
    text = mtp.tokenize(PROMPT.encode()) + made
    assert mtp.stats.drafted_from["grammar"] > 10
    assert all(text[position] == token for token, position, _ in rounds if position < len(text))
    one = mtp.tokenize(b"1", add_bos=False)[-1]
    assert any(one in drafted for _, _, drafted in rounds)


def test_the_mask_agrees_with_asking_about_every_token(mtp: Llama) -> None:
    everything = np.arange(mtp.n_vocab(), dtype=np.int32)
    for rules, text in (
        ('root ::= ("ab" | "cd" | "é☃" [à-ü]+ | "e")+ "\\n"', "abcdé☃äüe\n"),
        ('root ::= "{" ws "\\"x\\":" ws [0-9]+ "}"\nws ::= [ \\n]*', '{ "x": 12}'),
    ):
        mask = Mask.of(grammar(rules), mtp._model.model, mtp.n_vocab())
        for token in mtp.tokenize(text.encode(), add_bos=False):
            legal = mask.legal()
            assert (legal == mask.allows(everything)).all()
            assert legal[token]
            assert mask.forced() is None or legal[mask.forced()]
            other = mask.fork()
            other.accept(int(legal.argmax()))
            assert (mask.legal() == legal).all()
            mask.accept(token)


def test_a_dead_end_is_an_error_not_an_abort(mtp: Llama) -> None:
    def banned(ids: Any, scores: Any) -> Any:
        scores[:] = -np.inf
        return scores

    processors = llama_cpp.LogitsProcessorList([banned])
    for more in ({}, {"grammar": grammar('root ::= "a"')}):
        for temp in (0.0, 1.0):
            with pytest.raises(NoTokenLeft, match="leave no token"):
                tokens_of(mtp, PROMPT, 3, temp=temp, logits_processor=processors, **more)
    assert tokens_of(mtp, PROMPT, 3, 8, temp=0.0)


def test_short_cuts_change_nothing() -> None:
    """Largest values by blocks, and libllama's noise only where it matters, against looking at everything."""
    chooser = np.random.default_rng(0)
    for size in (3, 100, 3072, 30_000):
        values = np.round(chooser.standard_normal(size) * 3, 1).astype(np.float32)
        ids = np.arange(size, dtype=np.int32)
        for count in (1, 2, 64, size):
            found = likeliest(values, count)
            bound = np.sort(values)[-min(count, size)]
            assert set(np.flatnonzero(values >= bound)) <= set(found.tolist())
        drawn = Sampler(with_noise(LlamaSampler(), 3), size, 3)
        looked = Sampler(LlamaSampler(), size, 3)
        for position in range(20):
            wanted = lowest_best(ids, values.astype(np.float64) + gumbel(3, position, ids))
            assert drawn(values, position) == looked(values, position) == wanted


def test_without_our_library_all_is_the_same(mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, masks and what a grammar forces are made here where libllama has no functions for them."""
    rules = grammar('root ::= "a" [b-z]+ ("34" [a-z])+')

    def made() -> list[list[int]]:
        return [tokens_of(mtp, PROMPT, 3, 24, 7, **SAMPLED, **more) for more in ({}, {"grammar": rules})]

    ours = made()
    monkeypatch.setattr(native, "_mtp", lambda *_: None)
    assert made() == ours


@pytest.mark.parametrize("n_ctx", [256])
def test_a_nearly_full_context_and_ends_inside_drafts(n_ctx: int, demo: Pair) -> None:
    with closing(Llama(demo.target, **(OPTIONS | {"n_ctx": n_ctx}))) as llm:
        ids = llm.tokenize(PROMPT.encode())
        for length in (0, 5, "auto"):
            llm.draft_length = length
            made = []
            with pytest.raises(RuntimeError, match="context of 256 tokens is full"):
                made.extend(llm.generate(ids, temp=0.0, repeat_penalty=1.0))
            made = [
                token
                for token, _ in zip(
                    llm.generate(ids, temp=0.0, repeat_penalty=1.0), range(256 - len(ids)), strict=False
                )
            ]
            assert len(made) == 256 - len(ids)
            if length == 0:
                wanted = made
            assert made == wanted
