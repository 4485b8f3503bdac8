"""The command build: the patched llama-cpp-python of this version, built and installed into the environment at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click
from gemma_mtp.patches import wheel
from gemma_mtp.patches.ui import build_ui, built_ui


@click.command()
@click.option("--cuda/--no-cuda", default=None, help="NVIDIA's GPUs. [default: where there is one and nvcc]")
@click.option("--metal", is_flag=True, help="Apple's GPUs; on macOS the default.")
@click.option("--vulkan", is_flag=True, help="GPUs with a Vulkan driver.")
@click.option("--portable", is_flag=True, help="Kernels for every CPU of this architecture, chosen when loaded.")
@click.option("--ui", is_flag=True, help="The web page of llama-server instead; needs Node 20 or later.")
@click.option("--check", is_flag=True, help="Say what is installed and what a build would use, and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --check: print one JSON object.")
def build(ui: bool, check: bool, as_json: bool, **options: Any) -> None:
    """Build llama-cpp-python with gemma-mtp's patches, for this machine, and install it.

    The sources are fetched with pip and checked against their hash. The wheel is kept in the cache folder
    (GEMMA_MTP_CACHE), so that another environment only installs it. CMAKE_ARGS adds flags of llama.cpp's build.

    \b
    Examples:
      gemma-mtp build                        # some minutes, once
      gemma-mtp build --cuda                 # for an NVIDIA GPU; needs the CUDA toolkit
      gemma-mtp build --portable             # to be copied to other machines
      gemma-mtp build --ui                   # a web page to chat, for llama-server --path
      gemma-mtp build --check
    """
    if ui and not check:
        click.echo(f"the web page is in {build_ui()}", err=True)
        return
    flags = wheel.cmake_args(**options)
    if not check:
        if not wheel.install(flags):
            click.echo(f"llama-cpp-python {wheel.local_version()} is installed already", err=True)
        return
    page = built_ui()
    report = wheel.report(flags) | {"kernels": _kernels(), "ui": None if page is None else str(page)}
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    raise SystemExit(0 if report["current"] else 1)


def _kernels() -> str | None:
    """The library with the CPU's kernels that a program would use, None where no patched libllama can be loaded."""
    try:
        from gemma_mtp.runtime.native import cpu_library
    except (ImportError, OSError):
        return None
    return cpu_library()


def _show(report: Mapping[str, Any]) -> None:
    """The report as lines of a name and what is so."""
    state = "as wanted" if report["current"] else f"wanted: {report['wanted']} with these flags"
    lines = {
        "installed": f"{report['installed'] or 'no llama-cpp-python'} ({state})",
        "kernels": report["kernels"] or "none loaded",
        "flags": " ".join(report["flags"]),
        "wheel": report["wheel"] or "not built yet",
        "web page": report["ui"] or "not built (gemma-mtp build --ui)",
        **{name: path or "missing" for name, path in report["tools"].items()},
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        click.echo(f"{name:{width}}  {text}")
    if not report["current"]:
        click.echo("gemma-mtp build, with the same options, builds and installs it.")
