"""One request at a time: who may use an object, and when.

llama.cpp's context has one state. A second thread that decodes meanwhile would leave both with tokens of the other, so
it is refused at once; llama_cpp.Llama lets it in.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

BUSY = (
    "this Llama is in use by another thread. Give each thread a Llama of its own, or hold one lock around every "
    "request; for a stream, until it is exhausted or closed."
)
SUPERSEDED = (
    "this stream ended when a later call used the same Llama. Exhaust or close a stream before the next request, or "
    "give it a Llama of its own."
)


class Guard:
    """Lets calls and streams use an object one after the other.

    A stream owns the object from its first item until it is exhausted or closed, in whatever thread the next item is
    asked for. A call from the thread that asked last ends an open stream, as a program that abandons one expects; a
    call from any other thread is refused.

    Attributes:
        serialized: set where the caller lets one request in at a time, from changing threads (a server with a lock of
            its own): then a call from any thread ends an open stream.
    """

    def __init__(self) -> None:
        self.serialized = False
        self._lock = threading.Lock()
        self._inside: int | None = None  # the thread that is using the object
        self._open: Generator[Any, Any, None] | None = None  # the stream that owns it between two items
        self._last: int | None = None  # the thread that asked for its latest item

    def nested(self) -> bool:
        """Whether the calling thread is using the object already."""
        return self._inside == threading.get_ident()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Use the object for the length of a block.

        Raises:
            RuntimeError: another thread is using it, or has a stream open on it.
        """
        if self.nested():
            yield
            return
        self._take(None)
        try:
            yield
        finally:
            self._inside = None

    def stream(self, source: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """The same generator, owning the object from its first step to its last.

        Raises:
            RuntimeError: as `call`; or a later call ended this stream.
        """
        if self.nested():  # a generator stepped within a call or another stream is part of it
            yield from source
            return
        self._take(source)
        try:
            sent = None
            while True:
                try:
                    item = source.send(sent)
                except StopIteration:
                    return
                self._last, self._inside = self._inside, None
                sent = yield item
                self._resume(source)
        finally:
            self._close(source)

    def _take(self, source: Generator[Any, Any, None] | None) -> None:
        """Become the thread inside, ending a stream that was left open; with a source, that owns the object now."""
        me = threading.get_ident()
        with self._lock:
            foreign = self._open is not None and me != self._last and not self.serialized
            if self._inside is not None or foreign:
                raise RuntimeError(BUSY)
            self._inside = me
            left, self._open = self._open, source
        if left is not None:
            try:
                left.close()
            except BaseException:
                self._open = self._inside = None
                raise

    def _resume(self, source: Generator[Any, Any, None]) -> None:
        """Become the thread inside for the next item of the open stream."""
        with self._lock:
            if self._open is not source:
                raise RuntimeError(SUPERSEDED)
            self._inside = threading.get_ident()

    def _close(self, source: Generator[Any, Any, None]) -> None:
        """End a stream that is exhausted, closed or raised; does nothing for one that ended before."""
        with self._lock:
            if self._open is not source:
                return
            self._inside = threading.get_ident()
        try:
            source.close()
        finally:
            self._open = self._inside = None
