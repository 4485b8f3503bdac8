"""The command `gemma-mtp chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click
from gemma_mtp.runtime.cli.options import loading_options, media_options, opened, sampling_options
from gemma_mtp.runtime.media import message

HELP = "/exit or Ctrl-D leaves, /new starts over, /image FILE and /audio FILE show a file, Ctrl-C stops an answer."


@click.command()
@click.argument("target")
@click.option("--system", metavar="TEXT", help="Instructions that stand before the conversation.")
@click.option("--think", is_flag=True, help="Let the model think before it answers.")
@media_options
@click.option("-n", "max_tokens", type=click.IntRange(1), help="Tokens per answer. [default: what the context holds]")
@sampling_options
@loading_options
def chat(
    target: str,
    system: str | None,
    think: bool,
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    max_tokens: int | None,
    sampling: dict[str, Any],
    **loading: Any,
) -> None:
    """Talk to a model in the terminal.

    TARGET is a GGUF file, or the name of a model of Ollama. Answers go to stdout as they are made, a line of statistics
    after each to stderr. /exit or Ctrl-D leaves, /new starts over, Ctrl-C stops an answer; the next question is also
    about the files of /image FILE and /audio FILE, the first one about those of --image and --audio.

    \b
    Examples:
      gemma-mtp chat out/gemma-4-E2B-it-Q4_K_M.gguf
      gemma-mtp chat gemma4:e4b
      gemma-mtp chat out/gemma-4-E2B-it-Q4_K_M.gguf --image photo.jpg
      gemma-mtp chat out/gemma-4-E2B-it-Q4_K_M.gguf --think --system "You are terse."
    """
    with opened(target, **loading) as llm:
        if sys.stdin.isatty():
            with suppress(ImportError):  # line editing and history, where Python has it
                import readline  # noqa: F401
            click.echo(HELP, err=True)
        arguments = {"max_tokens": max_tokens, "chat_template_kwargs": {"enable_thinking": think}, **sampling}
        converse(llm, system, lines, {"/image": list(images), "/audio": list(sounds)}, **arguments)


def lines() -> Iterator[str]:
    """What the user types, until /exit or the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(err=True)  # as a shell does: a new line instead of what was typed
            continue
        if line == "/exit":
            return
        if line:
            yield line


def converse(
    llm: Any, system: str | None, typed: Callable[[], Iterator[str]], files: dict[str, list[Path]], **arguments: Any
) -> None:
    """Answer line by line, each with the whole conversation before it.

    Args:
        llm: a `Llama`.
        system: instructions that stand first.
        typed: gives the user's lines.
        files: that the next question is about, by the commands that add to them.
        arguments: of `create_chat_completion`.
    """
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    for line in typed():
        if line == "/new":
            messages, files = list(first), {command: [] for command in files}
            continue
        if line.startswith("/"):
            command, _, name = line.partition(" ")
            if command not in files:
                click.echo(f"unknown command {command}: {HELP}", err=True)
            elif not Path(name.strip()).is_file():
                click.echo(f"error: there is no file {name.strip()!r}.", err=True)
            else:
                files[command].append(Path(name.strip()))
            continue
        messages.append(message(line, files["/image"], files["/audio"]))
        files = {command: [] for command in files}
        try:
            answer = answered(llm, messages, **arguments)
        except (ValueError, RuntimeError) as problem:  # the context is full: the conversation so far stays
            messages.pop()
            click.echo(f"error: {problem} /new starts over.", err=True)
            continue
        messages.append({"role": "assistant", "content": answer})
        click.echo(llm.stats.line(), err=True)


def answered(llm: Any, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """Print an answer as it is made and return it, as far as it came before Ctrl-C."""
    answer = ""
    with closing(llm.create_chat_completion(messages, stream=True, **arguments)) as chunks, suppress(KeyboardInterrupt):
        for chunk in chunks:
            piece = chunk["choices"][0]["delta"].get("content") or ""
            answer += piece
            click.echo(piece, nl=False)
    click.echo()
    return answer
