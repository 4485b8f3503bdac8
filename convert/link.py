"""The pairing contract: which drafter belongs to which target, read from the two GGUF headers.

A target carries the fingerprint of the checkpoint it was converted from, a drafter the fingerprint of its target's
checkpoint, so one drafter serves every quantization of its target. Headers are read with libggml's own gguf_* functions
(ggml/include/gguf.h), which take milliseconds at 262144 tokens and check what llama.cpp will check.
"""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from llama_cpp import llama_cpp as lib

TARGET_ARCH = "gemma4"
DRAFTER_ARCH = "gemma4-assistant"
VERSION = 1

KEY_VERSION = "mtp.version"
KEY_ROLE = "mtp.role"
KEY_SOURCE = "mtp.source.fingerprint"
KEY_TARGET = "mtp.target.fingerprint"
KEY_PEER = "mtp.peer.file"
KEY_CENTROIDS = "mtp.ordered.centroids"
KEY_ORDERING = "mtp.ordered.token_ordering"
KEY_N_CENTROIDS = "mtp.ordered.n_centroids"
KEY_TOP_K = "mtp.ordered.top_k"


class MtpError(ValueError):
    """What a user can cause and mend; its text is one line with the next step."""


class PairError(MtpError):
    """The two files, or the two checkpoints, are not a target and its drafter."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: ggml type, shape in ggml's order (row length first), and bytes within the file."""

    type: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights."""

    path: Path
    arch: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def of_arch(self, key: str, default: Any = None) -> Any:
        """Metadata under the architecture's own prefix: `of_arch("block_count")` is `gemma4.block_count`."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    @property
    def vocabulary(self) -> Sequence[str]:
        tokens: Sequence[str] = self.metadata.get("tokenizer.ggml.tokens", ())
        return tokens


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(lib._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


_P, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
_open = _function("gguf_init_from_file", _P, _S, _Params)
_free = _function("gguf_free", None, _P)
_n_kv = _function("gguf_get_n_kv", _I, _P)
_key = _function("gguf_get_key", _S, _P, _I)
_kv_type = _function("gguf_get_kv_type", ctypes.c_int, _P, _I)
_arr_type = _function("gguf_get_arr_type", ctypes.c_int, _P, _I)
_arr_n = _function("gguf_get_arr_n", ctypes.c_size_t, _P, _I)
_arr_data = _function("gguf_get_arr_data", _P, _P, _I)
_arr_str = _function("gguf_get_arr_str", _S, _P, _I, ctypes.c_size_t)
_val_str = _function("gguf_get_val_str", _S, _P, _I)
_val_data = _function("gguf_get_val_data", _P, _P, _I)
_data_offset = _function("gguf_get_data_offset", ctypes.c_size_t, _P)
_n_tensors = _function("gguf_get_n_tensors", _I, _P)
_tensor_name = _function("gguf_get_tensor_name", _S, _P, _I)
_tensor_type = _function("gguf_get_tensor_type", ctypes.c_int, _P, _I)
_tensor_offset = _function("gguf_get_tensor_offset", ctypes.c_size_t, _P, _I)
_tensor_size = _function("gguf_get_tensor_size", ctypes.c_size_t, _P, _I)
_tensor_ne = _function("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64 * 4), _P, _I)
_log_get = _function("ggml_log_get", None, _P, _P)
_log_set = _function("ggml_log_set", None, _P, _P)
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

# gguf_type of ggml/include/gguf.h; 8 is a string, 9 an array.
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}


@contextmanager
def _libggml_says() -> Iterator[list[str]]:
    """Collect libggml's log, which would otherwise go to stderr in the middle of our own words."""
    said: list[str] = []
    collect = _LogCallback(lambda _level, text, _data: said.append((text or b"").decode(errors="replace").strip()))
    callback, data = ctypes.c_void_p(), ctypes.c_void_p()
    _log_get(ctypes.byref(callback), ctypes.byref(data))
    _log_set(ctypes.cast(collect, ctypes.c_void_p), None)
    try:
        yield said
    finally:
        _log_set(callback, data)


class _Open:
    """A gguf_context that is freed with the last object that reads from it."""

    def __init__(self, address: int) -> None:
        self.address = address
        weakref.finalize(self, _free, address)


class Strings(Sequence[str]):
    """An array of strings in a header, decoded when read: a vocabulary and its merges are most of a million."""

    def __init__(self, opened: _Open, index: int) -> None:
        self._opened, self._index = opened, index
        self._length = int(_arr_n(opened.address, index))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._length))]
        if not -self._length <= place < self._length:
            raise IndexError(place)
        return self._raw(place % self._length).decode(errors="replace")

    def _raw(self, place: int) -> bytes:
        raw: bytes = _arr_str(self._opened.address, self._index, place)
        return raw

    def digest(self) -> str:
        """SHA-256 over the strings, each ended by a zero byte."""
        total = hashlib.sha256()
        for place in range(self._length):
            total.update(self._raw(place) + b"\0")
        return total.hexdigest()


def _value(opened: _Open, index: int) -> Any:
    """One metadata value: a Python scalar, a numpy array [n], or Strings."""
    kind = _kv_type(opened.address, index)
    if kind == _STRING:
        return _val_str(opened.address, index).decode(errors="replace")
    if kind != _ARRAY:
        return np.frombuffer(_bytes(_val_data(opened.address, index), _NUMBERS[kind], 1), _NUMBERS[kind])[0].item()
    kind = _arr_type(opened.address, index)
    if kind == _STRING:
        return Strings(opened, index)
    count = _arr_n(opened.address, index)
    return np.frombuffer(_bytes(_arr_data(opened.address, index), _NUMBERS[kind], count), _NUMBERS[kind])


def _bytes(address: int | None, dtype: str, count: int) -> bytes:
    return ctypes.string_at(address, np.dtype(dtype).itemsize * count) if address and count else b""


def read_header(path: Path) -> Header:
    """Read metadata and tensor table of a GGUF file; the weights stay where they are.

    Raises:
        MtpError: there is no such file, it is not GGUF, or it ends before its last tensor does.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except OSError as problem:
        raise MtpError(f"{path}: {problem.strerror}; name an existing GGUF file.") from None
    if magic != b"GGUF":
        raise MtpError(f"{path} is not a GGUF file (it starts with {magic!r}); convert the checkpoint first.")
    with _libggml_says() as said:
        address = _open(str(path).encode(), _Params(True, None))
    if not address:
        reason = said[-1].split(": ", 1)[-1] if said else "no reason given"
        raise MtpError(f"{path} is damaged or cut off: libggml says {reason!r}; copy or convert it again.")
    opened = _Open(address)
    metadata = {_key(address, i).decode(): _value(opened, i) for i in range(_n_kv(address))}
    start = _data_offset(address)
    tensors = {}
    for i in range(_n_tensors(address)):
        shape = list(_tensor_ne(address, i).contents)
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        tensors[_tensor_name(address, i).decode()] = Tensor(
            _tensor_type(address, i), tuple(shape), start + _tensor_offset(address, i), _tensor_size(address, i)
        )
    end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=0)
    if end > size:
        raise MtpError(f"{path} is cut off: {size} bytes, its tensors need {end}; copy or convert it again.")
    return Header(path, str(metadata.get("general.architecture", "")), metadata, tensors)


def _belongs(target: Header, drafter: Header) -> bool:
    wanted = target.metadata.get(KEY_SOURCE)
    return drafter.arch == DRAFTER_ARCH and wanted is not None and drafter.metadata.get(KEY_TARGET) == wanted


def find_drafter(target: Path, header: Header | None = None) -> Path | None:
    """The linked drafter in a target's folder, or None.

    The file that the target names comes first, then every other GGUF file of the folder in the order of their names. A
    drafter is recognised by architecture and fingerprint, never by its name.

    Raises:
        MtpError: the target, or the drafter that it names, cannot be read.
    """
    header = header or read_header(target)
    if KEY_SOURCE not in header.metadata:
        return None
    named = target.parent / Path(str(header.metadata.get(KEY_PEER, ""))).name
    if named.is_file() and _belongs(header, read_header(named)):
        return named
    for path in sorted(target.parent.glob("*.gguf")):
        try:
            if path != target and _belongs(header, read_header(path)):
                return path
        except MtpError:
            continue  # a broken file that nobody named is none of this pair's business
    return None


def _by_type(header: Header, key: str) -> dict[str, Any]:
    """A per-layer value, which GGUF stores as a scalar when all layers share it, by type of layer."""
    pattern = np.atleast_1d(header.of_arch("attention.sliding_window_pattern", []))
    values = np.broadcast_to(np.asarray(header.of_arch(key, -1)), pattern.shape)
    return {("sliding" if sliding else "full"): int(value) for sliding, value in zip(pattern, values, strict=True)}


def check(target: Header, drafter: Header) -> None:
    """Check that a drafter can read the target's hidden states and KV cache and was trained to.

    Raises:
        PairError: naming the first property that differs, with both values.
    """
    if target.arch != TARGET_ARCH:
        raise PairError(f"{target.path} is a {target.arch!r} model; a target must be {TARGET_ARCH!r}.")
    if drafter.arch != DRAFTER_ARCH:
        raise PairError(
            f"{drafter.path} is a {drafter.arch!r} model, not a drafter ({DRAFTER_ARCH!r}); "
            "pass the drafter's GGUF file, or drafter=None."
        )
    advice = "use the drafter converted together with this target."
    wants, has = drafter.metadata.get(KEY_TARGET), target.metadata.get(KEY_SOURCE)
    if wants and has and wants != has:
        raise PairError(
            f"{drafter.path.name} was converted for the target with fingerprint {wants[:12]}, but {target.path.name} "
            f"has {has[:12]}; {advice}"
        )
    compared = {
        "hidden size": (target.of_arch("embedding_length"), drafter.of_arch("embedding_length_out")),
        "sliding window": tuple(h.of_arch("attention.sliding_window") for h in (target, drafter)),
        "vocabulary size": (len(target.vocabulary), len(drafter.vocabulary)),
    }
    for name, key in (("head size", "key_length"), ("sliding head size", "key_length_swa")):
        compared[name] = tuple(h.of_arch(f"attention.{key}") for h in (target, drafter))
    donors, readers = (_by_type(h, "attention.head_count_kv") for h in (target, drafter))
    for kind in readers:
        compared[f"KV heads of {kind} layers"] = (donors.get(kind, 0), readers[kind])
    for name, (ours, theirs) in compared.items():
        if ours != theirs:
            raise PairError(
                f"{drafter.path.name} does not fit {target.path.name}: {name} is {ours} in the target, {theirs} in the "
                f"drafter; {advice}"
            )
    ours, theirs = target.vocabulary, drafter.vocabulary
    if isinstance(ours, Strings) and isinstance(theirs, Strings) and ours.digest() != theirs.digest():
        place = next(i for i in range(len(ours)) if ours[i] != theirs[i])
        raise PairError(
            f"{drafter.path.name} does not fit {target.path.name}: token {place} is {ours[place]!r} in the target, "
            f"{theirs[place]!r} in the drafter; {advice}"
        )
