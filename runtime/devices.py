"""Devices that layers lie on, this machine's and those of others, as ggml has them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from gemma_mtp.runtime import native, rpc
from llama_cpp import llama_cpp as lib

_P, _I = ctypes.c_void_p, ctypes.c_int32
GPUS = native.GPU, native.IGPU
# Called by ggml with the reason before it ends the process; kept, as ggml keeps no reference.
_TOLD = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_kept: dict[str, Any] = {}


def function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of libllama or libggml that llama_cpp has no binding for.

    Raises:
        RuntimeError: these were built without it.
    """
    found = getattr(lib._lib, name, None)
    if found is None:
        raise RuntimeError(f"this llama-cpp-python has no {name}, which other machines need; run: gemma-mtp build")
    found.restype, found.argtypes = result, arguments
    return found


def of_machines(servers: Sequence[str]) -> Any:
    """Devices to load a model on, as llama_model_params takes them: those of RPC servers, then this machine's GPUs.

    So llama.cpp orders them too; the layers follow in this order, and the last ones stay here, where there is a GPU.

    Args:
        servers: HOST:PORT of each. When one is lost later on, ggml ends the process; a line says which one.

    Raises:
        RuntimeError: one does not answer, or libggml was built without RPC.
    """
    rpc.check(servers)
    tell_of_loss(servers)
    native.load_backends()
    add = function("ggml_backend_rpc_add_server", _P, ctypes.c_char_p)
    kind, get = (
        function("ggml_backend_dev_type", ctypes.c_int, _P),
        function("ggml_backend_dev_get", _P, ctypes.c_size_t),
    )
    of_server = function("ggml_backend_reg_dev_get", _P, _P, ctypes.c_size_t)
    count = function("ggml_backend_reg_dev_count", ctypes.c_size_t, _P)
    remote = [of_server(reg, place) for reg in (add(each.encode()) for each in servers) for place in range(count(reg))]
    here = [get(place) for place in range(function("ggml_backend_dev_count", ctypes.c_size_t)())]
    return _null_ended([*remote, *(each for each in here if kind(each) in GPUS)])


def _null_ended(pointers: Sequence[int]) -> Any:
    return (_P * (len(pointers) + 1))(*pointers)


def drafter_devices(model: Any) -> Any:
    """Devices to load a target's drafter on, as llama_model_params takes them: that of the KV cache which it reads.

    None where libllama does not tell, or where the cache is split over all of them.
    """
    if not hasattr(lib._lib, "llama_model_drafter_device"):
        return None
    device = function("llama_model_drafter_device", _P, _P)(model)
    if not device:
        return None
    is_gpu = function("ggml_backend_dev_type", ctypes.c_int, _P)(device) in GPUS
    return _null_ended([device] if is_gpu else [])


def placed(target: Any, drafter: Any) -> str:
    """Which layers lie on which device, in words.

    Args:
        target: the target's model.
        drafter: the drafter's context, or None.

    Raises:
        RuntimeError: libllama does not tell.
    """
    tell = function("llama_model_placement", _I, _P, ctypes.c_char_p, ctypes.c_size_t)
    lines = []
    for what, model in ("target", target), ("drafter", drafter and lib.llama_get_model(drafter)):
        if model:
            text = ctypes.create_string_buffer(tell(model, None, 0) + 1)
            tell(model, text, len(text))
            lines.append(f"{what}: {text.value.decode()}")
    return "; ".join(lines)


def tell_of_loss(servers: Sequence[str]) -> None:
    """Have ggml, which ends the process when an RPC server is gone, say which one in a line, instead of a backtrace."""

    def tell(reason: bytes) -> None:
        line = reason.decode(errors="replace")
        try:
            with rpc.explaining(servers if rpc.LOST in line else (), in_use=True):
                raise RuntimeError(line)
        except RuntimeError as problem:
            with suppress(OSError):
                os.write(2, f"\nerror: {problem}\n".encode())

    _kept["tell"] = _TOLD(tell)
    function("ggml_set_abort_callback", _P, _TOLD)(_kept["tell"])
