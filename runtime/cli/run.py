"""The command `gemma-mtp run`: text from a pair."""

from __future__ import annotations

import json
from typing import Any

import click
from gemma_mtp.runtime.cli.options import loading_options, opened, sampling_options


@click.command()
@click.argument("target")
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
    sampling: dict[str, Any],
    as_json: bool,
    stats: bool,
    **loading: Any,
) -> None:
    """Generate text with a target and its linked drafter.

    TARGET is a GGUF file, or the name of a model of Ollama. The text goes to stdout as it is made, one line of
    statistics to stderr at the end.

    \b
    Examples:
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "The three laws of thermodynamics are"
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf --chat -p "Why is the sky blue?" -n 400 --seed 7
      gemma-mtp run gemma4:e4b --chat -p "Why is the sky blue?"
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Once" --temp 0 --draft 4
      gemma-mtp run out/gemma-4-E2B-it-Q4_K_M.gguf -p "Once" --no-mtp
    """
    with opened(target, **loading) as llm:
        settings = sampling | {"max_tokens": max_tokens, "stream": True}
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
