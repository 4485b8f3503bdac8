"""Chat handlers among many prompts.

A handler formats messages, calls `create_completion` of the object that it is given, and makes a chat's answer of what
that returns. Here it is given a stand-in: the first time it gets as far as that call, whose arguments are then a prompt
among the others; when that is answered it runs again, and the call returns.
"""

from __future__ import annotations

from typing import Any

from gemma_mtp.runtime.borrowed import bind
from gemma_mtp.runtime.context import Stock
from gemma_mtp.runtime.request import WISHES


class Asking(Exception):
    """A handler wants a completion that there is none of yet.

    Args:
        given: the arguments of `create_completion`, by name.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given


class Replay:
    """Stands where a handler expects the object, and answers what was generated already.

    Args:
        llm: the object, for everything but completions.
        answers: to the completions that the handler asks for, in their order.
    """

    def __init__(self, llm: Any, answers: list[dict[str, Any]]) -> None:
        self._llm, self._answers = llm, iter(answers)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """The next answer.

        Raises:
            Asking: there is none yet.
        """
        if (answer := next(self._answers, None)) is not None:
            return answer
        kwargs = {name: value for name, value in kwargs.items() if name not in WISHES}
        raise Asking(bind(Stock.create_completion, *args, **kwargs))

    __call__ = create_completion

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)
