"""How work that takes long tells of it."""

from __future__ import annotations

from collections.abc import Callable

# Called with bytes done and bytes in all.
Progress = Callable[[int, int], None]
# Called with the bytes that are done since the last call.
More = Callable[[int], None]


def counting(progress: Progress, total: int) -> More:
    """A function that adds up what it is told, for one that wants the sum."""
    done = 0

    def more(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(done, total)

    return more
