"""Small files and reads that fail: said of the file that it is, and nothing waits for a pipe."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty import Folders, refused
from gemma_mtp.convert import convert_pair
from gemma_mtp.convert.errors import MtpWarning
from gemma_mtp.convert.files import BINARY, read_into, write_all
from gemma_mtp.convert.integrity import verify_files

POSITIONED = ("preadv", "pread", "pwritev", "pwrite")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
HTML = "\n<!DOCTYPE html>\n<html><title>Sign in</title></html>\n" * 9
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
OPTIONAL = ("generation_config.json", "README.md")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that can only read and write where an open file stands."""
    for name in POSITIONED:
        monkeypatch.delattr(os, name, raising=False)


@pytest.mark.usefixtures("windows")
def test_many_threads_at_one_file(tmp_path: Path) -> None:
    pieces = [bytes([place]) * 997 for place in range(200)]
    file = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT | BINARY)
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for place in range(thread, len(pieces), 8):
            write_all(file, pieces[place], place * 997)
            found = bytearray(997)
            assert read_into(file, memoryview(found), place * 997) == 997
            assert found == pieces[place]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    short = bytearray(1000)
    assert read_into(file, memoryview(short), 199 * 997) == 997
    os.close(file)
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_a_conversion_without_positioned_reads_and_writes(
    pair: Folders, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wanted = convert_pair(*pair, tmp_path / "wanted", "Q8_0", "Q8_0")
    request.getfixturevalue("windows")
    made = convert_pair(*pair, tmp_path / "made", "Q8_0", "Q8_0")
    assert [path.read_bytes() for path in made.files] == [path.read_bytes() for path in wanted.files]
    assert len(verify_files(tmp_path / "made")["files"]) == 2


def test_a_system_that_reads_a_little_at_a_time(pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = convert_pair(*pair, tmp_path / "wanted", "Q8_0", "Q8_0")
    real = os.preadv

    def short(file: int, buffers: list[Any], offset: int) -> int:
        return real(file, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    made = convert_pair(*pair, tmp_path / "made", "Q8_0", "Q8_0")
    assert [path.read_bytes() for path in made.files] == [path.read_bytes() for path in wanted.files]


def failing(call: Any, after: int) -> Any:
    """A call of the system that fails from some number on."""
    calls = iter(range(1 << 30))

    def fail(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments)

    return fail


@pytest.mark.parametrize("after", [0, 1, 150, 400])
def test_a_source_that_cannot_be_read(
    after: int, pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At planning and between two pieces of weights: it is not the output's fault."""
    calls, real = [], os.preadv

    def counted(*arguments: Any) -> int:
        calls.append(1)
        return real(*arguments)

    with monkeypatch.context() as counting:
        counting.setattr(os, "preadv", counted)
        convert_pair(*pair, tmp_path / "counted", "F32", "F32")
    assert len(calls) > 1
    monkeypatch.setattr(os, "preadv", failing(os.preadv, min(after, len(calls) - 1)))
    options = ("-q", "F32", "--drafter-quant", "F32")
    refused(*pair, tmp_path / "out", "model.safetensors cannot be read: Input/output error", options=options)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_an_output_that_cannot_be_written(
    after: int, pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, after))
    refused(*pair, tmp_path / "out", f"cannot write into {tmp_path / 'out'}: Input/output error; make room")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_cannot_be_read(
    name: str, pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    refused(*pair, tmp_path / "out", f"{pair[0] / name} cannot be read: Input/output error")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", SMALL)
def test_a_pipe_or_a_folder_in_the_place_of_a_file(name: str, pair: Folders, tmp_path: Path) -> None:
    (pair[0] / name).unlink()
    os.mkfifo(pair[0] / name)
    refused(*pair, tmp_path / "out", f"{pair[0] / name} is not a file")
    (pair[0] / name).unlink()
    (pair[0] / name).mkdir()
    refused(*pair, tmp_path / "out", f"{pair[0] / name} is not a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_where_no_file_is_needed(pair: Folders, tmp_path: Path) -> None:
    for name in OPTIONAL:
        (pair[0] / name).unlink(missing_ok=True)
        os.mkfifo(pair[0] / name)
    with pytest.warns(MtpWarning, match="generation_config.json is not a file"):
        convert_pair(*pair, tmp_path / "out", "Q8_0")
    os.mkfifo(tmp_path / "imatrix")
    refused(*pair, tmp_path / "no", "imatrix is not a file", options=("--imatrix", str(tmp_path / "imatrix")))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("text", "words"), [(LFS, "git lfs pull in"), (HTML, "is a web page")])
def test_what_a_download_left(name: str, text: str, words: str, pair: Folders, tmp_path: Path) -> None:
    (pair[0] / name).write_text(text)
    refused(*pair, tmp_path / "out", str(pair[0] / name), words)


def test_the_folder_above_the_checkpoints(pair: Folders, tmp_path: Path) -> None:
    """A trainer's, of which the last is named, and an entry of the cache, of which the current one is."""
    for steps in (200, 1000, 900):
        shutil.copytree(pair[0], tmp_path / "outputs" / f"checkpoint-{steps}")
    refused(tmp_path / "outputs", pair[1], tmp_path / "out", f"pass {tmp_path / 'outputs' / 'checkpoint-1000'} (or")
    entry = tmp_path / "models--google--gemma-4-E2B-it"
    for commit in ("a" * 40, "f" * 40):
        shutil.copytree(pair[0], entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("a" * 40)
    refused(entry, pair[1], tmp_path / "out", f"pass {entry / 'snapshots' / ('a' * 40)} (or")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.bf16.safetensors", "rename it to model.safetensors"),
        ("Model.safetensors", "rename it to model.safetensors"),
        ("model.safetensors.part", "not complete"),
        ("pytorch_model.bin", "save_pretrained"),
        ("model.gguf", "converted already"),
        ("training_args.bin", "download the weights"),
    ],
)
def test_weights_of_another_name(name: str, words: str, pair: Folders, tmp_path: Path) -> None:
    (pair[0] / "model.safetensors").rename(pair[0] / name)
    named = () if name == "training_args.bin" else (f"there lies {name}",)
    refused(*pair, tmp_path / "out", "neither model.safetensors nor", words, *named)
