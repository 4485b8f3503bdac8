"""Arguments of `Llama` and of its requests: what may be is taken; all else is refused by name, before it does harm."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.arguments import CHAT, GENERATE, OPTIONS, OURS, REQUEST
from gemma_mtp.runtime.checks import checked
from gemma_mtp.runtime.faults import check_options
from llamas import OPTIONS as LOADING
from prompts import PROMPT

NAN, INF = float("nan"), float("inf")
NUMBERS: list[Any] = [NAN, INF, -INF, "x", True, [], 1j]
COUNTS: list[Any] = [-1, 2.5, True, "x", 2**40, NAN]
GRAMMAR = llama_cpp.LlamaGrammar.from_string('root ::= "a"', verbose=False)


def function(*_: Any) -> Any:
    """Stands for any."""


FLAGS: tuple[list[Any], list[Any]] = ([True, False, 0, 1, np.True_], ["x", 2, None, []])
SHARES: tuple[list[Any], list[Any]] = ([0, 1, 0.95, np.float32(0.5), Fraction(1, 2)], [*NUMBERS, -0.1, 1.5, None])
ANY: tuple[list[Any], list[Any]] = ([-2.0, 0, 0.5, 2], [*NUMBERS, None])
# For each argument what it may be, and what not.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["", "x", [2, 5], (2, 5), np.array([2, 5])], [None, 5, b"x", ["a"], [2.5], [True], {2: 5}]),
    "suffix": ([None, "x"], [5, b"x"]),
    "max_tokens": ([None, -1, 0, 16, np.int64(3)], [2.5, True, "x", 2**40]),
    "min_tokens": ([None, 0, 5], COUNTS),
    "temperature": ANY,
    "top_p": SHARES,
    "min_p": SHARES,
    "typical_p": SHARES,
    "logprobs": ([None, 0, 5], COUNTS),
    "echo": FLAGS,
    "stop": ([None, [], "x", ["x", ""], ("x",)], [5, [5], b"x", [None], {"x": 1}]),
    "frequency_penalty": ANY,
    "presence_penalty": ANY,
    "repeat_penalty": ([0.5, 1, 1.1], [*NUMBERS, 0, -1]),
    "top_k": ([-1, 0, 64], [2.5, True, "x", 2**40, None]),
    "stream": FLAGS,
    "seed": ([None, -1, 0, 2**70], ["x", 2.5, []]),
    "tfs_z": ANY,
    "mirostat_mode": ([0, 1, 2], [3, -1, 1.0, "x", True]),
    "mirostat_tau": ([0, 5.0], [*NUMBERS, -1]),
    "mirostat_eta": ([0, 0.1], [*NUMBERS, -1]),
    "model": ([None, "x"], [5]),
    "stopping_criteria": ([None, function, [function], llama_cpp.StoppingCriteriaList([function])], [5, [5], "x"]),
    "logits_processor": ([None, function, [function], llama_cpp.LogitsProcessorList([function])], [5, [5], "x"]),
    "grammar": ([None, GRAMMAR], ["root ::= x", 5]),
    "logit_bias": ([None, {}, {5: 1.0}, {"5": 2}, {5: -INF}], [{5: NAN}, {5: INF}, {"x": 1}, [5], 5]),
    "n_gpu_layers": ([-1, 0, 99], [-2, 2.5, "x", 2**40, True]),
    "split_mode": ([0, 1, 2, 3], [4, -1, "x"]),
    "main_gpu": ([0, 1], [*COUNTS, None]),
    "tensor_split": ([None, [0.5, 0.5], (1,)], [5, ["x"], [NAN], [-1], "x"]),
    "kv_overrides": ([None, {}, {"a": 1, "b": True, "c": 0.5, "d": "x"}], [5, {5: 1}, {"a": None}, {"a" * 128: 1}]),
    "n_ctx": ([0, 512, 2**31 - 1], [-1, 2**31, 2**32 + 512, 2.5, "x", True, None]),
    "n_batch": ([1, 512], [0, *COUNTS]),
    "n_ubatch": ([0, 512], COUNTS),
    "n_threads": ([None, 0, 8, 512], [*COUNTS, 513, 100000]),
    "n_threads_batch": ([None, 0, 8, 512], [*COUNTS, 513, 100000]),
    "rope_scaling_type": ([None, -1, 3], [4, -2, "x"]),
    "pooling_type": ([-1, 4], [5, -2, "x"]),
    "attention_type": ([-1, 1], [2, -2, "x"]),
    "rope_freq_base": ANY,
    "rope_freq_scale": ANY,
    "yarn_ext_factor": ANY,
    "yarn_attn_factor": ANY,
    "yarn_beta_fast": ANY,
    "yarn_beta_slow": ANY,
    "yarn_orig_ctx": ([0, 4096], COUNTS),
    "logits_all": FLAGS,
    "embedding": FLAGS,
    "offload_kqv": FLAGS,
    "flash_attn": FLAGS,
    "op_offload": ([None, True], ["x", 2]),
    "swa_full": ([None, False], ["x", 2]),
    "no_perf": FLAGS,
    "last_n_tokens_size": ([0, 64], COUNTS),
    "lora_base": ([None, "x"], [5]),
    "lora_scale": ANY,
    "lora_path": ([None, "", __file__], ["/there/is/none", "/", 5]),
    "numa": ([True, False, 0, 4], [5, -1, "x"]),
    "chat_format": ([None, "gemma"], [5]),
    "chat_handler": ([None, function], [5]),
    "draft_model": ([None, function], [5]),
    "tokenizer": ([None], [5, "x"]),
    "spm_infill": FLAGS,
    "verbose": FLAGS,
    "vocab_only": FLAGS,
    "use_mmap": FLAGS,
    "use_mlock": FLAGS,
    "model_path": (["x", Path("x")], [None, 5, b"x"]),
    "drafter": ([None, "auto", Path("x")], [5, True]),
    "mmproj": ([None, "auto", Path("x")], [5, True]),
    "rpc_servers": ([None, "a:1"], [5, ["a:1"]]),
    "top_logprobs": ([None, 0, 5], COUNTS),
    "chat_template_kwargs": ([None, {}, {"enable_thinking": True}], [5, {5: 1}]),
    "tools": ([None, [], [{"type": "function"}]], [5, ["look"]]),
    "functions": ([None, [], [{"name": "look"}]], [5, ["look"]]),
    "tool_choice": ([None, "auto", {"type": "function"}], [5, ["look"]]),
    "function_call": ([None, "auto", {"name": "look"}], [5, ["look"]]),
    "response_format": ([None, {"type": "json_object"}], ["json_object", {}, {"type": 5}]),
    "parallel_tool_calls": ([None, *FLAGS[0]], ["x", 2, []]),
    "reasoning_effort": ([None, "none", "high"], [5, b"high"]),
}
TABLES = OPTIONS | OURS | CHAT | REQUEST
GOOD = [(name, value) for name, (values, _) in VALUES.items() if name in TABLES for value in values]
BAD = [(name, value) for name, (_, values) in VALUES.items() if name in TABLES for value in values]


@pytest.mark.parametrize(("name", "value"), GOOD, ids=[f"{name}-{value!r:.40}" for name, value in GOOD])
def test_what_an_argument_may_be(name: str, value: Any) -> None:
    checked(TABLES, {name: value})


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{value!r:.40}" for name, value in BAD])
def test_what_an_argument_may_not_be(name: str, value: Any) -> None:
    """One line that names it, shows it, and says what to give."""
    with pytest.raises(ValueError, match=rf"^{name} is .+; give .+\.$") as found:
        checked(TABLES, {name: value})
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 260


def test_every_argument_is_checked() -> None:
    """All that stock takes, and that ours takes beside it, but for those that are checked elsewhere."""
    elsewhere = {"self", "kwargs", "type_k", "type_v", "tokens", "messages", "functions", "function_call", "tools",
                 "tool_choice", "response_format", "mtp", "draft_length", "options"}  # fmt: skip
    for call, table in (
        (llama_cpp.Llama.__init__, OPTIONS | OURS),
        (Llama.__init__, OPTIONS | OURS),
        (llama_cpp.Llama.create_completion, REQUEST),
        (llama_cpp.Llama.create_chat_completion, CHAT),
        (llama_cpp.Llama.generate, GENERATE),
    ):
        assert set(inspect.signature(call).parameters) - set(table) <= elsewhere
    assert {*OPTIONS, *OURS, *REQUEST, *CHAT} <= set(VALUES)
    for table in (REQUEST, OPTIONS):
        defaults = {**inspect.signature(llama_cpp.Llama.create_completion).parameters,
                    **inspect.signature(llama_cpp.Llama.__init__).parameters}  # fmt: skip
        given = {name: defaults[name].default for name in table if name in defaults and name not in ("prompt",)}
        checked(table, given)  # what stock's own defaults are


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **LOADING)) as llm:
        yield llm


@pytest.mark.parametrize(("name", "value"), [("temperature", NAN), ("stop", 5), ("logprobs", -1), ("min_tokens", -1)])
@pytest.mark.parametrize("stream", [False, True])
def test_requests_are_refused_at_the_door(name: str, value: Any, stream: bool, mtp: Llama) -> None:
    """Before a stream is read, and in all of the calls."""
    before = mtp.stats
    chat = [{"role": "user", "content": "x"}]
    for call in (mtp, mtp.create_completion):
        with pytest.raises(ValueError, match=name):
            call(PROMPT, stream=stream, **{name: value})
    with pytest.raises(ValueError, match=name):
        mtp.create_chat_completion(chat, stream=stream, **{name: value})
    assert mtp.stats is before


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hi", "give a list of messages"),
        ([], "give a list of messages"),
        (None, "give a list of messages"),
        (["x"], r'messages\[0\] is .x.; give a dict with a "role"'),
        ([{"content": "x"}], "role"),
        ([{"role": "user", "content": 5}], r"content 5; give a text"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": ["x"]}], r"messages\[1\] has the part 'x'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\] part 0 has no image_url; give"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], r"'video_url'.+leave the part out"),
    ],
)
def test_messages(value: Any, said: str, mtp: Llama) -> None:
    with pytest.raises(ValueError, match=said):
        mtp.create_chat_completion(value, max_tokens=1)


def test_a_stream_is_refused_before_it_is_read(mtp: Llama) -> None:
    for wrong in ({"prompt": [2, 10**6]}, {"logit_bias": {10**6: 1.0}}):
        given: dict[str, Any] = {"prompt": PROMPT, "stream": True} | wrong
        with pytest.raises(ValueError, match="1000000"):
            mtp(**given)
    with pytest.raises(ValueError, match=r"chat_template_kwargs has messages, stop; give"):
        mtp.create_chat_completion([{"role": "user", "content": "x"}], chat_template_kwargs={"stop": 1, "messages": []})


def test_parts_of_text_are_taken(mtp: Llama) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "import os"}]}]
    answer = mtp.create_chat_completion(parts, temperature=0.0, max_tokens=4, stop=("x", ""))
    plain = mtp.create_chat_completion([{"role": "user", "content": "import os"}], temperature=0.0, max_tokens=4)
    assert answer["choices"][0]["message"] == plain["choices"][0]["message"]


def test_a_bias_names_tokens(mtp: Llama) -> None:
    with pytest.raises(ValueError, match="logit_bias names 1000000"):
        mtp(PROMPT, logit_bias={10**6: 1.0})


@pytest.mark.parametrize(("value", "said"), [(NAN, "nan"), (-INF, "no token to choose")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_that_leaves_nothing_to_choose(value: float, said: str, temperature: float, mtp: Llama) -> None:
    def spoil(ids: Any, scores: Any) -> Any:
        scores[:] = value
        return scores

    with pytest.raises((ValueError, RuntimeError), match=said):
        mtp(PROMPT, temperature=temperature, max_tokens=3, logits_processor=spoil)
    with pytest.raises(ValueError, match="shape"):
        mtp(PROMPT, temperature=temperature, max_tokens=3, logits_processor=lambda ids, scores: scores[:5])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float, mtp: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mtp.logits
    monkeypatch.setattr(mtp, "logits", lambda row: np.full_like(real(row), NAN))
    with pytest.raises(RuntimeError, match="no numbers"):
        mtp(PROMPT, temperature=temperature, max_tokens=3)


def test_options_are_refused_before_anything_is_loaded() -> None:
    wrong: dict[str, Any] = {"n_threads": 100000, "n_ctx": 2**32 + 512, "lora_path": "/there/is/none", "drafter": 5}
    for name in wrong:
        given: dict[str, Any] = {name: wrong[name]}
        with pytest.raises(ValueError, match=name):
            Llama("/there/is/no/model", **given)
    assert check_options({"n_threads": np.int64(2), "verbose": 0}) == {"n_threads": 2, "verbose": False}


def test_a_chat_format_that_there_is_not(demo: Pair) -> None:
    with pytest.raises(ValueError, match=r"chat_format is 'wizard'; give .*chat_template\.default.*chatml"):
        Llama(demo.target, chat_format="wizard", **LOADING)
    with closing(Llama(demo.target, chat_format="gemma-4", **LOADING)) as llm:
        assert llm.create_chat_completion([{"role": "user", "content": "x"}], max_tokens=1)["choices"]


def test_an_argument_that_there_is_not(demo: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock takes any without a word."""
    given: dict[str, Any] = {"n_contxt": 64}
    Llama(demo.target, **LOADING, **given).close()
    assert "Llama has no argument n_contxt (do you mean n_ctx?); it is left out." in capsys.readouterr().err
