"""The command `gemma-mtp serve`: llama-cpp-python's own OpenAI-compatible server, with our Llama in it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import click
from gemma_mtp.runtime.cli.options import loading_options
from gemma_mtp.runtime.pair import Wanted, named


def application(
    target: str | PathLike[str],
    drafter: Wanted,
    draft_length: Any,
    api_key: str | None = None,
    think: bool = False,
    **loading: Any,
) -> Any:
    """llama_cpp.server's FastAPI application, serving a target with its drafter.

    Args:
        target: as for `Llama`. The name of the file, without the suffix, or of Ollama's model is the model's name.
        drafter: as for `Llama`.
        draft_length: as for `Llama`.
        api_key: what clients must send as a bearer token; None lets everybody in.
        think: let the model think before it answers a chat.
        loading: further settings of llama_cpp.server's ModelSettings.

    Raises:
        ModuleNotFoundError: the server's packages are not installed.
        gemma_mtp.convert.link.MtpError, ValueError: as `Llama`.
    """
    import llama_cpp
    from gemma_mtp.runtime.llama import Llama
    from llama_cpp.server import app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    class Served(Llama):
        """The server takes its arguments from its own settings, and lets one request in at a time."""

        def __init__(self, *args: Any, **options: Any) -> None:
            if "flash_attn" not in settings.model_fields_set:
                options.pop("flash_attn", None)  # the server's own default, which nobody asked for
            super().__init__(*args, drafter=drafter, draft_length=draft_length, **options)
            self.guard.serialized = True

    path, drafter = named(target, drafter)
    alias = Path(path).stem if path is target else str(target)
    # The server's default is all logits, as stock needs them for log-probabilities: an array of n_ctx times n_vocab.
    loading = {"logits_all": False, "model_alias": alias} | loading
    variables = {"enable_thinking": True} if think else None
    settings = ModelSettings(model=str(path), chat_template_kwargs=variables, **loading)
    llama_cpp.Llama = Served  # where the server looks for the class
    return app.create_app(server_settings=ServerSettings(api_key=api_key), model_settings=[settings])


@click.command()
@click.argument("target")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen at.")
@click.option("--api-key", envvar="GEMMA_MTP_API_KEY", help="Key that clients must send. [env: GEMMA_MTP_API_KEY]")
@click.option("--think", is_flag=True, help="Let the model think before it answers.")
@loading_options
def serve(
    target: str,
    host: str,
    port: int,
    api_key: str | None,
    think: bool,
    drafter: Wanted,
    draft_length: Any,
    **loading: Any,
) -> None:
    """Serve a pair over HTTP, as OpenAI's API has it (/v1/chat/completions, /v1/completions).

    TARGET is a GGUF file, or the name of a model of Ollama. The server is that of llama-cpp-python, one request at a
    time, with MTP.

    \b
    Examples:
      gemma-mtp serve out/gemma-4-E2B-it-Q4_K_M.gguf
      gemma-mtp serve gemma4:e4b
      gemma-mtp serve out/gemma-4-E2B-it-Q4_K_M.gguf --host 0.0.0.0 --api-key secret -c 16384
    """
    try:
        import uvicorn

        app = application(target, drafter, draft_length, api_key, think, **loading)
    except ModuleNotFoundError as problem:
        raise click.ClickException(f"serve needs {problem.name}; run: pip install 'gemma-mtp[serve]'") from None
    uvicorn.run(app, host=host, port=port)
