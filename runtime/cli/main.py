"""The command `gemma-mtp`: the group, and the command that generates."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, NoReturn

import click
from gemma_mtp.runtime.request import LENGTHS, checked_length

# Where each command lives. They are imported when called for, and import what they work with when they run: converting
# does without libllama, generating without the packages of the extra "convert".
COMMANDS = {
    "convert": "gemma_mtp.convert.cli.convert:convert",
    "link": "gemma_mtp.convert.cli.convert.files:link_command",
    "inspect": "gemma_mtp.convert.cli.convert.files:inspect",
    "verify": "gemma_mtp.convert.cli.convert.files:verify",
    "modelfile": "gemma_mtp.convert.cli.convert:modelfile_command",
    "ollama": "gemma_mtp.convert.cli.convert:ollama",
    "launch": "gemma_mtp.convert.cli.convert.launch:launch",
    "run": "gemma_mtp.runtime.cli.main:run",
    "chat": "gemma_mtp.runtime.cli.main.chat:chat",
    "serve": "gemma_mtp.runtime.cli.main.serve:serve",
    "bench": "gemma_mtp.runtime.cli.main.bench:bench",
    "build": "gemma_mtp.runtime.cli.main.build:build",
}
# What brings a package that is not there: generating needs nothing of the extra "convert", and llama_cpp is built here.
INSTALLS = dict.fromkeys(("gguf", "huggingface_hub", "rich"), "pip install 'gemma-mtp[convert]'")
INSTALLS["llama_cpp"] = "gemma-mtp build"


def imported(where: str) -> Any:
    """An object named as "module:name", imported now."""
    module, attribute = where.split(":")
    return getattr(importlib.import_module(module), attribute)


# What asks a program to end, beside Ctrl-C, and what is said then. Windows has no SIGHUP.
ENDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}


class Ended(BaseException):
    """A signal asked the program to end. Like KeyboardInterrupt it undoes on its way what is half done.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ending() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise `Ended`, unless who started the program has them ignored.

    Only the first counts, and none after it to the end of the program: `timeout` and terminals send two, and the second
    would stop the tidying up.
    """
    asked = False

    def end(number: int, frame: Any) -> None:
        nonlocal asked
        del frame
        if not asked:
            asked = True
            raise Ended(number)

    def lost(raised: Any) -> None:
        """What is raised while llama.cpp calls Python, for its log, gets no further: raise it again a little later."""
        nonlocal asked
        if isinstance(raised.exc_value, Ended):
            number, asked = raised.exc_value.number, False
        elif isinstance(raised.exc_value, KeyboardInterrupt):
            number = signal.SIGINT
        else:
            kept_hook(raised)
            return
        threading.Timer(0.05, signal.raise_signal, (number,)).start()

    kept, kept_hook = {}, sys.unraisablehook
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ENDS if hasattr(signal, name)]
        kept = {each: signal.signal(each, end) for each in numbers if signal.getsignal(each) is signal.SIG_DFL}
        sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = kept_hook
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_IGN if asked else handler)


def leave(status: int, words: str) -> NoReturn:
    """End the program at once; sys.exit would wait for threads that download."""
    with suppress(OSError):  # the terminal may be gone
        click.echo(words, err=True)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


class LazyGroup(click.Group):
    """A group whose commands are imported on first use (pattern from click's documentation)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = imported(COMMANDS[name])
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error that a user can cause becomes one line on stderr and an exit status."""
        try:
            with ending():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
            raise  # click's own way out
        except (ValueError, RuntimeError, OSError) as problem:
            if ctx.params["debug"]:
                raise
            click.echo(f"error: {problem}", err=True)
            sys.exit(1)
        except Exception as problem:
            if ctx.params["debug"]:
                raise
            if isinstance(problem, ModuleNotFoundError) and problem.name in INSTALLS:
                needs = f"{ctx.invoked_subcommand} needs {problem.name}"
                click.echo(f"error: {needs}; run: {INSTALLS[problem.name]}", err=True)
                sys.exit(1)
            what = f"{type(problem).__name__}: {problem}".replace("\n", " ")
            click.echo(f"error: unexpected {what}; run again with --debug and report it.", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            leave(130, "\ninterrupted")
        except Ended as asked:
            leave(128 + asked.number, ENDS[signal.Signals(asked.number).name])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-mtp")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Gemma 4 with multi-token prediction: convert a pair to GGUF, run it, measure it.

    \b
    Examples:
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out -q Q4_K_M
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Why is the sky blue?" --chat
      gemma-mtp ollama create gemma-4-e2b out
    """


class DraftLengthType(click.ParamType):
    """A count of tokens, or "auto"."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return checked_length(value if value == "auto" else int(value))
        except ValueError:
            self.fail(f"{value!r} is not {LENGTHS}", param, ctx)


def loading_options(command: Any) -> Any:
    """Options that decide how a pair is loaded, as arguments of `Llama`."""

    @functools.wraps(command)
    def loaded(*arguments: Any, n_threads: int | None, **others: Any) -> Any:
        from gemma_mtp.runtime.bench.measure.machine import physical_cores

        # A pass over a draft is a batch to llama.cpp: -t is for both, as in its own tools; so is their default.
        threads = n_threads or physical_cores()
        return command(*arguments, n_threads=threads, n_threads_batch=threads, **others)

    for option in (
        click.option("--drafter", metavar="FILE", help="Drafter to use instead of the linked one beside the target."),
        click.option("--draft", "draft_length", type=DraftLengthType(), default="auto", show_default=True,
                     help="Tokens to draft in a round; auto goes by cost and acceptance."),
        click.option("-c", "--ctx", "n_ctx", type=click.IntRange(1), default=4096, show_default=True,
                     help="Context length in tokens."),
        click.option("-t", "--threads", "n_threads", type=click.IntRange(1),
                     help="CPU threads. [default: one for each core]"),
        click.option("-ngl", "--gpu-layers", "n_gpu_layers", type=int, default=-1, show_default=True,
                     help="Layers on the GPU, -1 for all."),
        click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
    ):  # fmt: skip
        loaded = option(loaded)
    return loaded


def sampling_options(command: Any) -> Any:
    """Options that decide how tokens are chosen."""
    for option in (
        click.option("--no-mtp", is_flag=True, help="Generate without the drafter."),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Same seed, same text. [default: random]"),
        click.option("--min-p", type=float, default=0.0, show_default=True,
                     help="Drop tokens below this share of the best."),
        click.option("--top-p", type=float, default=0.95, show_default=True, help="Keep this much probability."),
        click.option("--top-k", type=int, default=64, show_default=True,
                     help="Keep the k most likely tokens, 0 for all."),
        click.option("--temp", type=click.FloatRange(0), default=1.0, show_default=True,
                     help="Temperature, 0 for greedy."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("target", metavar="TARGET.gguf")
@click.option("-p", "--prompt", required=True, help="Text to continue; with --chat, the user's message.")
@click.option("--chat", is_flag=True, help="Ask through the chat template of the model.")
@click.option("-n", "max_tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens to generate.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print text and statistics as one JSON object instead.")
@click.option("--stats", is_flag=True, help="Print what drafting brought, instead of one line.")
@loading_options
def run(
    target: str,
    prompt: str,
    chat: bool,
    max_tokens: int,
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    no_mtp: bool,
    as_json: bool,
    stats: bool,
    drafter: str | None,
    **loading: Any,
) -> None:
    """Generate text with a target and its linked drafter.

    The text goes to stdout as it is made, one line of statistics to stderr at the end.

    \b
    Examples:
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "The three laws of thermodynamics are"
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf --chat -p "Why is the sky blue?" -n 400 --seed 7
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Once" --temp 0 --draft 4
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Once" --no-mtp
    """
    from gemma_mtp.runtime.llama import Llama

    with closing(Llama(target, drafter=None if no_mtp else drafter or "auto", **loading)) as llm:
        if llm.drafter is None and not no_mtp:
            click.echo(f"no linked drafter beside {target}: generating without MTP", err=True)
        settings: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": temp,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "stream": True,
        }
        if chat:
            chunks = llm.create_chat_completion([{"role": "user", "content": prompt}], **settings)
            pieces = (chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        else:
            pieces = (chunk["choices"][0]["text"] for chunk in llm.create_completion(prompt, **settings))
        text = ""
        for piece in pieces:
            text += piece
            if not as_json:
                click.echo(piece, nl=False)
        if as_json:
            click.echo(json.dumps({"text": text, "stats": llm.stats.as_dict()}))
        else:
            click.echo()
        click.echo(llm.stats.report() if stats else llm.stats.line(), err=True)
