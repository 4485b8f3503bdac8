"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from gemma_mtp.runtime.request import LENGTHS, SAMPLING, checked_length

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama
    from gemma_mtp.runtime.pair import Wanted


FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


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
    def loaded(
        *args: Any, n_threads: int | None, no_mtp: bool, drafter: str | None, mmproj: Path | None, **others: Any
    ) -> Any:
        from gemma_mtp.runtime.bench.machine import physical_cores

        # A pass over a draft is a batch to llama.cpp: -t is for both, as in its own tools; so is their default.
        threads = n_threads or physical_cores()
        wanted = None if no_mtp else drafter or "auto"
        others |= {"n_threads": threads, "n_threads_batch": threads}
        return command(*args, drafter=wanted, mmproj=mmproj or "auto", **others)

    for option in (
        click.option("--drafter", metavar="FILE", help="Drafter to use instead of the linked one beside the target."),
        click.option("--mmproj", type=FILE, metavar="FILE",
                     help="Projector for images and sound, instead of the one beside the target."),
        click.option("--draft", "draft_length", type=DraftLengthType(), default="auto", show_default=True,
                     help="Tokens to draft in a round; auto goes by cost and acceptance."),
        click.option("-c", "--ctx", "n_ctx", type=click.IntRange(1), default=4096, show_default=True,
                     help="Context length in tokens."),
        click.option("-t", "--threads", "n_threads", type=click.IntRange(1),
                     help="CPU threads. [default: one for each core]"),
        click.option("-ngl", "--gpu-layers", "n_gpu_layers", type=int, default=-1, show_default=True,
                     help="Layers on GPUs and other machines, -1 for all."),
        click.option("--rpc", "rpc_servers", metavar="HOST:PORT,...",
                     help="Machines where gemma-mtp rpc-server runs, to put layers on."),
        click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
        click.option("--no-mtp", is_flag=True, help="Generate without the drafter."),
    ):  # fmt: skip
        loaded = option(loaded)
    return loaded


def media_options(command: Any) -> Any:
    """Options for files that a question is about, as `images` and `sounds`."""
    for option in (
        click.option("--audio", "sounds", type=FILE, multiple=True, metavar="FILE",
                     help="Sound that it is about (WAV, MP3, FLAC); may be repeated."),
        click.option("--image", "images", type=FILE, multiple=True, metavar="FILE",
                     help="Image that it is about (PNG, JPEG, BMP, GIF); may be repeated."),
    ):  # fmt: skip
        command = option(command)
    return command


def sampling_options(command: Any) -> Any:
    """Options that decide how tokens are chosen, as `sampling`, arguments of a completion."""

    @functools.wraps(command)
    def sampled(
        *args: Any, temp: float, top_k: int, top_p: float, min_p: float, seed: int | None, **others: Any
    ) -> Any:
        sampling = {"temperature": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        return command(*args, sampling=sampling, **others)

    for option in (
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Same seed, same text. [default: random]"),
        click.option("--min-p", type=float, default=SAMPLING["min_p"], show_default=True,
                     help="Drop tokens below this share of the best."),
        click.option("--top-p", type=float, default=SAMPLING["top_p"], show_default=True,
                     help="Keep this much probability."),
        click.option("--top-k", type=int, default=SAMPLING["top_k"], show_default=True,
                     help="Keep the k most likely tokens, 0 for all."),
        click.option("--temp", type=click.FloatRange(0), default=SAMPLING["temperature"], show_default=True,
                     help="Temperature, 0 for greedy."),
    ):  # fmt: skip
        sampled = option(sampled)
    return sampled


@contextmanager
def opened(target: str, drafter: Wanted, **loading: Any) -> Iterator[Llama]:
    """A target for the length of a block, with its drafter; where one is wanted and there is none, `Llama` says so."""
    from gemma_mtp.runtime import devices
    from gemma_mtp.runtime.llama import Llama

    with closing(Llama(target, drafter=drafter, **loading)) as llm:
        if llm.rpc_servers:
            click.echo(devices.placed(llm.model, llm.drafter and llm.drafter.ctx), err=True)
        yield llm
