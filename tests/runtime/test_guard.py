"""Faults: threads, interrupts, refusals of llama.cpp, freed objects. Afterwards it works, or says what to do."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from children import GUARD, environment
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama, native
from gemma_mtp.runtime import guard as guard_module
from gemma_mtp.runtime.guard import Guard, Holder
from llama_cpp import llama_cpp as lib
from llamas import OPTIONS
from prompts import PROMPT

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 32}


@pytest.fixture(scope="module")
def mtp(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def wanted(demo: Pair) -> str:
    with closing(Llama(demo.target, drafter=None, **OPTIONS)) as llm:
        text: str = llm(PROMPT, **GREEDY)["choices"][0]["text"]
    return text


@pytest.fixture
def usable(mtp: Llama, wanted: str) -> Iterator[Llama]:
    """The drop-in, which must answer as ever after whatever a test did to it."""
    yield mtp
    assert mtp(PROMPT, **GREEDY)["choices"][0]["text"] == wanted
    assert mtp.stats.accepted > 0


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call returns or raises in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as problem:
            found.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(GUARD)
    return found[0]


CALLS: dict[str, Callable[[Llama], Any]] = {
    "completion": lambda llm: llm(PROMPT, **GREEDY),
    "stream": lambda llm: list(llm(PROMPT, **GREEDY, stream=True)),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "x"}], max_tokens=2),
    "generate": lambda llm: next(llm.generate([2, 5])),
    "eval": lambda llm: llm.eval([5]),
    "reset": lambda llm: llm.reset(),
    "save_state": lambda llm: llm.save_state(),
    "close": lambda llm: llm.close(),
}


@pytest.mark.parametrize("name", [*(name for name in CALLS if name != "close")])
def test_another_thread_is_refused_while_a_stream_is_read(
    name: str, usable: Llama, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = usable(PROMPT, **GREEDY, stream=True)
    text = "".join(next(stream)["choices"][0]["text"] for _ in range(4))
    monkeypatch.setattr(usable.guard, "patience", 0.01)
    monkeypatch.setattr(Holder, "abandoned", lambda self, patience: False)  # however long it takes on this machine
    problem = in_thread(lambda: CALLS[name](usable))
    assert isinstance(problem, RuntimeError)
    assert '"MainThread" is reading a stream since' in str(problem)
    assert text + "".join(chunk["choices"][0]["text"] for chunk in stream) == wanted


def test_another_thread_is_refused_in_the_middle_of_a_call(
    usable: Llama, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that the call itself waits for, which would never end otherwise."""
    monkeypatch.setattr(usable.guard, "patience", 0.01)
    seen = []

    def intrude(ids: Any, scores: Any) -> Any:
        seen.append(in_thread(lambda: usable("x", max_tokens=2)))
        return scores

    processors = llama_cpp.LogitsProcessorList([intrude])
    assert usable(PROMPT, **GREEDY, logits_processor=processors)["choices"][0]["text"] == wanted
    assert len(seen) == GREEDY["max_tokens"]
    assert all(isinstance(problem, RuntimeError) for problem in seen)
    assert all('"MainThread" is inside a call since' in str(problem) for problem in seen)


@pytest.mark.parametrize("name", [*(name for name in CALLS if name != "close")])
def test_a_stream_whose_reader_is_gone_gives_way_at_once(
    name: str, usable: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ended with the stream in a variable, or in the traceback of what stopped it."""
    monkeypatch.setattr(usable.guard, "patience", 3600.0)

    def reads() -> None:
        for _ in stream:
            raise ValueError("the reader's own")

    stream = usable(PROMPT, **GREEDY, stream=True)
    problem = in_thread(reads)
    assert "the reader's own" in str(problem) and problem.__traceback__ is not None
    CALLS[name](usable)
    with pytest.raises(RuntimeError, match="later call"):
        next(stream)


def test_close_frees_a_stream_whose_reader_is_gone(demo: Pair) -> None:
    llm = Llama(demo.target, **OPTIONS)
    llm.guard.patience = 3600.0
    stream = llm(PROMPT, **GREEDY, stream=True)
    assert in_thread(lambda: next(stream))["choices"]
    llm.close()
    with pytest.raises(RuntimeError, match="later call"):
        next(stream)


def test_close_ends_a_stream_that_is_read(demo: Pair) -> None:
    llm = Llama(demo.target, **OPTIONS)
    llm.guard.patience = 3600.0
    with ThreadPoolExecutor(1) as reader:
        stream = llm(PROMPT, **GREEDY, stream=True)
        assert reader.submit(next, stream).result(GUARD)["choices"]
        llm.close()
        with pytest.raises(RuntimeError, match="later call"):
            reader.submit(next, stream).result(GUARD)


@pytest.mark.parametrize("call", ["completion", "generate", "prompt"])
def test_close_ends_a_call_of_another_thread(call: str, demo: Pair) -> None:
    """At its next step, however long it would have gone on."""
    llm = Llama(demo.target, **OPTIONS | {"n_ctx": 2048})
    context, inside, go = llm._ctx, threading.Event(), threading.Event()
    real = llm._ctx.decode

    def slow(batch: Any) -> None:
        inside.set()
        assert go.wait(GUARD)
        real(batch)

    llm._ctx.decode = slow
    calls: dict[str, Callable[[], Any]] = {
        "completion": lambda: llm(PROMPT, temperature=0.0, max_tokens=1500),
        "generate": lambda: list(zip(range(1500), llm.generate([2, 5]), strict=False)),
        "prompt": lambda: llm.eval([5] * 1500),
    }
    with ThreadPoolExecutor(2) as pool:
        working = pool.submit(calls[call])
        assert inside.wait(GUARD)
        closing_it = pool.submit(llm.close)
        while not llm.guard.ending:
            pass
        go.set()
        closing_it.result(GUARD)
        with pytest.raises(RuntimeError, match="closed"):
            working.result(GUARD)
    assert context.ctx is None


def test_close_within_a_call_frees_when_it_ends(demo: Pair) -> None:
    """A logits processor here; a handler of a signal is the same."""
    llm = Llama(demo.target, **OPTIONS)
    context, seen = llm._ctx, []

    def close(ids: Any, scores: Any) -> Any:
        llm.close()
        seen.append(context.ctx is not None)
        return scores

    with pytest.raises(RuntimeError, match="closed"):
        llm(PROMPT, **GREEDY, logits_processor=llama_cpp.LogitsProcessorList([close]))
    assert seen == [True]
    assert context.ctx is None


def test_with_closes(demo: Pair) -> None:
    with Llama(demo.target, **OPTIONS) as llm:
        context = llm._ctx
        assert llm(PROMPT, **GREEDY)["choices"]
    assert context.ctx is None


FORK = """
import os, sys
from gemma_mtp.runtime import Llama
llm = Llama(sys.argv[1], n_ctx=256, n_threads=2, verbose=False)
stream = llm("import os", max_tokens=20, stream=True)
next(stream)
if not (child := os.fork()):
    for call in (lambda: llm("x"), lambda: next(stream), lambda: llm.eval([5]), lambda: llm.create_chat_completion([])):
        try:
            call()
            os._exit(3)
        except RuntimeError as problem:
            assert "spawn" in str(problem), problem
    llm.close()
    del llm, stream
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print(llm("import os", max_tokens=2)["usage"]["completion_tokens"])
"""


def test_after_a_fork_it_says_what_to_do(demo: Pair) -> None:
    """The threads that compute are missing in the child, which would wait for them for ever; it can end, though."""
    command = [sys.executable, "-c", FORK, str(demo.target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GUARD)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


class Reader:
    """A thread that takes an item of a stream whenever it is told to, until the end of a block."""

    def __init__(self, guard: Guard) -> None:
        self.stream = guard.stream(number for number in count())
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def __enter__(self) -> Reader:
        self.take()
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def take(self) -> None:
        self._pool.submit(next, self.stream).result(30)


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(guard_module, "monotonic", made)
    return made


def test_a_stream_that_nobody_reads_any_more_gives_way_in_time(clock: Clock) -> None:
    """Its thread lives, and has asked for nothing for as long as others have patience."""
    guard = Guard(patience=5.0)
    with Reader(guard) as reader, ThreadPoolExecutor(1) as pool:
        clock.now += 4.0
        waiting = pool.submit(entered, guard)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        clock.now += 1.0
        assert waiting.result(30)
        with pytest.raises(RuntimeError, match="later call"):
            reader.take()


def test_a_stream_that_is_read_is_not_ended(clock: Clock) -> None:
    """Whoever waits for it is told who has it and for how long; the reader goes on."""
    guard = Guard(patience=5.0)
    with Reader(guard) as reader, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(entered, guard)
        while not waiting.done():
            clock.now += 1.0
            reader.take()
        with pytest.raises(RuntimeError, match=r'another thread: "reader_0" is reading a stream since \d+ s'):
            waiting.result()
        reader.take()


def test_a_call_waits_for_another_to_end() -> None:
    guard = Guard(patience=3600.0)
    with ThreadPoolExecutor(1) as pool:
        with guard.call():
            waiting = pool.submit(entered, guard)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        assert waiting.result(30)
        guard.dropped = True  # which lets nobody in before the other is out either
        with guard.call():
            waiting = pool.submit(entered, guard)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        assert waiting.result(30)


def entered(guard: Guard) -> bool:
    with guard.call():
        return guard.nested()


def test_many_threads_at_once(demo: Pair, wanted: str) -> None:
    """They wait for each other, and each gets the right text."""
    start, made = threading.Barrier(6), []
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        llm.guard.patience = 3600.0

        def ask() -> None:
            start.wait(GUARD)
            for _ in range(8):
                made.append(llm(PROMPT, **GREEDY)["choices"][0]["text"])

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD)
    assert made == [wanted] * 48


def test_a_stream_may_move_between_threads(usable: Llama, wanted: str) -> None:
    stream = usable(PROMPT, **GREEDY, stream=True)
    text = ""
    while (chunk := in_thread(lambda: next(stream, None))) is not None:
        text += chunk["choices"][0]["text"]
    assert text == wanted


def test_a_new_request_ends_a_stream_left_open(usable: Llama, wanted: str) -> None:
    """As a loop over a stream that was left with `break`: stock goes on too, and this stream says that it cannot."""
    stream = usable(PROMPT, **GREEDY, stream=True)
    next(stream)
    assert usable(PROMPT, **GREEDY)["choices"][0]["text"] == wanted
    with pytest.raises(RuntimeError, match="later call"):
        next(stream)
    other = usable(PROMPT, **GREEDY, stream=True)
    next(other)
    stream.close()
    assert next(other)["choices"][0]["text"]
    other.close()


def test_what_nobody_has_any_more_is_closed_from_any_thread() -> None:
    guard = Guard(patience=3600.0)
    left = guard.stream(i for i in range(3))
    assert next(left) == 0
    guard.dropped = True
    assert in_thread(lambda: list(guard.stream(i for i in range(3)))) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="later call"):
        next(left)
    with guard.call(), guard.call():
        assert guard.nested()
    assert not guard.nested()


@pytest.mark.parametrize("place", range(1, 12))
@pytest.mark.parametrize("where", ["decode", "draft", "choice"])
def test_an_interrupt_leaves_it_usable(where: str, place: int, usable: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt before or after the n-th target pass or drafter step, or in a choice in mid-draft."""
    count = 0

    def interrupting(call: Any, after: bool) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            made = call(*args) if after else None
            if count == place:
                raise KeyboardInterrupt
            return made if after else call(*args)

        return counted

    if where == "choice":
        ours = interrupting(lambda ids, scores: scores, after=False)
        arguments = {"logits_processor": llama_cpp.LogitsProcessorList([ours])}
    else:
        arguments = {}
        owner, name = (usable._ctx, "decode") if where == "decode" else (type(usable.drafter), "draft")
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), after=place % 2 == 0))
    if where == "draft":  # as many rounds as it takes
        arguments["max_tokens"] = 200
    with pytest.raises(KeyboardInterrupt):
        usable(PROMPT, **GREEDY | arguments)
    monkeypatch.undo()
    cells = lib.llama_memory_seq_pos_max(lib.llama_get_memory(usable.ctx), 0)
    assert cells == usable.n_tokens - 1


@pytest.mark.parametrize("code", [1, 2, -1, -2, -3])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_failed_decode_rolls_back(code: int, place: int, usable: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama_decode that does its work and then says that it failed, as an abort between two n_ubatch does."""
    count, real = 0, lib.llama_decode

    def failing(ctx: Any, batch: Any) -> int:
        nonlocal count
        count += ctx == usable.ctx
        made = real(ctx, batch)
        return code if count == place and ctx == usable.ctx else made

    usable.reset()
    monkeypatch.setattr(lib, "llama_decode", failing)
    with pytest.raises(RuntimeError, match=rf"returned {code}: .+[.]$"):
        usable(PROMPT, **GREEDY)
    monkeypatch.undo()
    assert lib.llama_memory_seq_pos_max(lib.llama_get_memory(usable.ctx), 0) == usable.n_tokens - 1


def test_a_drafter_that_fails_says_how_to_go_on(usable: Llama, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rounds in one native call, and by one decode for each token."""
    real, exported = lib.llama_decode, native._llama_mtp_draft()

    def failing() -> Any:
        return None if exported is None else lambda *_: -2

    monkeypatch.setattr(lib, "llama_decode", lambda ctx, batch: real(ctx, batch) if ctx == usable.ctx else -2)
    monkeypatch.setattr(native, "_llama_mtp_draft", failing)
    for settings in (GREEDY, GREEDY | {"repeat_penalty": 1.2}):
        with pytest.raises(RuntimeError, match=r"memory ran out.*mtp=False"):
            usable(PROMPT, **settings)
    assert usable(PROMPT, **GREEDY, mtp=False)["choices"][0]["text"] == wanted


def test_a_full_context_is_an_error_with_a_next_step(demo: Pair) -> None:
    with closing(Llama(demo.target, **OPTIONS | {"n_ctx": 256})) as llm:
        tokens = []
        with pytest.raises(RuntimeError, match="larger n_ctx"):
            for token in llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0):
                tokens.append(token)
        assert len(tokens) == 256 - len(llm.tokenize(PROMPT.encode())) + 1
        assert llm.n_tokens == 256
        with pytest.raises(RuntimeError, match="larger n_ctx"):
            llm.eval([5])
        assert llm(PROMPT, max_tokens=2)["choices"]


def test_what_a_processor_raises_is_raised(usable: Llama) -> None:
    def boom(ids: Any, scores: Any) -> Any:
        raise KeyError("mine")

    for settings in ({}, {"mirostat_mode": 2}, {"temperature": 0.0}):
        with pytest.raises(KeyError, match="mine"):
            usable(PROMPT, max_tokens=3, logits_processor=llama_cpp.LogitsProcessorList([boom]), **settings)


@pytest.mark.parametrize("text", ["root ::= (", 'start ::= "a"', "root ::= missing"])
def test_a_broken_grammar_is_an_error(text: str, usable: Llama) -> None:
    """Stock crashes."""
    grammar = llama_cpp.LlamaGrammar.from_string(text, verbose=False)
    for settings in ({}, {"mirostat_mode": 2}):
        with pytest.raises(ValueError, match="grammar"):
            usable(PROMPT, max_tokens=3, grammar=grammar, **settings)


def test_a_closed_object_says_so(demo: Pair) -> None:
    llm = Llama(demo.target, **OPTIONS)
    stream = llm(PROMPT, **GREEDY, stream=True)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError):
        next(stream)
    calls: list[Callable[[Llama], Any]] = [
        *CALLS.values(), lambda llm: llm.tokenize(b"x"), lambda llm: llm.n_ctx(), lambda llm: llm.token_eos(),
    ]  # fmt: skip
    for call in calls:
        if call is not CALLS["close"]:
            with pytest.raises(RuntimeError, match="closed"):
                call(llm)


def test_dropping_an_object_frees_it_at_once(demo: Pair) -> None:
    gc.disable()
    try:
        llm = Llama(demo.target, **OPTIONS)
        llm(PROMPT, max_tokens=8)
        stream = llm(PROMPT, max_tokens=8, stream=True)
        next(stream)
        gone, context = weakref.ref(llm), llm._ctx
        del llm, stream
        assert gone() is None
        assert context.ctx is None
    finally:
        gc.enable()


def test_garbage_with_a_stream_of_another_thread_is_freed(demo: Pair) -> None:
    def lose() -> Any:
        llm = Llama(demo.target, **OPTIONS)
        stream = llm(PROMPT, **GREEDY, stream=True)
        next(stream)
        ring: list[Any] = [llm, stream]
        ring.append(ring)
        return llm._ctx

    context = in_thread(lose)
    gc.collect()
    assert context.ctx is None


LOADS: dict[str, tuple[str, str]] = {
    "quantized V without flash attention": ("type_v=8, flash_attn=False", "flash_attn=True"),
    "no ggml type": ("type_k=99", "type_k"),
    "a type that cannot be quantized to": ("type_k=16", "type_k"),
    "memory": ("n_ctx=10**7", "n_ctx"),
    "n_ctx": ("n_ctx=-1", "n_ctx"),
    "n_batch": ("n_batch=-1", "n_batch"),
    "no batch": ("n_batch=0", "n_batch"),
    "LoRA": ("lora_path=sys.argv[1]", "adapter"),
    "no weights": ("vocab_only=True", "vocab_only"),
}


@pytest.mark.parametrize("case", LOADS)
def test_nothing_reaches_an_assertion_inside_llama_cpp(case: str, demo: Pair, tmp_path: Path) -> None:
    """In a process of its own, as an assertion would end it: one line with the next step instead."""
    arguments, hint = LOADS[case]
    code = f"""
import resource, sys
from pathlib import Path
from gemma_mtp.runtime import Llama, native
taken = Path("/proc/self/statm")  # much where there are many cores
limit = (4 << 30) + (int(taken.read_text().split()[0]) * resource.getpagesize() if taken.exists() else 0)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
options = dict(n_ctx=512, verbose=False, n_threads=1, n_threads_batch=1, flash_attn=True)
try:
    Llama(sys.argv[1], **options | dict({arguments}))("x")
except (ValueError, RuntimeError) as problem:
    print(problem)
"""
    command = [sys.executable, "-c", code, str(demo.target)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hint in done.stdout
    assert done.stdout.count("\n") == 1


TYPES = """
import sys
from gemma_mtp.runtime import Llama
for value in [*range(-2, 51), None, True, 8.0, "q8_0", []]:
    for name in ("type_k", "type_v"):
        given = {name: value}
        try:
            llm = Llama(sys.argv[1], n_ctx=256, n_threads=1, flash_attn=True, verbose=False, **given)
            llm("import os", max_tokens=2)
            llm.close()
            print(given, "works")
        except ValueError as problem:
            print(given, problem)
"""


def test_every_type_of_a_cache_works_or_is_refused(demo: Pair) -> None:
    """In a process of its own, which must live to the end; the heads of this pair are multiples of 64."""
    done = subprocess.run([sys.executable, "-c", TYPES, demo.target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * (53 + 5)
    for name in ("type_k", "type_v"):
        worked = [line for line in lines if name in line and line.endswith("works")]
        assert worked == [f"{{'{name}': {n}}} works" for n in (0, 1, 2, 3, 6, 7, 8, 20, 30, 39, 40, 42, None)]
        refused = [line.split("} ", 1)[1] for line in lines if name in line and line not in worked]
        large = [line for line in refused if "blocks of" in line]
        assert len(large) == 9
        assert any(f"{name} Q6_K has blocks of 256 values" in line for line in large)
        assert all(line.startswith(f"{name} is ") and "8 (Q8_0)" in line for line in refused if line not in large)


def test_a_state_that_does_not_fit_is_refused(demo: Pair, usable: Llama) -> None:
    with closing(Llama(demo.target, **OPTIONS | {"n_ctx": 1024})) as other:
        other("x = 1\n" * 200, max_tokens=2)
        with pytest.raises(ValueError, match="raise n_ctx"):
            usable.load_state(other.save_state())
    usable(PROMPT, **GREEDY)
    state = usable.save_state()
    state.llama_state = bytes(len(state.llama_state))
    with pytest.raises(RuntimeError, match="other"):
        usable.load_state(state)
    assert usable.n_tokens == 0


def test_abandoned_in_the_middle_of_a_draft(usable: Llama, wanted: str) -> None:
    for kept in range(1, 9):
        stream = usable(PROMPT, **GREEDY, stream=True)
        text = "".join(next(stream)["choices"][0]["text"] for _ in range(kept))
        stream.close()
        assert wanted.startswith(text)
        assert np.array_equal(usable._input_ids, usable.input_ids[: usable.n_tokens])
        assert usable.detokenize(usable._input_ids.tolist()).decode().startswith(PROMPT[:9])
