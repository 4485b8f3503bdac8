"""What a single request asks for beside llama_cpp.Llama's arguments, and how it gets past chat handlers."""

from __future__ import annotations

import functools
import inspect
import random
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

DraftLength = int | Literal["auto"]
# The longest draft. With the token before it these are 16 rows of a batch: up to there a row's logits are those it has
# alone, beyond it llama.cpp multiplies with other kernels, and the text would depend on how far was drafted.
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
    if int(seed) & DRAWN == DRAWN:
        return chosen_seed(seed)
    return random.Random(int(seed)).randint(0, 2**32) % DRAWN


@dataclass(frozen=True)
class Request:
    """Wishes of one request; None leaves a thing as the object has it.

    Attributes:
        mtp: False generates without drafting.
        draft_length: tokens to draft in a round, or "auto".
        told: what the answer says beside llama_cpp.Llama's keys, for a chat handler passes on only what it knows.

    Raises:
        ValueError: a wish is not what it may be.
    """

    mtp: bool | None = None
    draft_length: DraftLength | None = None
    told: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.mtp, bool | None):
            raise ValueError(f"mtp is {self.mtp!r}; give True, False or None.")
        if self.draft_length is not None:
            checked_length(self.draft_length)

    def length(self, default: DraftLength) -> DraftLength:
        """The draft length of this request, 0 when it wants no drafts."""
        if self.mtp is False:
            return 0
        return default if self.draft_length is None else checked_length(self.draft_length)


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


def within(mtp: bool | None, draft_length: Any) -> Request:
    """The request of a call: what it says itself, and what the call around it said."""
    around = ASKED.get()
    return Request(
        mtp=around.mtp if mtp is None else mtp,
        draft_length=around.draft_length if draft_length is None else draft_length,
        told={} if around is NOTHING else around.told,
    )


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


WISHES = {"mtp": "bool | None", "draft_length": "DraftLength | None"}


def per_request(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Give a method of llama_cpp.Llama the keyword arguments of a Request; everything else stays as it is."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, mtp: bool | None = None, draft_length: Any = None, **kwargs: Any) -> Any:
        return ask(within(mtp, draft_length), lambda: stock(self, *args, **kwargs))

    return with_keywords(method, **WISHES)


def with_keywords(method: Callable[..., Any], **kinds: str) -> Callable[..., Any]:
    """Show keyword arguments, None by default, in the signature that a method has from stock's."""
    signature = inspect.signature(method)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in kinds.items()
    ]
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *ours]
    )
    return method
