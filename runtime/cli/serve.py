"""The command `gemma-mtp serve`: llama-server with a pair, started, waited for, told of, ended."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from gemma_mtp.patches.ui import built_ui
from gemma_mtp.runtime.cli.options import DraftLengthType
from gemma_mtp.runtime.request import MOST, DraftLength

# What a browser is shown where llama.cpp's page was not built.
PAGE = Path(__file__).parents[1] / "page"
# Settings of llama.cpp's page at a first visit. Where a model hears, it shows a microphone in place of the button to
# send, even when something was written: its ChatForm does not tell ChatFormActions of that (b11312).
PAGE_SETTINGS = {"autoMicOnEmpty": False}
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command()
@click.argument("target")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAG...]")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="LLAMA_ARG_HOST",
    help="Address to listen at; one that other machines reach needs an API key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    envvar="LLAMA_ARG_PORT",
    help="Port to listen at, 0 for a free one.",
)
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    type=click.IntRange(0),
    envvar="LLAMA_ARG_CTX_SIZE",
    help="Context in tokens, 0 for all that the model was trained for. [default: 16384 at most]",
)
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(1),
    help="Requests at once, which then share the context in equal parts. [default: 4 in one context]",
)
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads. [default: one for each core]")
@click.option(
    "-ngl", "--gpu-layers", metavar="N|auto|all", help="Layers on GPUs and machines. [default: as many as fit]"
)
@click.option(
    "--rpc",
    metavar="HOST:PORT,...",
    envvar="LLAMA_ARG_RPC",
    help="Machines where gemma-mtp rpc-server runs, to put layers on.",
)
@click.option("--flash-attn", type=click.Choice(["on", "off", "auto"]), help="Flash attention. [default: auto]")
@click.option(
    "--drafter",
    metavar="FILE",
    envvar="LLAMA_ARG_SPEC_DRAFT_MODEL",
    help="Drafter to use instead of the linked one beside the target.",
)
@click.option(
    "--draft",
    "draft_length",
    type=DraftLengthType(),
    default="auto",
    show_default=True,
    envvar="LLAMA_ARG_SPEC_DRAFT_N_MAX",
    help="Tokens to draft in a round; auto goes by cost and acceptance.",
)
@click.option("--no-mtp", is_flag=True, help="Generate without the drafter.")
@click.option(
    "--mmproj",
    type=FILE,
    envvar="LLAMA_ARG_MMPROJ",
    help="Projector for images and sound, instead of the one beside the target.",
)
@click.option("--no-mmproj", is_flag=True, help="Text only.")
@click.option("--think", is_flag=True, help="Let the model think before it answers, unless a request says otherwise.")
@click.option("--alias", envvar="LLAMA_ARG_ALIAS", help="Name of the model. [default: what the file calls itself]")
@click.option(
    "--api-key",
    envvar=["GEMMA_MTP_API_KEY", "LLAMA_API_KEY"],
    help="Key that clients must send, or several between commas. [env: GEMMA_MTP_API_KEY]",
)
@click.option("--api-key-file", type=FILE, envvar="LLAMA_ARG_API_KEY_FILE", help="File with such keys, one a line.")
@click.option(
    "--cors",
    default="localhost",
    show_default=True,
    envvar="LLAMA_ARG_CORS_ORIGINS",
    help="Web pages that may use it: localhost, origins (https://chat.example.org) between commas, or * for all.",
)
@click.option("--metrics", is_flag=True, help="Serve /metrics for Prometheus.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama-server's log.")
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False), help="File to keep llama-server's log in.")
@click.option("--json", "as_json", is_flag=True, help="When it is ready, print one JSON object instead.")
def serve(
    target: str, rest: tuple[str, ...], host: str, port: int, draft_length: DraftLength, drafter: str | None,
    no_mtp: bool, mmproj: Path | None, no_mmproj: bool, alias: str | None, api_key: str | None,
    api_key_file: Path | None, rpc: str | None, verbose: bool, log: Path | None, as_json: bool, **others: Any,
) -> None:  # fmt: skip
    """Serve a pair over HTTP with llama-server: OpenAI's API, and llama.cpp's.

    TARGET is a GGUF file, the folder that a conversion wrote, or the name of a model of Ollama. Its linked drafter and
    its projector are found by themselves. What stands behind -- goes to llama-server as it is, and it obeys its own
    variables LLAMA_ARG_* where no option says otherwise. It runs until Ctrl-C or SIGTERM. docs/server.md says more.

    \b
    Examples:
      gemma-mtp serve out
      gemma-mtp serve out/gemma-4-E2B-it-Q4_K_M.gguf -c 32768 --port 8080
      gemma-mtp serve gemma4:e4b
      gemma-mtp serve out --host 0.0.0.0 --api-key-file keys.txt
      gemma-mtp serve out --rpc 192.168.1.2:50052,192.168.1.3:50052
      gemma-mtp serve out -- --slot-save-path slots --threads-http 4
    """
    from gemma_mtp.runtime import programs, server, serving
    from gemma_mtp.runtime import rpc as machines

    if rest and not rest[0].startswith("-"):
        raise click.UsageError(f"unexpected argument {rest[0]!r}; llama-server's flags stand behind --.")
    serving.check_flags(rest)
    serving.check_keys(host, api_key, api_key_file)
    lenders = machines.addresses(rpc) if rpc else []
    wanted = None if no_mtp or draft_length == 0 else drafter or "auto"
    program = str(programs.program("llama-server"))
    served = serving.served(target, wanted, mmproj, not no_mmproj, alias)
    for address in host.split(","):
        port = programs.free_port(address, port)
    machines.check(lenders)
    flags = ["--host", host, "--port", str(port), *_given(others, served.context(others.pop("n_ctx")), api_key_file)]
    flags += ["--rpc", ",".join(lenders)] if lenders else []
    command = [program, *served.flags(draft_length, os.environ), *flags, *rest]
    with ExitStack() as stack:
        ready = threading.Event()
        shown = _shown(ready, verbose, stack.enter_context(log.open("w") if log else nullcontext()))
        variables = serving.environment(api_key) | (machines.QUIET if lenders else {})
        stack.enter_context(machines.explaining(lenders))
        running = stack.enter_context(server.Server(command, shown, variables))
        stack.callback(ready.clear)  # what fails because it is ended is no error
        stack.enter_context(_interrupted(programs.GRACE))
        said = running.wait(_progress(served.header.path.name))
        ready.set()
        click.echo("\r\033[K" if sys.stderr.isatty() else "", err=True, nl=False)
        for line in [] if verbose else running.errors():
            click.echo(line.whole, err=True)
        url = _url(host, port, rest)
        facts = {
            "base_url": f"{url}/v1", "model": said["id"], "context": said["meta"]["n_ctx"], "pid": running.pid,
            "target": str(served.header.path), "drafter": served.drafter and str(served.drafter), "draft": draft_length,
            "undrafted": served.undrafted, "projector": served.projector and str(served.projector),
            "page": f"{url}/" if built_ui() else None, "placed": running.placed,
        }  # fmt: skip
        click.echo(json.dumps(facts) if as_json else _told(facts, _bearer(api_key, api_key_file)))
        sys.stdout.flush()
        running.join()


@contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    """Says at the first Ctrl-C what is going on, and what another one does."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nending, in {seconds:g} seconds at most; Ctrl-C again ends it at once", err=True)
        raise


def _given(options: Mapping[str, Any], context: int, keys: Path | None) -> list[str]:
    """Flags of llama-server for the options that only hand something on."""
    names = {"parallel": "-np", "threads": "-t", "flash_attn": "-fa"}
    flags = [part for name, flag in names.items() if options[name] is not None for part in (flag, str(options[name]))]
    if options["gpu_layers"] is not None:
        layers = "all" if options["gpu_layers"] == "-1" else options["gpu_layers"]
        flags += ["-ngl", layers, "--spec-draft-ngl", layers]
    if options["think"] or "LLAMA_ARG_REASONING" not in os.environ:
        flags += ["--reasoning", "on" if options["think"] else "off"]
    if not {"LLAMA_ARG_UI_CONFIG", "LLAMA_ARG_UI_CONFIG_FILE"} & set(os.environ):
        flags += ["--ui-config", json.dumps(PAGE_SETTINGS)]
    flags += ["-c", str(context), "--cors-origins", options["cors"], "--path", str(built_ui() or PAGE)]
    return [*flags, *(["--metrics"] if options["metrics"] else []), *(["--api-key-file", str(keys)] if keys else [])]


def _shown(ready: threading.Event, verbose: bool, log: Any) -> Callable[[Any], None]:
    """What becomes of the lines of llama-server's log: all to a file; to the terminal all, or errors once it is ready.

    Of those before it tells itself, or says why it ended.
    """

    from gemma_mtp.runtime import rpc

    def show(line: Any) -> None:
        if log is not None:
            log.write(line.whole + "\n")
            log.flush()
        if verbose or (ready.is_set() and line.wrong and not rpc.CUT.search(line.whole)):
            click.echo(line.whole, err=True)

    return show


def _progress(name: str) -> Callable[[str, float], None]:
    """Shows how much is loaded: a line that changes on a terminal, one line elsewhere."""
    parts = {"text_model": name, "spec_model": "the drafter", "mmproj_model": "the projector"}
    if not sys.stderr.isatty():
        click.echo(f"loading {name}", err=True)

    def step(part: str, share: float) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\033[Kloading {parts.get(part, part)}: {share:.0%}", err=True, nl=False)

    return step


def _url(host: str, port: int, rest: Sequence[str]) -> str:
    """Where a client on this machine finds it."""
    first = host.split(",")[0]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(first, first)
    prefix = dict(pairwise(rest)).get("--api-prefix", os.environ.get("LLAMA_ARG_API_PREFIX", ""))
    return f"http://[{near}]:{port}{prefix}" if ":" in near else f"http://{near}:{port}{prefix}"


def _bearer(keys: str | None, file: Path | None) -> str:
    """What curl needs where a key is wanted, without the key."""
    if file is not None:
        return f""" -H "Authorization: Bearer $(grep -v '^#' '{file}' | head -n 1)\""""
    return "" if keys is None else ' -H "Authorization: Bearer $GEMMA_MTP_API_KEY"'


def _told(facts: Mapping[str, Any], bearer: str) -> str:
    """What is said when it is ready."""
    tokens = f"as far as it pays, up to {MOST} tokens" if facts["draft"] == "auto" else f"up to {facts['draft']} tokens"
    drafts = f"{tokens} a round by {facts['drafter']}"
    placed = "; ".join(f"{what}: {where}" for what, where in facts["placed"].items())
    rows = {
        "serving": f"{facts['model']} at {facts['base_url']}, {facts['context']} tokens of context",
        **({"devices": placed} if placed else {}),
        "drafts": drafts if facts["drafter"] else f"none: {facts['undrafted'] or 'turned off'}",
        "images": facts["projector"] or "no projector",
        "page": facts["page"] or "none to chat in; gemma-mtp build --ui makes it (needs Node)",
        "try": f"curl {facts['base_url']}/chat/completions -H 'Content-Type: application/json'{bearer} "
        """-d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'""",
    }
    return "\n".join(f"{name:8} {text}" for name, text in rows.items())
