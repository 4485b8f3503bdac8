"""What an argument may be: a rule that gives its value or says what to give instead, by one message for all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

INT32 = 2**31 - 1

# Gives the value as llama_cpp takes it; raises ValueError, TypeError or OverflowError.
Check = Callable[[Any], Any]


class Rule:
    """What an argument may be.

    Args:
        check: gives the value, or raises.
        words: what may be given, for the message.
    """

    def __init__(self, check: Check, words: str) -> None:
        self._check, self.words = check, words

    def __call__(self, name: str, value: Any) -> Any:
        """The value of an argument.

        Raises:
            ValueError: it is not what it may be; says what that is.
        """
        try:
            return self._check(value)
        except (ValueError, TypeError, OverflowError) as problem:
            raise ValueError(f"{name} is {shown(value)}; give {self.words}.") from problem

    def or_none(self, words: str = "") -> Rule:
        """The same, or None."""
        return Rule(lambda value: None if value is None else self._check(value), f"{self.words}, or None{words}")


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def refused() -> ValueError:
    """What a check raises; `Rule` says the rest."""
    return ValueError()


def whole(least: int = -INT32, most: int = INT32, words: str = "") -> Rule:
    """A whole number within bounds; a bool is none."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise refused()
        return int(value)

    bounds = " of 32 bits" if (least, most) == (-INT32, INT32) else f" from {least} to {most}"
    return Rule(check, f"a whole number{bounds}{words}")


def number(least: float = -math.inf, most: float = math.inf, above: float | None = None, words: str = "") -> Rule:
    """A finite number within bounds, which are allowed, or above one, which is not."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise refused()
        made = float(value)
        if not math.isfinite(made) or not least <= made <= most or (above is not None and made <= above):
            raise refused()
        return made

    bounds = ""
    if above is not None:
        bounds = f" above {above:g}"
    elif least > -math.inf:
        bounds = f" from {least:g} to {most:g}" if most < math.inf else f" from {least:g} on"
    return Rule(check, f"a finite number{bounds}{words}")


def _flag(value: Any) -> bool:
    if not isinstance(value, Integral | np.bool_) or value not in (0, 1):
        raise refused()
    return bool(value)


def one_of(*values: int, words: str) -> Rule:
    """One of some whole numbers."""
    inner = whole(min(values), max(values))

    def check(value: Any) -> int:
        made: int = inner("", value)
        if made not in values:
            raise refused()
        return made

    return Rule(check, words)


def text_of(value: Any) -> str:
    """A text as it is."""
    if not isinstance(value, str):
        raise refused()
    return value


def listed(value: Any) -> bool:
    """Whether something has items, one after the other."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def called(value: Any) -> Any:
    """What can be called, as it is."""
    if not callable(value):
        raise refused()
    return value


FLAG = Rule(_flag, "True or False")
SHARE = number(0.0, 1.0)
COUNT = whole(0)


def checked(table: Mapping[str, Rule], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they may be; those that the table does not name as they are.

    Raises:
        ValueError: one of them is not what it may be.
    """
    return {name: table[name](name, value) if name in table else value for name, value in given.items()}


def unknown(options: Mapping[str, Any], known: Iterable[str]) -> str | None:
    """What to say of arguments that llama_cpp.Llama swallows without a word; None if there are none."""
    names = [*known]
    strange = [name for name in options if name not in names]
    if not strange:
        return None
    near = [difflib.get_close_matches(name, names, 1) for name in strange]
    told = [f"{name} (do you mean {close[0]}?)" if close else name for name, close in zip(strange, near, strict=True)]
    return f"Llama has no argument {', '.join(told)}; it is left out"
