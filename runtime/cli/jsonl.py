"""`gemma-mtp run --jsonl`: many prompts from a file, their answers to another."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama
    from gemma_mtp.runtime.many.lines import Answers

SHOWN_EVERY = 0.5  # seconds, in a terminal
LOGGED_EVERY = 30.0  # elsewhere


class Progress:
    """Tells on stderr how far it is: in place in a terminal, elsewhere a line now and then.

    Args:
        total: lines in all.
        done: of these, answered before.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.failed = total, done, 0
        self._before, self._begun = done, monotonic()
        self._terminal = sys.stderr.isatty()
        self._told = self._begun if not self._terminal else 0.0

    def one(self, failed: bool, tokens: int) -> None:
        """A line more; `tokens` were made so far."""
        self.done += 1
        self.failed += failed
        now = monotonic()
        if now - self._told >= (SHOWN_EVERY if self._terminal else LOGGED_EVERY):
            self._told = now
            left = (self.total - self.done) * (now - self._begun) / (self.done - self._before)
            self._say(f"{self}, {tokens / (now - self._begun):.1f} tokens/s, about {left / 60:.0f} min left")

    def end(self, tokens: int) -> None:
        """All is done, or it was interrupted."""
        self._say(f"{self}, {tokens} tokens in {monotonic() - self._begun:.0f} s")
        if self._terminal:
            click.echo(err=True)

    def _say(self, words: str) -> None:
        click.echo(f"\r\033[K{words}" if self._terminal else words, err=True, nl=not self._terminal)

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.total} lines{failed}"


def answer_lines(llm: Llama, answers: Answers, parallel: int, chat: bool, settings: dict[str, Any]) -> int:
    """Answer what is not answered yet; returns how many of these failed.

    Args:
        llm: the model.
        answers: the files.
        parallel: how many prompts at a time.
        chat: whether a "prompt" is a user's message.
        settings: for all lines, as for a completion; a line's own come before them.
    """
    asked: dict[int, tuple[int, bytes, Any]] = {}  # what was taken and is not answered, by number among these
    texts, chats = llm.jobs_of_prompts(**settings), llm.jobs_of_chats(**settings)

    def items() -> Iterator[Any]:
        for place, (number, line) in enumerate(answers.left()):
            name, item = _read(line, chat)
            asked[place] = (number, line, name)
            yield item

    def prepare(item: dict[str, Any]) -> Any:
        return (chats if "messages" in item else texts)(item)

    progress = Progress(answers.total, len(answers.done))
    try:
        for place, answer in enumerate(llm.answered(items(), prepare, parallel)):
            number, line, name = asked.pop(place)
            told = {} if name is None else {"id": name}
            answers.write(number, line, told | _told(answer))
            progress.one(isinstance(answer, Exception), llm.stats.tokens)
    finally:
        progress.end(llm.stats.tokens)
        if progress.done < progress.total:
            click.echo(f"{answers.path} has what is done; the same command goes on from there.", err=True)
    return progress.failed


def _read(line: bytes, chat: bool) -> tuple[Any, dict[str, Any] | Exception]:
    """The "id" of a line, None without, and what it asks, or what is wrong with it."""
    from llama_cpp import LlamaGrammar

    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as problem:
        return None, ValueError(f"the line is not JSON ({problem}).")
    name = item.pop("id", None) if isinstance(item, dict) else None
    if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
        return name, ValueError('the line is no object with either "prompt" or "messages".')
    if chat and isinstance(item.get("prompt"), str):
        item["messages"] = [{"role": "user", "content": item.pop("prompt")}]
    if isinstance(item.get("grammar"), str):
        item["grammar"] = LlamaGrammar.from_string(item["grammar"], verbose=False)
    return name, item


def _told(answer: Any) -> dict[str, Any]:
    """What is written of an answer, or of the exception that there is in its place."""
    if isinstance(answer, Exception):
        return {"error": {"type": type(answer).__name__, "message": str(answer)}}
    choice = {key: value for key, value in answer["choices"][0].items() if key != "index" and value is not None}
    return choice | {key: answer[key] for key in ("seed", "usage")}


def run_lines(source: Path, out: Path, load: Callable[[], Any], model: str, parallel: int, chat: bool,
              settings: dict[str, Any]) -> None:  # fmt: skip
    """The command: the files are looked at before the model is loaded.

    Raises:
        click.exceptions.Exit: with status 1 if a line failed.
    """
    from gemma_mtp.runtime.many.lines import Answers, Prompts

    prompts = Prompts(source, settings | {"chat": chat, "model": Path(model).name})
    with Answers(out, prompts) as answers:
        if len(answers.done) == answers.total:
            click.echo(f"{out} has an answer to each of the {answers.total} lines of {source}.", err=True)
            return
        with load() as llm:
            failed = answer_lines(llm, answers, parallel, chat, settings)
    if failed:
        click.echo(f'{failed} lines failed: they have "error" in {out}.', err=True)
        raise click.exceptions.Exit(1)
