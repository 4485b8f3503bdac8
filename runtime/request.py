"""What a single request asks for beside llama_cpp.Llama's arguments, and how it gets past chat handlers."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

from gemma_mtp.runtime.arguments import REQUEST

DraftLength = int | Literal["auto"]
# The longest draft: llama-server reserves outputs for as many, and the costs of so many rows are kept.
MOST = 15
LENGTHS = f'a number of tokens, 0 for none and {MOST} at most, or "auto"'


def checked_length(value: Any) -> DraftLength:
    """A draft length, wherever it was given: for an object, for one request, on a command line.

    Raises:
        ValueError: it is neither a count from 0 to `MOST` nor "auto".
    """
    if isinstance(value, str) and value == "auto":
        return "auto"
    if not isinstance(value, bool) and isinstance(value, Integral) and 0 <= int(value) <= MOST:
        return int(value)
    raise ValueError(f"draft_length is {value!r}; give {LENGTHS}.")


# What Gemma 4's generation_config.json says; it has no min_p, of which llama-cpp-python's own default is not 0.
SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0}
# llama.cpp draws a seed where it is given this one, which is -1 in 32 bits.
DRAWN = 0xFFFFFFFF


def chosen_seed(seed: Any) -> int:
    """The seed that a number stands for, between 0 and 2^32 - 2: its low 32 bits, or one drawn now for -1.

    Raises:
        ValueError: it is no whole number.
    """
    if not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed!r}; give a whole number, or -1 to have one drawn.")
    bits = int(seed) & DRAWN
    return secrets.randbelow(DRAWN) if bits == DRAWN else bits


def following_seed(seed: int) -> int:
    """The seed of a completion that names none, from that of the object: drawn if it has none.

    Else as llama_cpp.Llama has it, so that an object with a seed makes the same sequence of completions again.
    """
    if not has_seed(seed):
        return chosen_seed(seed)
    return random.Random(int(seed)).randint(0, 2**32) % DRAWN


def has_seed(seed: Any) -> bool:
    """Whether an object has a seed of its own, or wants one drawn for every request."""
    return int(seed) & DRAWN != DRAWN


def checked_mtp(value: Any) -> bool | None:
    """A wish for MTP, wherever it was given: for an object or for one request.

    Raises:
        ValueError: it is neither True nor False nor None.
    """
    if not isinstance(value, bool | None):
        raise ValueError(f"mtp is {value!r}; give True, False or None.")
    return value


@dataclass(frozen=True)
class Request:
    """Wishes of one request; None leaves a thing as it is otherwise.

    Attributes:
        mtp: False generates without drafting; True insists on it, and is an error where nothing can be drafted.
        draft_length: tokens to draft in a round, or "auto".
        min_tokens: tokens before which none ends the answer.
        told: what the answer says beside llama_cpp.Llama's keys, for a chat handler passes on only what it knows.

    Raises:
        ValueError: a wish is not what it may be.
    """

    mtp: bool | None = None
    draft_length: DraftLength | None = None
    min_tokens: int | None = None
    told: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        checked_mtp(self.mtp)
        if self.draft_length is not None:
            object.__setattr__(self, "draft_length", checked_length(self.draft_length))
        REQUEST["min_tokens"]("min_tokens", self.min_tokens)

    def within(self, around: Request) -> Request:
        """These wishes, and those of what is around where there is none here."""
        return Request(
            mtp=around.mtp if self.mtp is None else self.mtp,
            draft_length=around.draft_length if self.draft_length is None else self.draft_length,
            min_tokens=around.min_tokens if self.min_tokens is None else self.min_tokens,
            told=self.told,
        )

    @property
    def length(self) -> DraftLength:
        """The draft length, 0 where no drafts are wanted; "auto" if nothing was said."""
        if self.mtp is False:
            return 0
        return "auto" if self.draft_length is None else self.draft_length


NOTHING = Request()
# Chat handlers know nothing of a Request and call `create_completion` themselves, some of them only when their stream
# is read. A context variable reaches that call whatever stands between, and belongs to one thread.
ASKED: ContextVar[Request] = ContextVar("ASKED", default=NOTHING)


@contextmanager
def asking(request: Request) -> Iterator[None]:
    """Make a request known to the calls within a block."""
    token = ASKED.set(request)
    try:
        yield
    finally:
        ASKED.reset(token)


def asked(mtp: bool | None, draft_length: Any, min_tokens: int | None = None) -> Request:
    """The request of a call: what it says itself, and what the call around it said.

    Raises:
        ValueError: a wish is not what it may be.
    """
    around = ASKED.get()
    told = {} if around is NOTHING else around.told
    return Request(mtp, draft_length, min_tokens, told).within(around)


def _stepping(request: Request, chunks: Iterator[Any]) -> Generator[Any, None, None]:
    """A stream, each step of which knows the request."""
    try:
        while True:
            with asking(request):
                try:
                    chunk = next(chunks)
                except StopIteration:
                    return
            yield chunk
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


def ask(request: Request, call: Callable[[], Any]) -> Any:
    """Make a call that knows the request, and if it answers with a stream, each of its steps."""
    with asking(request):
        answer = call()
    return _stepping(request, answer) if isinstance(answer, Iterator) else answer


def tell(request: Request, item: Any) -> Any:
    """Add what a request has to tell to an answer, or to the chunk that ends a stream."""
    if isinstance(item, dict) and any(choice.get("finish_reason") for choice in item.get("choices", ())):
        item |= request.told
    return item


def telling(request: Request, answer: Any) -> Any:
    """`tell` for an answer of a chat handler, whole or in chunks."""
    if not isinstance(answer, Generator):
        return tell(request, answer)

    def chunks() -> Generator[Any, None, None]:
        with closing(answer):
            for chunk in answer:
                yield tell(request, chunk)

    return chunks()


DRAFTING = {"mtp": "bool | None", "draft_length": "DraftLength | None"}
WISHES = {**DRAFTING, "min_tokens": "int | None"}
