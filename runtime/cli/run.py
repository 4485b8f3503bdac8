"""The command `gemma-mtp run`: text from a pair."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import click
from gemma_mtp.runtime.cli.options import loading_options, sampling_options


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
