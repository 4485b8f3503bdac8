"""The commands `gemma-mtp ollama ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from gemma_mtp.convert.cli.ollama_engine import engine, serve

if TYPE_CHECKING:
    from gemma_mtp.convert.ollama.api import Client
    from gemma_mtp.convert.ollama.doctor import Finding, Report
    from gemma_mtp.convert.ollama.store import Stored

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


@click.group()
def ollama() -> None:
    """Pairs in Ollama: make a model of one, give a pulled model a drafter, see what is wrong."""


ollama.add_command(serve)
ollama.add_command(engine)


def _api() -> Client:
    """Ollama, running and new enough."""
    from gemma_mtp.convert.ollama.api import Client

    api = Client()
    api.version()
    return api


@ollama.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.option("--projector", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="mmproj file of the target, where OUT is a file.")  # fmt: skip
@as_json
def create(name: str, out: Path, projector: Path | None, as_json: bool) -> None:
    """Make a model NAME of the pair in OUT.

    OUT is the folder that convert wrote, or the GGUF file of a target with its linked drafter beside it. The pair and
    the room in Ollama's store are checked first; at the end the model answers once. docs/ollama.md has more.

    \b
    Examples:
      gemma-mtp ollama create gemma-4-e2b out && ollama run gemma-4-e2b
      gemma-mtp ollama create gemma-4-e4b gemma-4-E4B-it-Q4_K_M.gguf --projector mmproj-gemma-4-E4B-it-F16.gguf
    """
    from gemma_mtp.convert.ollama import create as creating
    from gemma_mtp.convert.ollama.store import check_room

    with creating.ready(out, projector) as pair:
        creating.program()
        api = _api()
        click.echo(f"Ollama's store takes {check_room(api, pair.peak)}", err=True)
        model = creating.create(api, name, pair)
    _tell(api, model, as_json)


@ollama.command()
@click.argument("model")
@click.option("--drafter", metavar="FILE|SOURCE", help="GGUF file of the drafter, or its Hugging Face folder or "
              "org/name. [default: one of the store, or the one published for the size]")  # fmt: skip
@click.option("--as", "wanted", metavar="NAME", help="Name of the model with the drafter. [default: MODEL itself; what "
              "it was stays under MODEL-plain]")  # fmt: skip
@click.option("--drafter-quant", default="Q8_0", show_default=True, help="Format of a drafter that is converted.")
@as_json
def attach(model: str, drafter: str | None, wanted: str | None, drafter_quant: str, as_json: bool) -> None:
    """Give a model that is in Ollama a drafter, without copying its gigabytes.

    The drafter is checked first, or linked. Renderer, parser and drafts are set where they are missing or wrong, so
    this also mends a model that has its drafter. docs/ollama.md has more.

    \b
    Examples:
      gemma-mtp ollama attach gemma4:e4b
      gemma-mtp ollama attach gemma4:12b --drafter mtp-gemma-4-12B-it.gguf --as gemma4-mtp:12b
    """
    from gemma_mtp.convert.cli.show import progress_bar
    from gemma_mtp.convert.ollama import attach as attaching

    api = _api()
    with progress_bar("converting the drafter") as progress:
        found = attaching.attach(api, model, drafter, wanted, drafter_quant, progress)
    _tell(api, found, as_json)


@ollama.command()
@click.argument("model")
def detach(model: str) -> None:
    """Make a model what it was before a drafter was attached.

    Of one that was made together with its drafter, drafts are switched off.

    \b
    Example:
      gemma-mtp ollama detach gemma4:e4b
    """
    from gemma_mtp.convert.ollama import attach as attaching

    found = attaching.detach(_api(), model)
    now = "as it was, without a drafter"
    if found.drafter is not None:
        now = "drafts off; its drafter stays in it, and gemma-mtp ollama attach switches them on again"
    click.echo(f"{model}: {now}")


@ollama.command("list")
@as_json
def list_command(as_json: bool) -> None:
    """List the Gemma 4 models of Ollama, with their drafters.

    \b
    Example:
      gemma-mtp ollama list
    """
    from gemma_mtp.convert.ollama.doctor import examine, gemma4_models

    api = _api()
    reports = [examine(api, model.name, run=False) for model in gemma4_models(api)]
    if as_json:
        click.echo(json.dumps([_plain(report) for report in reports]))
        return
    if not reports:
        click.echo("no Gemma 4 model; get one with ollama pull gemma4, or make one with gemma-mtp ollama create")
        return
    width = max(len(report.model.name) for report in reports)
    for report in reports:
        click.echo(f"{report.model.name:<{width}}  {report.model.about}  {_state(report)}")


@ollama.command()
@click.argument("name", required=False)
@click.option("--no-run", is_flag=True, help="Do not have the model answer.")
@as_json
def doctor(name: str | None, no_run: bool, as_json: bool) -> None:
    """Say what is wrong with a model, or with all Gemma 4 models, and what mends it.

    A named model answers once, which loads it, and tells how fast it is and how many drafts are accepted.

    \b
    Examples:
      gemma-mtp ollama doctor
      gemma-mtp ollama doctor gemma4:e4b
    """
    from gemma_mtp.convert.ollama.api import Client
    from gemma_mtp.convert.ollama.doctor import examine, gemma4_models, host

    api = Client()
    version = api.version()
    machine = host(api)
    found = [name] if name else [model.name for model in gemma4_models(api)]
    reports = [examine(api, each, run=bool(name) and not no_run) for each in found]
    if as_json:
        told: dict[str, Any] = {"version": version, "url": api.url, "models": [_plain(report) for report in reports]}
        if machine is not None:
            told |= {"engine": machine.about, "problems": [finding.problem for finding in machine.findings]}
        click.echo(json.dumps(told))
        return
    click.echo(f"Ollama {version} at {api.url}")
    if machine is not None:
        click.echo(f"engine    {machine.about}")
        for finding in machine.findings:
            click.echo(f"problem   {_line(finding)}")
    for report in reports:
        _show(report)
    if not reports:
        click.echo("no Gemma 4 model; get one with ollama pull gemma4, or make one with gemma-mtp ollama create")


def _tell(api: Client, model: Stored, as_json: bool) -> None:
    """What the user has now: one line, and what is still wrong with it."""
    from gemma_mtp.convert.errors import MtpError
    from gemma_mtp.convert.ollama.doctor import examine

    report = examine(api, model.name, run=True)
    for finding in report.findings:
        click.echo(f"warning: {_line(finding)}", err=True)
    if report.trial is None:
        raise MtpError(f"{model.name} is there, and did not answer; see above.")
    click.echo(json.dumps(_plain(report)) if as_json else f"{model.name}: {report.trial}")


def _show(report: Report) -> None:
    """A model, its parts and what is wrong with it, a line each."""
    from gemma_mtp.convert.cli.show import counts_line, show_rows
    from gemma_mtp.convert.ollama.installation import whose

    rows = {"model": f"{report.model.name}  {report.model.about}"}
    types = report.types()
    for role, header in (("target", report.target), ("drafter", report.drafter)):
        if header is not None:
            rows[role] = f"{header.path.stat().st_size / 1e6:,.1f} MB  {counts_line(types[role])}"
    rows["renderer"] = report.model.renderer or "none"
    if report.trial is not None:
        rows["engine"] = whose(report.trial.engine) if report.trial.engine else "not to be seen from here"
    rows["state"] = str(report.trial or _state(report))
    show_rows(rows)
    for finding in report.findings:
        click.echo(f"problem   {_line(finding)}")


def _state(report: Report) -> str:
    if report.model.drafter is None:
        return "no drafter"
    state = f"drafts on, up to {report.model.drafts} a round" if report.model.drafts else "drafts off"
    return f"{state}; {len(report.findings)} to mend (gemma-mtp ollama doctor)" if report.findings else state


def _line(finding: Finding) -> str:
    return finding.problem.rstrip(".") + (f"; run: {finding.mend}" if finding.mend else "")


def _plain(report: Report) -> dict[str, Any]:
    """A report as plain values."""
    model, tried = report.model, report.trial
    return {
        "name": model.name,
        "about": model.about,
        "target": None if model.target is None else str(model.target),
        "drafter": None if model.drafter is None else str(model.drafter),
        "projectors": [str(path) for path in model.projectors],
        "renderer": model.renderer,
        "parser": model.parser,
        "parameters": dict(model.parameters),
        "drafts": model.drafts,
        "types": report.types(),
        "problems": [{"problem": each.problem, "mend": each.mend} for each in report.findings],
        "trial": None if tried is None else {
            "tokens_per_second": tried.rate, "drafting": tried.drafting, "acceptance": tried.acceptance,
            "engine": tried.engine,
        },
    }  # fmt: skip
