"""The command `gemma-mtp`: where its commands live, how it ends, and what an error looks like."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

# Where each command lives. They are imported when called for, and import what they work with when they run: converting
# does without libllama, generating without the packages of the extra "convert".
COMMANDS = {
    "convert": "gemma_mtp.convert.cli.convert:convert",
    "link": "gemma_mtp.convert.cli.link:link_command",
    "inspect": "gemma_mtp.convert.cli.inspect:inspect",
    "verify": "gemma_mtp.convert.cli.verify:verify_command",
    "modelfile": "gemma_mtp.convert.cli.modelfile:modelfile_command",
    "ollama": "gemma_mtp.convert.cli.ollama:ollama",
    "launch": "gemma_mtp.convert.cli.launch:launch",
    "run": "gemma_mtp.runtime.cli.run:run",
    "chat": "gemma_mtp.runtime.cli.chat:chat",
    "serve": "gemma_mtp.runtime.cli.serve:serve",
    "rpc-server": "gemma_mtp.runtime.cli.rpc_server:rpc_server",
    "bench": "gemma_mtp.runtime.cli.bench:bench",
    "build": "gemma_mtp.runtime.cli.build:build",
}
# What brings a package that is not there: generating needs nothing of the extra "convert", and llama_cpp is built here.
INSTALLS = dict.fromkeys(("gguf", "huggingface_hub", "jinja2", "rich", "yaml"), "pip install 'gemma-mtp[convert]'")
INSTALLS["llama_cpp"] = "gemma-mtp build"


def imported(where: str) -> Any:
    """An object named as "module:name", imported now."""
    module, attribute = where.split(":")
    return getattr(importlib.import_module(module), attribute)


class Lent:
    """What bench needs of `convert`, which `runtime` does not import; the context hands it on."""

    @staticmethod
    def random_pair(*arguments: Any, **options: Any) -> Any:
        """As `gemma_mtp.convert.random_pair.write_pair`."""
        return imported("gemma_mtp.convert.random_pair:write_pair")(*arguments, **options)

    @staticmethod
    def through_ollama(step: Any, **options: Any) -> Any:
        """As `gemma_mtp.convert.ollama.measure.measure`, given what a `Wanted` holds."""
        wanted = imported("gemma_mtp.convert.ollama.measure:Wanted")(**options)
        return imported("gemma_mtp.convert.ollama.measure:measure")(wanted, step)


# What asks a program to end, beside Ctrl-C, and what is said then. Windows has no SIGHUP.
SIGNALS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}


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
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        kept = {each: signal.signal(each, end) for each in numbers if signal.getsignal(each) is signal.SIG_DFL}
        sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = kept_hook
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_IGN if asked else handler)


@contextmanager
def telling() -> Iterator[None]:
    """Within the block what a conversion warns of is a line on stderr."""

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__name__ == "MtpWarning":
            click.echo(f"warning: {message}", err=True)
        else:
            kept(message, category, *where, **more)

    with warnings.catch_warnings():
        kept, warnings.showwarning = warnings.showwarning, shown
        yield


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
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files that its encoding does not have are escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with ending(), telling():
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
            leave(128 + asked.number, SIGNALS[signal.Signals(asked.number).name])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-mtp")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Gemma 4 with multi-token prediction: convert a pair to GGUF, run it, measure it.

    \b
    Examples:
      gemma-mtp convert gemma-4-E2B-it gemma-4-E2B-it-assistant -o out -q Q4_K_M
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Why is the sky blue?" --chat
      gemma-mtp ollama create gemma-4-e2b out
    """
    ctx.obj = Lent()
