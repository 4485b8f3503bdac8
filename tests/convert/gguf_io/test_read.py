"""GGUF headers that lie: each refused in one line before llama.cpp, which ends the process on some, sees the file."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma_mtp.convert import Pair, link
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.read import Header, read
from gemma_mtp.convert.gguf_io.types import BLOCKS, Type
from gemma_mtp.convert.integrity import first_bad_block
from gemma_mtp.convert.relink import rewrite
from llama_cpp import llama_cpp as lib


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(*entries: bytes, tensors: tuple[bytes, ...] = (), n_keys: int | None = None, n_tensors: int | None = None,
         version: int = 3, data: int = 64) -> bytes:  # fmt: skip
    """A GGUF file of these metadata entries and tensors, with so many bytes of weights."""
    counts = struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                         len(entries) if n_keys is None else n_keys)  # fmt: skip
    head = b"GGUF" + counts + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


U32 = struct.Struct("<I").pack
ARRAY = struct.Struct("<IQ").pack  # type and number of the elements

LIES = {
    "version 1": (gguf(version=1), "version is 1"),
    "big-endian": (gguf(version=0x03000000), "version is 50331648"),
    "2^63 keys": (gguf(n_keys=2**63), "number of keys is 9223372036854775808"),
    "2^64 - 1 tensors": (gguf(n_tensors=2**64 - 1), "number of tensors"),
    "more keys than there are": (gguf(n_keys=3), "key 0|key 1|cut off"),
    "a key beyond the end": (gguf(text(b"a", 2**40)), "length of key 0 is 1099511627776"),
    "a key that ends beyond the file": (gguf(text(b"a", 500)), "key 0 wants 500 bytes"),
    "an empty key": (gguf(key(b"", 4, U32(1))), "wanted 1 to"),
    "a key that is no text": (gguf(key(b"\xff\xfe", 4, U32(1))), "printable"),
    "a key with a zero byte": (gguf(key(b"a\0b", 4, U32(1))), "printable"),
    "a key twice": (gguf(key(b"a", 4, U32(1)), key(b"a", 4, U32(2))), "the key a is there twice"),
    "an unknown type": (gguf(key(b"a", 13, U32(1))), "a has type 13"),
    "a type of 2^31": (gguf(key(b"a", 2**31, U32(1))), "a has type 2147483648"),
    "arrays in an array": (gguf(key(b"a", 9, ARRAY(9, 1))), "a has type 9"),
    "2^62 numbers": (gguf(key(b"a", 9, ARRAY(4, 2**62))), "number of a's elements"),
    "more numbers than there are": (gguf(key(b"a", 9, ARRAY(12, 1000))), "a wants 8000 bytes"),
    "more strings than there are": (gguf(key(b"a", 9, ARRAY(8, 1000))), "a wants 8000 bytes"),
    "strings that end beyond the file": (gguf(key(b"a", 9, ARRAY(8, 2) + text(b"x", 900) + text(b""))), "string"),
    "a string of 2^63": (gguf(key(b"a", 9, ARRAY(8, 1) + text(b"x", 2**63))), "string"),
    "alignment 0": (gguf(key(b"general.alignment", 4, U32(0))), "general.alignment is 0"),
    "alignment 24": (gguf(key(b"general.alignment", 4, U32(24))), "general.alignment is 24"),
    "alignment 2^31": (gguf(key(b"general.alignment", 4, U32(2**31))), "general.alignment is 2147483648"),
    "alignment as text": (gguf(key(b"general.alignment", 8, text(b"32"))), "general.alignment is 32"),
    "alignments": (gguf(key(b"general.alignment", 9, ARRAY(4, 1) + U32(32))), "general.alignment is"),
    "a number for architecture": (gguf(key(b"general.architecture", 4, U32(1))), "general.architecture is 1"),
    "a name of 64 bytes": (gguf(tensors=(tensor(b"n" * 64),)), "1 to 63 bytes"),
    "a tensor twice": (gguf(tensors=(tensor(), tensor(offset=32))), "'t' is there twice"),
    "five dimensions": (gguf(tensors=(tensor(shape=(1, 1, 1, 1, 1)),)), "5 dimensions"),
    "no elements": (gguf(tensors=(tensor(shape=(0,)),)), "dimension of 't' is 0"),
    "a negative dimension": (gguf(tensors=(tensor(shape=(2**64 - 1,)),)), "dimension of 't'"),
    "2^64 elements": (gguf(tensors=(tensor(shape=(2**32, 2**32)),)), "more elements"),
    "type 4": (gguf(tensors=(tensor(kind=4),)), "has type 4"),
    "type 2^31": (gguf(tensors=(tensor(kind=2**31),)), "has type 2147483648"),
    "half a block": (gguf(tensors=(tensor(shape=(33,), kind=2),)), "rows of 33, wanted a multiple of 32 for Q4_0"),
    "an offset that is not aligned": (gguf(tensors=(tensor(offset=16),)), "begins at 16 of the weights, wanted 0"),
    "overlapping tensors": (gguf(tensors=(tensor(), tensor(b"u"))), "'u' begins at 0 of the weights, wanted 32"),
    "an offset beyond the end": (gguf(tensors=(tensor(offset=2**63),)), "begins at 9223372036854775808"),
    "weights beyond the end": (gguf(tensors=(tensor(shape=(17,)),)), "ends at byte"),
    "2^62 bytes of weights": (gguf(tensors=(tensor(shape=(2**60,)),)), "ends at byte"),
    "no padding": (gguf(tensors=(tensor(),), data=0)[:-20], "ends at byte|cut off"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, tmp_path: Path) -> None:
    content, words = LIES[lie]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(MtpError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(key(b"general.architecture", 8, text(b"x")), key(b"e", 9, ARRAY(8, 0)), tensors=(tensor(),)))
    header = read(path)
    assert (header.arch, list(header.metadata["e"]), header.tensors["t"].shape) == ("x", [], (8,))
    path.write_bytes(b"")
    with pytest.raises(MtpError, match="not a GGUF file"):
        read(path)


def test_a_sparse_file_of_a_terabyte_costs_nothing(tmp_path: Path) -> None:
    """A string array that fills a huge file: refused by its number of elements, not by reading it."""
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(gguf(key(b"a", 9, ARRAY(8, 2**30)), data=0)[:-4])
        file.truncate(1 << 40)
    with pytest.raises(MtpError, match="elements is 1073741824"):
        read(path)


def changed(path: Path, out: Path, **values: Any) -> Path:
    """A copy of a GGUF file with other metadata; keys with two underscores for a dot."""
    header = read(path)
    rewrite(header, {name.replace("__", "."): value for name, value in values.items()}, out, lambda done, total: None)
    return out


SENSELESS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "gemma4__block_count": (lambda h: 0, "block_count is 0"),
    "gemma4__attention__head_count": (lambda h: 0, "head_count is 0"),
    "gemma4__attention__head_count_kv": (lambda h: 3, "divisors"),
    "gemma4__attention__key_length": (lambda h: 7, "value_length"),
    "gemma4__attention__shared_kv_layers": (lambda h: h.of_arch("block_count") - 1, "shared_kv_layers"),
    "gemma4__attention__sliding_window_pattern": (lambda h: np.zeros(h.of_arch("block_count"), bool), "sliding layer"),
    "gemma4__attention__sliding_window": (lambda h: 0, "sliding_window is 0"),
    "gemma4__rope__dimension_count": (lambda h: 1 << 12, "dimension_count"),
    "gemma4__embedding_length": (lambda h: "many", "embedding_length is 'many'"),
    "gemma4__expert_count": (lambda h: 1 << 20, "expert_count"),
    "gemma4__expert_used_count": (lambda h: 4, "expert_used_count"),
    "gemma4__nextn_predict_layers": (lambda h: 99, "nextn_predict_layers"),
    "tokenizer__ggml__tokens": (lambda h: ["a", "a\0b", *map(str, range(3070))], "3071 different strings"),
    "tokenizer__ggml__scores": (lambda h: np.zeros(5, np.float32), "scores"),
    "tokenizer__ggml__token_type": (lambda h: np.zeros(3072, np.float32), "token_type"),
    "tokenizer__ggml__bos_token_id": (lambda h: 3072, "bos_token_id is 3072"),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_metadata_that_makes_no_sense(name: str, demo: Pair, tmp_path: Path) -> None:
    value, words = SENSELESS[name]
    path = changed(demo.target, tmp_path / "x.gguf", **{name: value(read(demo.target))})
    with pytest.raises(MtpError, match=words) as caught:
        link.read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mtp__ordered__n_centroids", lambda h: 7, "n_centroids is 7"),
        ("mtp__ordered__top_k", lambda h: 0, "top_k is 0"),
        ("mtp__ordered__centroids", lambda h: h.metadata[link.KEY_CENTROIDS] * np.float32(np.nan), "centroids"),
        ("mtp__ordered__centroids", lambda h: h.metadata[link.KEY_CENTROIDS][1:], "centroids"),
        ("mtp__ordered__token_ordering", lambda h: h.metadata[link.KEY_ORDERING] * 0, "once"),
        ("mtp__ordered__token_ordering", lambda h: h.metadata[link.KEY_ORDERING].astype("f4"), "once"),
    ],
)  # fmt: skip
def test_an_ordered_head_that_makes_no_sense(
    name: str, value: Callable[[Header], Any], words: str, demo: Pair, tmp_path: Path
) -> None:
    path = changed(demo.drafter, tmp_path / "x.gguf", **{name: value(read(demo.drafter))})
    with pytest.raises(MtpError, match=words):
        link.read_header(path)


def test_sizes_of_blocks_are_libggmls() -> None:
    lib._lib.ggml_type_size.restype = lib._lib.ggml_blck_size.restype = ctypes.c_int64
    for kind, (block, size, _) in BLOCKS.items():
        assert (lib._lib.ggml_blck_size(kind), lib._lib.ggml_type_size(kind)) == (block, size), kind.name


def test_bad_blocks_are_libggmls(capfd: pytest.CaptureFixture[str]) -> None:
    """Random bytes of every type, and NaN in every place of a block: the verdict is ggml_validate_row_data's."""
    validate = lib._lib.ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    rng = np.random.default_rng(0)
    verdicts = set()
    for kind, (_, size, _) in BLOCKS.items():
        for place in range(size + 40):
            blocks = rng.integers(0, 60, (4, size), np.uint8)  # small exponents: nothing but what is put there is bad
            blocks[2, place % size : place % size + 2] = 0xFF
            if place >= size:
                blocks = rng.integers(0, 256, (4, size), np.uint8)
            data = np.ascontiguousarray(blocks).reshape(-1)
            fine = first_bad_block(data, kind) is None
            if kind is not Type.F64:  # libggml looks at those as float32
                assert fine == validate(kind, data.ctypes.data, data.nbytes), (kind.name, place)
            verdicts.add(fine)
    assert verdicts == {True, False}
    capfd.readouterr()
