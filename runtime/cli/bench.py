"""The command `gemma-mtp bench`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from gemma_mtp.convert import link
from gemma_mtp.convert.sizes import SIZES
from gemma_mtp.runtime.bench.settings import PROMPTS, WARM_TOKENS, Chance, Settings
from gemma_mtp.runtime.pair import named, searched
from gemma_mtp.runtime.request import checked_length

DEFAULT_ACCEPTANCE = "0.35,0.6,0.8,0.95"
OLLAMA_DRAFTS = 4  # in a round, where the model says nothing else


class Listed(click.ParamType):
    """Values with commas between them.

    Args:
        kind: makes one of its text, or raises a ValueError.
    """

    name = "list"

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self.kind(part) for part in value.split(",")))
        except ValueError as problem:
            self.fail(f"{value!r} is not a list of numbers with commas between them: {problem}", param, ctx)


def fixed_length(text: str) -> int:
    """A number of tokens to draft, 1 at least."""
    checked_length(length := int(text))
    if not length:
        raise ValueError("0 drafts none, and plain generation is measured anyway.")
    return length


def prompt_length(text: str) -> int:
    """A length of a prompt, in tokens."""
    if (length := int(text)) < 1:
        raise ValueError("a prompt has 1 token at least.")
    return length


class Against(click.ParamType):
    """Another build of llama.cpp by name, a llama-server by its path, or Ollama."""

    name = "build"
    builds = "stock", "patched-server", "portable"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.builds or value.partition(":")[0] == "ollama":
            return value
        if not (path := Path(value).absolute()).is_file():
            wanted = f"{', '.join(self.builds)}, ollama, ollama:MODEL, the path of a llama-server"
            self.fail(f"{value!r} is none of {wanted}", param, ctx)
        if not os.access(path, os.X_OK):
            self.fail(f"{value} may not be run; chmod +x {value}", param, ctx)
        return str(path)


@click.command()
@click.argument("pair", required=False)
@click.option("--shape", type=click.Choice(list(SIZES)), help="Measure random weights of this shape instead of a pair.")
@click.option("-q", "--quant", default="Q4_0", show_default=True, help="With --shape: format of the target.")
@click.option("--drafter-quant", default="Q4_0", show_default=True, help="With --shape: format of the drafter.")
@click.option("--drafter-head", metavar="TYPE", help="With --shape: type of the drafter's output matrix.")
@click.option("--layers", type=click.IntRange(1), help="With --shape: a target of fewer layers.")
@click.option("--drafter", type=click.Path(path_type=Path), help="Drafter to use instead of the linked one.")
@click.option(
    "--acceptance",
    type=Listed(Chance.parse),
    metavar="P,P,...",
    help="Replay a recorded continuation as the drafts, right with this chance per token; 0.1/0.9:64 for chances that "
    f"take turns of 64 tokens. [default with --shape: {DEFAULT_ACCEPTANCE}]",
)
@click.option(
    "--draft",
    type=Listed(fixed_length),
    metavar="N,N,...",
    help='Fixed draft lengths to set beside "auto"; of several the best is reported. [default: best by measured costs]',
)
@click.option(
    "--warm-tokens",
    type=click.IntRange(0),
    default=WARM_TOKENS,
    show_default=True,
    help='Tokens that teach the draft length "auto" before it is measured.',
)
@click.option(
    "--against",
    multiple=True,
    type=Against(),
    metavar="BUILD",
    help="Measure another build on the same files as well: stock, patched-server, portable; the path of any "
    "llama-server; or ollama: the pair through Ollama's API, on its engine and on ours; ollama:MODEL, a model of its "
    "store. May be given more than once.",
)
@click.option(
    "--prompt",
    type=Listed(prompt_length),
    default=(),
    metavar="N,N,...",
    help="Read prompts of so many tokens: tokens per second, and time to the first token.",
)
@click.option("--passes", is_flag=True, help="Stop after target passes and draft rounds.")
@click.option(
    "--ctx-filled",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Tokens in the context when passes are measured.",
)
@click.option("-n", "tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens per run.")
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Visits, of which the median counts."
)
@click.option("--prompts", type=click.File(), help="Text file, prompts separated by blank lines. [default: three]")
@click.option(
    "--temp",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Temperature, 0 for greedy; of the drafter's own drafts.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=0,
    show_default=True,
    help="Of random weights, prompts, noise and acceptance.",
)
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads. [default: one for each core]")
@click.option("-ngl", "--gpu-layers", type=int, default=-1, show_default=True, help="Layers on the GPU, -1 for all.")
@click.option("--flash-attn/--no-flash-attn", default=True, show_default=True, help="Whether to use flash attention.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png", help="Draw the result.")
@click.pass_obj
def bench(
    lent: Any,
    /,
    pair: str | None,
    shape: str | None,
    quant: str,
    drafter_quant: str,
    drafter_head: str | None,
    layers: int | None,
    drafter: Path | None,
    acceptance: tuple[Chance, ...] | None,
    draft: tuple[int, ...] | None,
    prompts: Any,
    threads: int | None,
    against: tuple[str, ...],
    plot: Path | None,
    **rest: Any,
) -> None:
    """Measure target passes, draft rounds and tokens per second; the last line on stdout is one JSON object.

    PAIR is a target with a linked drafter, the folder that convert wrote, or a model of Ollama. With --shape a pair
    with random weights of that shape is made and kept in the cache folder.

    \b
    Examples:
      gemma-mtp bench out
      gemma-mtp bench gemma4:e4b
      gemma-mtp bench out/gemma-4-E2B-it-Q4_K_M.gguf --prompts mine.txt -n 256 --draft 2,3,4
      gemma-mtp bench --shape E2B -q Q4_K_M --ctx-filled 2048 -t 2
      gemma-mtp bench --shape E2B --acceptance 0,0.35,0.95,0.1/0.9:64 --draft 1,2,3,4,6,8
      gemma-mtp bench --shape E2B --against portable --passes --repeat 5
      gemma-mtp bench --shape E2B --prompt 512,4096 --against /opt/llama.cpp/llama-server --passes
      gemma-mtp bench --shape E2B --against stock --plot e2b.png
      gemma-mtp bench --shape E2B --against ollama --acceptance 0,0.35,0.6,0.8,0.95 -n 256
    """  # fmt: skip
    if (pair is None) == (shape is None):
        raise click.UsageError("name a PAIR, or give --shape for random weights.")
    if plot is not None:
        _check_plot(plot, rest["passes"])
    from gemma_mtp.runtime.bench import report
    from gemma_mtp.runtime.bench.machine import physical_cores
    from gemma_mtp.runtime.bench.measure import measure
    from rich.console import Console

    with _progress() as step:
        if shape is not None:
            target, found = _random(
                lent.random_pair, shape, rest["seed"], step,
                quant=quant, drafter_quant=drafter_quant, drafter_head=drafter_head, layers=layers,
            )  # fmt: skip
        else:
            assert pair is not None
            target, found = _pair(pair, drafter)
        if acceptance is None:
            acceptance = tuple(map(Chance.parse, DEFAULT_ACCEPTANCE.split(","))) if shape else ()
        texts = [text for text in prompts.read().split("\n\n") if text.strip()] if prompts else PROMPTS
        builds = tuple(name for name in dict.fromkeys(against) if name.partition(":")[0] != "ollama")
        settings = Settings(
            target, found, acceptance=acceptance, own=shape is None, draft=draft or (), prompts=tuple(texts),
            threads=threads or physical_cores(), against=builds, **rest,
        )  # fmt: skip
        result = measure(settings, step)
        if not settings.passes:
            result |= _through_ollama(lent, settings, sorted(set(against) - set(builds)), step)
    report.show(result, Console(highlight=False))
    if plot is not None:
        report.plot(result, plot)
        click.echo(f"wrote {plot}", err=True)
    click.echo(json.dumps(result))


def _check_plot(plot: Path, passes: bool) -> None:
    """What would stop the picture, before anything is measured.

    Raises:
        click.ClickException: saying what.
    """
    if passes:
        raise click.UsageError("--plot draws speed-up, which --passes leaves out; give one of them.")
    if find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib; run: pip install 'gemma-mtp[plot]'")
    if not plot.absolute().parent.is_dir():
        raise click.ClickException(f"--plot {plot}: there is no folder {plot.absolute().parent}; make it first.")


def _through_ollama(lent: Any, settings: Settings, named: Sequence[str], step: Any) -> dict[str, Any]:
    """What Ollama makes of the pair, or of the models of its store that were named."""
    text = ("\n\n".join(settings.prompts) * settings.ctx_filled)[: settings.ctx_filled]
    found = {
        name: lent.through_ollama(
            step, target=settings.target, drafter=settings.drafter, prompt=text,
            chances=[chance.levels[0] for chance in settings.acceptance if not chance.switches],
            lengths=settings.draft or (OLLAMA_DRAFTS,), model=name.partition(":")[2], tokens=settings.tokens,
            n_ctx=settings.n_ctx, threads=settings.threads, temp=settings.temp, seed=settings.seed,
            repeat=settings.repeat,
        )
        for name in named
    }  # fmt: skip
    return {"ollama": found} if found else {}


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, told what is done, how far and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _random(generate: Any, shape: str, seed: int, step: Any, **formats: Any) -> tuple[Path, Path]:
    """A pair of a shape with random weights, from the cache folder or made now."""
    from gemma_mtp.patches import source

    def progress(done: int, total: int) -> None:
        step(f"making random weights of {shape}", done, total)

    made: tuple[Path, Path] = generate(shape, source.cache_dir() / "shapes", seed=seed, progress=progress, **formats)
    return made


def _pair(named_by: str, drafter: Path | None) -> tuple[Path, Path]:
    """Target and drafter, from a file, the folder that convert wrote, or the name of a model of Ollama.

    Raises:
        link.MtpError: there is no target, or more than one, or no drafter of it.
    """
    found, wanted = named(named_by, drafter or "auto")
    pair = Path(found)
    path, missing = searched(pair, wanted)
    if path is None:
        raise link.PairError(f"{missing}.")
    return pair, path
