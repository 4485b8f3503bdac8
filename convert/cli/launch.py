"""The command `gemma-mtp launch`: the same two checkpoints, with MTP, on an engine made for more than one machine."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path

import click
from gemma_mtp.convert import launch as launching
from gemma_mtp.convert.engines import ENGINES, Engine, Job, Reported
from gemma_mtp.convert.errors import MtpError


@click.command()
@click.argument("engine", type=click.Choice(list(ENGINES)))
@click.argument("target")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[DRAFTER|auto] [-- FLAG...]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that the engine listens at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Its port.")
@click.option("--draft-length", type=click.IntRange(1), help="Tokens to draft in a round. [default: 2 for E2B, else 4]")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=1800, show_default=True,
              help="Seconds to wait until it answers; its own downloads count.")  # fmt: skip
@click.option("--every", type=click.FloatRange(0), default=60, show_default=True,
              help="Seconds between two reports of the acceptance, 0 for the one at the end alone.")  # fmt: skip
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False),
              help="File for the engine's output. [default: a temporary one, kept if the engine fails]")  # fmt: skip
@click.option("--print", "only_print", is_flag=True, help="Check the pair and print the command; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print each report as one JSON object a line.")
def launch(
    engine: str, target: str, rest: tuple[str, ...], host: str, port: int, draft_length: int | None, timeout: float,
    every: float, log: Path | None, only_print: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve a pair with vLLM or SGLang, MTP on.

    TARGET and DRAFTER are what convert takes: Hugging Face folders, or repositories, org/name[@revision]. They are
    checked as for a conversion before the engine starts. It runs until Ctrl-C or SIGTERM. What stands behind -- goes to
    the engine as it is. docs/scale.md says when to use which.

    \b
    Examples:
      gemma-mtp launch vllm google/gemma-4-31B-it auto -- --tensor-parallel-size 2 --max-model-len 32768
      gemma-mtp launch sglang gemma-4-12B-it gemma-4-12B-it-assistant --port 30000 --draft-length 5
      gemma-mtp launch vllm google/gemma-4-E4B-it --print
      gemma-mtp launch vllm google/gemma-4-26B-A4B-it --host 0.0.0.0 -- --quantization fp8 --api-key secret
    """
    chosen = ENGINES[engine]
    drafter, flags = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("auto", rest)
    if flags and not flags[0].startswith("-"):
        raise click.UsageError(f"unexpected argument {flags[0]!r}; the engine's flags stand behind --.")
    launching.check_flags(chosen, flags)
    checked = launching.checked(target, drafter)
    job = launching.job(checked, host, port, draft_length)
    command = [*chosen.command(job), *flags]
    if only_print:
        click.echo(shlex.join(command))
        return
    command[0] = launching.program(chosen, checked.unified)
    launching.check_port(host, port)
    _serve(chosen, job, command, launching.key_of(chosen, flags), timeout, every, log, as_json)


def _serve(
    engine: Engine, job: Job, command: list[str], key: str | None, timeout: float, every: float, log: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Start an engine, say where it is, and stay until it ends or is to end."""
    api = launching.EngineApi(job.host, job.port, key)
    with launching.log_file(engine.name, log) as path:
        click.echo(f"starting {engine.name}; its log: {path}", err=True)
        with launching.running(command, path) as process:
            model = launching.wait(process, api, engine, path, timeout)
            ask = partial(engine.acceptance, api.get, job.length)
            with launching.reporting(process, ask, partial(_tell, as_json)) as report:
                if as_json:
                    click.echo(json.dumps({"base_url": f"{api.url}/v1", "model": model, "draft_length": job.length}))
                else:
                    click.echo(f"{api.url}/v1  model {model}, drafting {job.length}")
                launching.watch(process, report, every)
            if process.returncode:
                raise launching.died(process, engine, path)
            raise MtpError(f"{engine.name} ended by itself; its log: {path}")


def _tell(as_json: bool, found: Reported) -> None:
    if as_json:
        said = {"tokens_per_pass": found.per_pass, "acceptance": found.rate, "acceptance_by_position": found.positions}
        click.echo(json.dumps(said))
    else:
        click.echo(f"acceptance: {found}")
