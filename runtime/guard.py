"""One request at a time: who may use an object, and when.

llama.cpp's context has one state. A second thread that decodes meanwhile would leave both with tokens of the other, so
it waits, and is refused if that takes too long; llama_cpp.Llama lets it in.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

BUSY = (
    'this Llama is in use by another thread: "{name}" {what} since {seconds:.0f} s. Give each thread a Llama of its '
    "own, or hold one lock around every request; for a stream, until it is exhausted or closed. `guard.patience` says "
    "how many seconds a call waits."
)
SUPERSEDED = (
    "this stream ended when a later call used the same Llama. Exhaust or close a stream before the next request, or "
    "give it a Llama of its own."
)
CALL, STREAM = "is inside a call", "is reading a stream"
POLL = 0.05  # seconds between two looks at a thread that may have ended, which tells nobody


class Holder:
    """Who has the object: a call, or a stream from its first item to its last.

    Args:
        stream: what the items are from; None for a call.
        what: what its thread does, in words.

    Attributes:
        begun: when the call or the stream began, by the monotonic clock.
        inside: the thread that is at work in it; None between two items.
        reader: the thread that is inside or asked for the latest item; weakly, as a thread may keep anything alive.
        name: of that thread.
        read: when the latest item was handed out.
    """

    def __init__(self, stream: Generator[Any, Any, None] | None, what: str) -> None:
        self.stream, self.what = stream, what
        self.begun = self.read = monotonic()
        self.enter()

    def enter(self) -> None:
        """The calling thread is at work."""
        thread = threading.current_thread()
        self.inside: int | None = threading.get_ident()
        self.reader, self.name = weakref.ref(thread), thread.name

    def leave(self) -> None:
        """An item is handed out."""
        self.inside, self.read = None, monotonic()

    def abandoned(self, patience: float) -> bool:
        """Whether no thread is at work and none will ask for another item, as far as one can tell."""
        if self.inside is not None:
            return False
        reader = self.reader()
        gone = reader is None or reader is threading.current_thread() or not reader.is_alive()
        return gone or monotonic() - self.read >= patience

    def __str__(self) -> str:
        return BUSY.format(name=self.name, what=self.what, seconds=monotonic() - self.begun)


class Guard:
    """Lets calls and streams use an object one after the other.

    A stream owns the object from its first item until it is exhausted or closed, in whatever thread the next item is
    asked for. A call from the thread that asked last ends an open stream, as a program that abandons one expects; so
    does a call from any thread where the thread that asked last has ended, or has asked for nothing for so long that
    it will not come back. Otherwise a call from another thread waits.

    Attributes:
        patience: seconds that a call waits for another thread, and after which a stream that nobody reads is given up.
        dropped: set when nobody has the object any more, nor its streams: then a call from any thread ends an open one.
        ending: set when the object is to be freed: who is at work in it shall come to an end, and nobody waits in vain.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self.patience = patience
        self.dropped = self.ending = False
        self._last: Callable[[], None] | None = None
        self._holder: Holder | None = None
        self._changed = threading.Condition()

    def nested(self) -> bool:
        """Whether the calling thread is using the object already."""
        holder = self._holder
        return holder is not None and holder.inside == threading.get_ident()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Use the object for the length of a block.

        Raises:
            RuntimeError: another thread has been using it for as long as this one has patience.
        """
        if self.nested():
            yield
            return
        self._take(None, CALL)
        try:
            yield
        finally:
            self._free()

    def stream(self, source: Generator[Any, Any, None], what: str = STREAM) -> Generator[Any, Any, None]:
        """The same generator, owning the object from its first step to its last.

        Args:
            source: the generator.
            what: what its thread does, for the message to others.

        Raises:
            RuntimeError: as `call`; or a later call ended this stream.
        """
        if self.nested():  # a generator stepped within a call or another stream is part of it
            yield from source
            return
        self._take(source, what)
        try:
            sent = None
            while True:
                try:
                    item = source.send(sent)
                except StopIteration:
                    return
                self._leave()
                sent = yield item
                self._resume(source)
        finally:
            self._close(source)

    def finish(self, free: Callable[[], None]) -> None:
        """Free the object: a stream ends, and a call of another thread does at its next step, which is waited for.

        From within a call, for instance by a handler of a signal, it is freed when that call ends.

        Args:
            free: does it.
        """
        self.ending = True
        if self.nested():
            self._last = free
            return
        self._take(None, CALL)
        try:
            free()
        finally:
            self._free()

    def _take(self, source: Generator[Any, Any, None] | None, what: str) -> None:
        """Become the thread inside, ending a stream that was left open; with a source, that owns the object now."""
        until = monotonic() + self.patience
        with self._changed:
            while (left := self._holder) is not None and not self._may_end(left):
                if not self.ending and monotonic() >= until:
                    raise RuntimeError(str(left))
                self._changed.wait(POLL)
            self._holder = Holder(source, what)
        if left is not None and left.stream is not None:
            try:
                left.stream.close()
            except BaseException:
                self._free()
                raise

    def _may_end(self, holder: Holder) -> bool:
        """Whether a stream may be ended for another call's sake."""
        return holder.abandoned(self.patience) or ((self.dropped or self.ending) and holder.inside is None)

    def _leave(self) -> None:
        """Hand out an item of the open stream."""
        with self._changed:
            assert self._holder is not None
            self._holder.leave()
            self._changed.notify_all()

    def _resume(self, source: Generator[Any, Any, None]) -> None:
        """Become the thread inside for the next item of the open stream."""
        with self._changed:
            if self._holder is None or self._holder.stream is not source:
                raise RuntimeError(SUPERSEDED)
            self._holder.enter()

    def _close(self, source: Generator[Any, Any, None]) -> None:
        """End a stream that is exhausted, closed or raised; does nothing for one that ended before."""
        with self._changed:
            if self._holder is None or self._holder.stream is not source:
                return
            self._holder.enter()
        try:
            source.close()
        finally:
            self._free()

    def _free(self) -> None:
        """Let the next one in, and free the object first if that was wished for within the call that ends."""
        last, self._last = self._last, None
        try:
            if last is not None:
                last()
        finally:
            with self._changed:
                self._holder = None
                self._changed.notify_all()


class Guarded(Protocol):
    """An object that its guard lets one thread at a time use."""

    guard: Guard

    def check_open(self) -> None:
        """Raise RuntimeError if there is nothing to use."""


def exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that needs the object for itself while it runs."""

    @functools.wraps(method)
    def guarded(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        self.check_open()
        with self.guard.call():
            return method(self, *args, **kwargs)

    return guarded


def exclusive_stream(method: Callable[..., Generator[Any, Any, None]]) -> Callable[..., Any]:
    """A generator method that needs the object for itself from its first item to its last."""

    @functools.wraps(method)
    def guarded(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        self.check_open()
        return self.guard.stream(method(self, *args, **kwargs))

    return guarded
