"""The command `gemma-mtp run`: text from a pair."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
from gemma_mtp.runtime.cli.jsonl import run_lines
from gemma_mtp.runtime.cli.options import FILE, loading_options, media_options, opened, sampling_options
from gemma_mtp.runtime.media import message


@click.command()
@click.argument("target")
@click.option("-p", "--prompt", help="Text to continue; with --chat, the user's message.")
@click.option("--chat", is_flag=True, help="Ask through the chat template of the model.")
@media_options
@click.option("-n", "max_tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens to generate.")
@sampling_options
@click.option("--jsonl", "lines", type=FILE, help="Answer many prompts: a file with a JSON object on each line.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File for their answers, a line for each.")
@click.option("--parallel", type=click.IntRange(1, 256), default=4, show_default=True, help="Lines answered at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print text and statistics as one JSON object instead.")
@click.option("--stats", is_flag=True, help="Print what drafting brought, instead of one line.")
@loading_options
def run(
    target: str,
    prompt: str | None,
    chat: bool,
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    max_tokens: int,
    sampling: dict[str, Any],
    lines: Path | None,
    out: Path | None,
    parallel: int,
    as_json: bool,
    stats: bool,
    **loading: Any,
) -> None:
    """Generate text with a target and its linked drafter.

    TARGET is a GGUF file, or the name of a model of Ollama. The text goes to stdout as it is made, one line of
    statistics to stderr at the end. A question about an image or a sound goes through the chat template; the model's
    projector is found beside the target.

    A line of --jsonl is {"prompt": ...} or {"messages": [...]}, with what its answer shall be told apart by ("id") and
    options of its own: "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "grammar", and, with
    messages, "tools" and "response_format". Answers come in the order of the lines, with "line", "id", "text" or
    "message", "finish_reason", "seed", and "usage"; one that failed has "error", the others go on, and the status is 1.
    Interrupted, killed even, the same command goes on where it was. Each of --parallel lines has a context of --ctx.

    \b
    Examples:
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "The three laws of thermodynamics are"
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf --chat -p "Why is the sky blue?" -n 400 --seed 7
      gemma-mtp run gemma4:e4b --chat -p "Why is the sky blue?"
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf --image before.jpg --image after.jpg -p "What has changed?"
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Once" --temp 0 --draft 4
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Once" --no-mtp
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf --jsonl prompts.jsonl --out answers.jsonl
      gemma-mtp run gemma4:e4b --chat --jsonl prompts.jsonl --out answers.jsonl --parallel 8 --seed 7 -n 500
    """
    if (lines is None) == (prompt is None) or (lines is None) != (out is None):
        raise click.UsageError("give either -p/--prompt, or --jsonl and --out.")
    if lines is not None and out is not None:
        if as_json or stats:
            raise click.UsageError("--json and --stats are for a single prompt; leave them out with --jsonl.")
        if images or sounds:
            raise click.UsageError("--image and --audio are for a single prompt; leave them out with --jsonl.")
        load = partial(opened, target, **loading)
        run_lines(lines, out, load, target, parallel, chat, sampling | {"max_tokens": max_tokens})
        return
    assert prompt is not None
    with opened(target, **loading) as llm:
        settings = sampling | {"max_tokens": max_tokens, "stream": True}
        if chat or images or sounds:
            chunks = llm.create_chat_completion([message(prompt, images, sounds)], **settings)
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
