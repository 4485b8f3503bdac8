"""The commands `gemma-mtp ollama serve` and `gemma-mtp ollama engine ...`: Ollama on our llama-server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gemma_mtp.convert.ollama.dispatch import Status
    from gemma_mtp.convert.ollama.installation import Installation

named = click.option("--ollama", "named", type=click.Path(path_type=Path), metavar="PATH",
                     help="Ollama's program, or the folder whose bin has it. [default: that on the PATH]")  # fmt: skip


@click.command()
@named
@click.option("-d", "--detach", is_flag=True, help="Go on in the background; the log goes to the cache folder.")
@click.option("--stop", is_flag=True, help="End the one that was started here.")
@click.option("--status", is_flag=True, help="Say whether one runs, and where.")
def serve(named: Path | None, detach: bool, stop: bool, status: bool) -> None:
    """Serve your models with your own Ollama, on gemma-mtp's llama-server.

    The installation is left alone: its program is linked into the cache folder beside our engine, and runs from there
    with your settings and your models, on the CPU. It listens where OLLAMA_HOST says; without it at Ollama's usual
    port, or at the next one that is free.

    \b
    Examples:
      gemma-mtp ollama serve                  # until Ctrl-C
      gemma-mtp ollama serve -d && ollama run gemma4:e4b
      gemma-mtp ollama serve --stop
      OLLAMA_HOST=127.0.0.1:12000 gemma-mtp ollama serve -d --ollama ~/ollama-new
    """
    from gemma_mtp.convert.ollama import shadow
    from gemma_mtp.convert.ollama.installation import check_system, installation, our_engine

    check_system("ollama serve", "linux", "darwin")
    if stop or status:
        served = shadow.running()
        if served is None:
            click.echo("none runs that gemma-mtp ollama serve has started")
        elif stop:
            shadow.stop(served)
            click.echo(f"ended the one at {served.url}")
        else:
            click.echo(f"{served}; process {served.pid}, log: {served.log or 'where it was started'}")
        return
    found, ours = installation(named), our_engine()
    wanted = shadow.plan()
    prefix = shadow.shadow(found, ours)
    for note in wanted.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"starting {found.program} on gemma-mtp's llama-server ...", err=True)
    log = shadow.folder() / "serve.log" if detach else None
    with shadow.started(prefix, found, ours, wanted, log) as (served, process):
        click.echo(str(served))
        if detach:
            click.echo(f"its log: {log}; gemma-mtp ollama serve --stop ends it", err=True)
            return
        code = process.wait()
        raise SystemExit(code if code >= 0 else 128 - code)


@click.group()
def engine() -> None:
    """Gemma-mtp's llama-server in an installed Ollama, in front of its own.

    What it runs: a Gemma 4 model with its drafter, on the CPU. All else goes to Ollama's own llama-server, as do
    requests that ours cannot run; so does everything after an update of Ollama, until you install it again.
    """


@engine.command()
@named
def install(named: Path | None) -> None:
    """Put it in front of Ollama's own.

    That is renamed beside it and stays as it is; our files are copied into Ollama's folder (lib/ollama/gemma-mtp), so
    that its service can read them. Ollama need not be started anew; models that are loaded stay on their engine.

    \b
    Examples:
      gemma-mtp ollama engine install
      sudo $(command -v gemma-mtp) ollama engine install      # for an Ollama of the system
      gemma-mtp ollama engine install --ollama ~/ollama
    """
    from gemma_mtp.convert.ollama import dispatch
    from gemma_mtp.convert.ollama.installation import our_engine

    found = _installation(named)
    _show(found, dispatch.install(found, our_engine()))


@engine.command()
@named
def remove(named: Path | None) -> None:
    """Put Ollama's own back as it was.

    \b
    Example:
      gemma-mtp ollama engine remove
    """
    from gemma_mtp.convert.ollama import dispatch

    found = _installation(named)
    _show(found, dispatch.remove(found))


@engine.command("status")
@named
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def status_command(named: Path | None, as_json: bool) -> None:
    """Say which engine an installed Ollama has.

    Ollama's own is started with a tiny model as well: on some processors it ends with an illegal instruction.

    \b
    Example:
      gemma-mtp ollama engine status
    """
    from gemma_mtp.convert.ollama import dispatch
    from gemma_mtp.convert.ollama.probe import fault

    found = _installation(named)
    state = dispatch.status(found)
    problem = fault(state.original)
    if as_json:
        told = {
            "program": str(found.program),
            "installed": state.installed,
            "current": dispatch.is_current(state),
            "engine": None if state.engine is None else str(state.engine.folder),
            "original": str(state.original),
            "original_fault": problem,
            "left": [str(path) for path in state.left],
        }
        click.echo(json.dumps(told))
        return
    _show(found, state)
    click.echo(f"Ollama's own  {problem or 'starts on this CPU'}")


def _installation(named: Path | None) -> Installation:
    from gemma_mtp.convert.ollama.installation import check_system, installation

    check_system("ollama engine", "linux")
    return installation(named)


def _show(found: Installation, state: Status) -> None:
    """An installation and its engine, and what to do, a line each."""
    from gemma_mtp.convert.ollama.dispatch import about

    click.echo(f"Ollama        {found.program}")
    click.echo(f"engine        {about(found, state)}")
