"""The command `gemma-mtp rpc-server`: this machine's devices for a model that another machine serves."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click
from gemma_mtp.patches import source

if TYPE_CHECKING:
    from gemma_mtp.runtime.programs import Program
    from gemma_mtp.runtime.rpc import Device

MIB = 1 << 20
# A device as ggml-rpc-server lists it.
LISTED = re.compile(r"  (\S+): .* \(\d+ MiB, \d+ MiB free\)")


# Who can reach an open one, and what they can do; the address stands between.
OPEN = (
    "EVERYBODY who reaches",
    "- there is no key and no encryption: they can use the devices, read and change what is computed, and, since what "
    "is sent is trusted, perhaps run programs as you",
)


@click.command("rpc-server")
@click.option("--host", default="127.0.0.1", show_default=True, help="IPv4 address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=50052,
    show_default=True,
    help="Port to listen at, 0 for a free one.",
)
@click.option(
    "--let-anyone-in",
    is_flag=True,
    help="Listen at an address that other machines reach, though RPC asks nobody for a key and encrypts nothing.",
)
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads. [default: one for each core]")
@click.option("-d", "--device", metavar="NAME,...", help="Devices to lend. [default: all GPUs; without one, the CPU]")
@click.option(
    "--memory",
    type=click.IntRange(1),
    metavar="MIB",
    help="Memory of the CPU that is offered, which decides how many layers come. [default: what is free]",
)
@click.option(
    "--cache", is_flag=True, help="Keep large weights that were sent, in the cache folder, for the next time."
)
@click.option("-v", "--verbose", is_flag=True, help="Show ggml-rpc-server's output.")
@click.option("--json", "as_json", is_flag=True, help="When it is ready, print one JSON object instead.")
def rpc_server(
    host: str, port: int, let_anyone_in: bool, threads: int | None, device: str | None, memory: int | None, cache: bool,
    verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    """Lend this machine's memory and devices to a model that another one serves (llama.cpp's RPC).

    There `gemma-mtp serve TARGET --rpc HOST:PORT` takes them; it prints that line. RPC has NO authentication: whoever
    reaches the port can use the device, read what it computes, and, as its code trusts what it is sent, perhaps do
    anything that you can do here. So it listens to this machine alone unless told otherwise: do that in a network of
    your own only, or through a tunnel (ssh -L). It serves one program at a time and runs until Ctrl-C or SIGTERM.
    docs/server.md says more.

    \b
    Examples:
      gemma-mtp rpc-server
      gemma-mtp rpc-server --host 192.168.1.2 --let-anyone-in
      gemma-mtp rpc-server --device CUDA0 --memory 8000 --cache --port 0
    """
    from gemma_mtp.runtime import programs, rpc
    from gemma_mtp.runtime.bench.machine import physical_cores
    from gemma_mtp.runtime.serving import is_loopback

    address = rpc.numeric(host)
    if not is_loopback(address) and not let_anyone_in:
        raise ValueError(
            f"{host} can be reached from other machines, and RPC asks nobody for a key; pass --let-anyone-in if you "
            "trust all who reach it, or tunnel to 127.0.0.1 (ssh -L)."
        )
    port = programs.free_port(address, port)
    threads = threads or physical_cores()
    command = [str(programs.program("ggml-rpc-server")), "-H", address, "-p", str(port), "-t", str(threads)]
    command += [*(["-d", device] if device else []), *(["-c"] if cache else [])]
    variables = {**os.environ, "LLAMA_CACHE": str(source.cache_dir()), **_memory(memory)}
    with ExitStack() as stack:
        listed: list[str] = []
        running = stack.enter_context(programs.Program(command, _shown(listed, verbose), variables))
        near = "127.0.0.1" if address == "0.0.0.0" else address
        found = _ready(running, f"{near}:{port}", listed)
        where = f"{rpc.own_address() if address == '0.0.0.0' else address}:{port}"
        facts = {
            "rpc": where, "pid": running.pid, "threads": threads, "open": not is_loopback(address),
            "devices": [{"free": each.free, "total": each.total} for each in found],
            "cache": str(source.cache_dir() / "rpc") if cache else None,
        }  # fmt: skip
        click.echo(json.dumps(facts) if as_json else _told(facts))
        sys.stdout.flush()
        running.join()


def _memory(given: int | None) -> dict[str, str]:
    """How much of the CPU's memory is offered: by itself ggml tells all that the machine has, used or not."""
    from gemma_mtp.runtime.bench.machine import free_memory

    free = free_memory()
    offered = given if given is not None else free and free // MIB
    return {"GGML_RPC_CPU_MEMORY": str(offered)} if offered else {}


def _shown(listed: list[str], verbose: bool) -> Callable[[Any], None]:
    """What becomes of its output: devices are noted, what it refuses is shown, and all if asked for."""

    def show(line: Any) -> None:
        if found := LISTED.fullmatch(line.whole):
            listed.append(found[1])
        if verbose or line.whole.startswith("["):
            click.echo(line.whole, err=True)

    return show


def _ready(running: Program, address: str, listed: Sequence[str]) -> list[Device]:
    """Wait until it answers; returns its devices.

    Raises:
        RuntimeError: it ended.
    """
    from gemma_mtp.runtime import programs, rpc

    while True:
        try:
            running.check()
        except RuntimeError as problem:
            known = f" (there are: {', '.join(listed)})" if listed else ""
            raise RuntimeError(f"{problem}{known}.") from None
        try:
            found = rpc.devices(address)
        except RuntimeError:
            time.sleep(programs.LOOK / 10)
            continue
        running.ready = True
        return found


def _told(facts: Mapping[str, Any]) -> str:
    """What is said when it is ready."""
    devices = ", ".join(f"{each['free'] / 1e9:.1f} of {each['total'] / 1e9:.1f} GB" for each in facts["devices"])
    if facts["open"]:
        reach = f"{OPEN[0]} {facts['rpc']} {OPEN[1]}"
    else:
        reach = "this machine alone, all its users; from others through a tunnel: ssh -L"
    rows = {
        "lending": f"{devices} at {facts['rpc']}, {facts['threads']} CPU thread{'s' * (facts['threads'] > 1)}",
        "open to": reach,
        "use": f"gemma-mtp serve TARGET --rpc {facts['rpc']}",
    }
    return "\n".join(f"{name:8} {text}" for name, text in rows.items())
