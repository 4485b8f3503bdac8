"""Ctrl-C while llama.cpp is at work.

Python handles a signal when it next runs Python. In the middle of a native call that is in a callback, if there is one,
and what is raised in a callback is lost. So within a native call that may take long the signal is noted, the call is
asked to end, and what the signal would have raised is raised then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_cpp import llama_cpp as lib

Ended = Callable[[], bool]


@contextmanager
def interruptible(ended: Ended = lambda: False) -> Iterator[Ended]:
    """Keep SIGINT for the end of a block; yields what tells whether the block should come to it.

    Only the main thread gets signals; elsewhere, and where SIGINT is ignored or ends the process, nothing is kept.

    Args:
        ended: another reason to end.

    Raises:
        BaseException: what the program's own handler raises: KeyboardInterrupt, if it has none.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield ended
        return
    caught: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield lambda: bool(caught) or ended()
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


@contextmanager
def aborting(ctx: Any, ended: Ended) -> Iterator[None]:
    """Let a context's decodes within a block end early, with status 2, on what `ended` tells.

    It is asked between two operations, on the CPU; other devices end with the batch.
    """
    callback = lib.ggml_abort_callback(lambda _: ended())
    lib.llama_set_abort_callback(ctx, callback, None)
    try:
        yield
    finally:
        lib.llama_set_abort_callback(ctx, lib.ggml_abort_callback(), None)


def while_loading(ended: Ended) -> Any:
    """A progress callback that ends the loading of a model; to be kept for as long as it may be called."""
    return lib.llama_progress_callback(lambda *_: not ended())
