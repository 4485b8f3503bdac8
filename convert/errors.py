"""What a user can cause and mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class MtpError(ValueError):
    """What a user can cause and mend; its text is one line with the next step."""


class PairError(MtpError):
    """The two files, or the two checkpoints, are not a target and its drafter."""


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Name the file whose values turned out to be of another kind than its readers expect."""
    try:
        yield
    except MtpError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as problem:
        said = str(problem).replace("\n", " ")
        raise MtpError(f"{path} is damaged ({type(problem).__name__}: {said}); download it again.") from problem
