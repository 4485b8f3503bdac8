"""Machines that lend their memory and devices through llama.cpp's RPC: their addresses, and whether they answer.

ggml's own client ends the process where a server cannot be reached or speaks another version (ggml/src/ggml-rpc/
ggml-rpc.cpp), so they are asked here first, in the same protocol: a byte for the command, the size of what it is given,
that; then the size of the answer, and the answer.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

# What the pinned llama.cpp speaks (RPC_PROTO_* in ggml/include/ggml-rpc.h): a server must have the same major number,
# and no higher minor one.
VERSION = (7, 0)
# Commands, and bytes that either side tells of its network in the first (enum rpc_cmd, RPC_CONN_CAPS_SIZE).
HELLO, DEVICE_COUNT, DEVICE_MEMORY = 14, 15, 11
CAPABILITIES = 24
# Seconds that a server has to answer. It serves one program at a time, and meanwhile lets others wait.
PATIENCE = 5.0
# What ggml says when a server has ended or cut the connection, before it ends the process (RPC_STATUS_ASSERT there).
LOST = "Remote RPC server"
# What its connection logs before that, where the loss is noticed while something is sent or received (transport.cpp).
CUT = re.compile(rf"{LOST}|(?:send|recv) failed \(bytes_")
# Variables under which a program that loses a server says so without a list of its functions.
QUIET = {"GGML_NO_BACKTRACE": "1"}
ADDRESS = re.compile(r"([^\s:,/]+):(\d{1,5})")
START = "start one there with: gemma-mtp rpc-server"


@dataclass(frozen=True)
class Device:
    """A device of an RPC server: bytes of memory free and in all, as it tells them."""

    free: int
    total: int


def addresses(text: str) -> list[str]:
    """HOST:PORT,... as a list.

    Raises:
        ValueError: it is no such list, or names one twice.
    """
    found = [part.strip() for part in text.split(",")]
    for part in found:
        match = ADDRESS.fullmatch(part)
        if match is None or not 0 < int(match[2]) < 65536:
            raise ValueError(f"{part!r} is no HOST:PORT of an RPC server; {START}, which prints it.")
        if found.count(part) > 1:
            raise ValueError(f"{part} is named twice; name each RPC server once.")
    return found


def check(servers: Iterable[str]) -> dict[str, list[Device]]:
    """Ask RPC servers for their devices.

    Raises:
        RuntimeError: one does not answer, is none, or speaks another version of the protocol.
    """
    return {server: devices(server) for server in servers}


@contextmanager
def explaining(servers: Sequence[str], in_use: bool = False) -> Iterator[None]:
    """Within the block a program that ends as it lost one of these servers is an error that says which one.

    Args:
        servers: HOST:PORT of each.
        in_use: whether the program is still there: those that it has not lost answer nobody else.

    Raises:
        RuntimeError: this is so.
    """
    try:
        yield
    except RuntimeError as problem:
        for server in servers:
            try:
                if in_use:
                    connected(server).close()
                else:
                    devices(server)
            except RuntimeError as wrong:
                lost = f"the model's layers at {server} are gone: {wrong} Then start this again."
                raise RuntimeError(lost) from problem
        raise


def devices(server: str) -> list[Device]:
    """The devices of an RPC server.

    Args:
        server: HOST:PORT.

    Raises:
        RuntimeError: it does not answer, is none, or speaks another version of the protocol.
    """
    with connected(server) as connection:
        try:
            version = hello(connection, server)
            if version[0] != VERSION[0] or version[1] > VERSION[1]:
                ours, theirs = (".".join(map(str, each)) for each in (VERSION, version))
                raise RuntimeError(
                    f"the RPC server {server} speaks version {theirs} of the protocol, not {ours}; run the same "
                    "gemma-mtp (or llama.cpp) on both machines."
                )
            (count,) = struct.unpack("<I", asked(connection, DEVICE_COUNT, b"", 4))
            memory = [asked(connection, DEVICE_MEMORY, struct.pack("<I", place), 16) for place in range(count)]
        except TimeoutError:
            raise RuntimeError(
                f"{server} takes connections but does not answer: an RPC server serves one program at a time; end the "
                f"other one, or {START}."
            ) from None
        except (OSError, EOFError):
            raise RuntimeError(f"{server} is no RPC server of this llama.cpp; {START}.") from None
    return [Device(*struct.unpack("<QQ", each)) for each in memory]


def connected(server: str) -> socket.socket:
    """A connection to a server.

    Raises:
        RuntimeError: nobody takes it.
    """
    host, _, port = server.rpartition(":")
    try:
        # ggml connects over IPv4 alone, and to the first address of a name.
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)[0]
        connection = socket.socket(family, kind, protocol)
    except OSError:
        raise RuntimeError(f"{host} is no machine that this one knows (by IPv4); pass its address in --rpc.") from None
    connection.settimeout(PATIENCE)
    try:
        connection.connect(address)
    except ConnectionRefusedError:
        connection.close()
        raise RuntimeError(f"nobody listens at {server}; {START}.") from None
    except OSError:  # TimeoutError among them
        connection.close()
        raise RuntimeError(
            f"{server} cannot be reached; is the machine on, and does its firewall let this one in?"
        ) from None
    return connection


def hello(connection: socket.socket, server: str) -> tuple[int, int]:
    """The version of the protocol that a server speaks.

    Raises:
        EOFError: it answers in none.
        OSError: it does not answer.
    """
    connection.sendall(message(HELLO, bytes(CAPABILITIES)))
    (size,) = struct.unpack("<Q", received(connection, 8))
    if not 3 <= size <= 256:
        raise EOFError(server)
    answer = received(connection, size)
    return answer[0], answer[1]


def asked(connection: socket.socket, command: int, given: bytes, size: int) -> bytes:
    """What a server answers to a command, which is so many bytes long.

    Raises:
        EOFError: it is not.
        OSError: there is no answer.
    """
    connection.sendall(message(command, given))
    if received(connection, 8) != struct.pack("<Q", size):
        raise EOFError
    return received(connection, size)


def message(command: int, given: bytes) -> bytes:
    return struct.pack("<BQ", command, len(given)) + given


def received(connection: socket.socket, size: int) -> bytes:
    """So many bytes; EOFError if the connection ends before."""
    found = b""
    while len(found) < size:
        piece = connection.recv(size - len(found))
        if not piece:
            raise EOFError
        found += piece
    return found


def own_address() -> str:
    """The address by which other machines most likely reach this one."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.connect(("192.0.2.1", 9))  # sends nothing: it only asks which way it would go
        return str(connection.getsockname()[0])
    return socket.gethostname()


def numeric(host: str) -> str:
    """The IPv4 address to listen at: ggml takes no names.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise ValueError(f"{host} is no IPv4 address of this machine, which RPC needs.") from None
