"""Input made to hurt, and the machine letting go in the middle: one line, a status, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from children import MAIN, STOPPING, ended, said, started
from click.testing import CliRunner
from faulty import Folders, converting, edit_config, edit_weights, refused
from gemma_mtp.convert import link, plan
from gemma_mtp.convert.checkpoint import open_checkpoint
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.safetensors_file import read_entries
from gemma_mtp.convert.staging import PREFIX
from gemma_mtp.runtime.cli.main import main
from safetensors.torch import save_file
from tiny import make_target

BPE = '{"model": {"type": "BPE", "byte_fallback": true, "vocab": %s}}'
ORDERING = "masked_embedding.token_ordering"


def shard(path: Path, header: object, data: int = 64, length: int | None = None) -> Path:
    """A safetensors file with this header, as JSON or as it is, and so many bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 32), "b": entry(16, 64)}, ("'b'", "overlaps", "16", "32")),
        ({"a": entry(0, 16), "b": entry(32, 64)}, ("'b'", "gap", "32", "16")),
        ({"a": entry(0, 128)}, ("128", "64")),
        ({"a": entry(0, 64, [17])}, ("'a'", "64", "68")),
        ({"a": entry(0, 64, [2**62, 4])}, ("'a'", "shape")),
        ({"a": entry(0, 64, [2**40, 2**40])}, ("'a'", "size in bytes", "64")),
        ({"a": entry(0, 64, [-16])}, ("'a'", "shape", "-16")),
        ({"a": entry(0, 64, dtype="F33")}, ("'a'", "F33")),
        ({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}, ("'a'", "-64", "64")),
        ({"a": {"dtype": "F32", "shape": [16]}}, ("'a'", "data_offsets")),
        ({"a": [1, 2]}, ("'a'",)),
        ([1], ("not a JSON object",)),
        (b'{"a": 1, "a": 2}', ("'a'", "twice")),
        (b"[" * 100_000, ("not JSON",)),
        (b"\xff\xfe{}", ("not JSON",)),
    ],
)  # fmt: skip
def test_a_safetensors_header_that_lies(header: object, words: tuple[str, ...], tmp_path: Path) -> None:
    path = shard(tmp_path / "model.safetensors", header)
    with pytest.raises(MtpError) as caught:
        read_entries(path)
    said = str(caught.value)
    assert "\n" not in said
    for word in (str(path), *words):
        assert word in said, said


@pytest.mark.parametrize("length", [67, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(length: int, pair: Folders, tmp_path: Path) -> None:
    shard(pair[0] / "model.safetensors", {}, length=length)
    refused(*pair, tmp_path / "out", "model.safetensors", str(length))


def test_every_good_file_passes(tiny: dict[str, Path], tmp_path: Path) -> None:
    for folder in tiny.values():
        for path in folder.glob("*.safetensors"):
            read_entries(path)
    save_file({"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    read_entries(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 7])
def test_an_index_that_points_outside(name: object, pair: Folders, tmp_path: Path) -> None:
    (pair[0] / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (pair[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(*pair, tmp_path / "out", "model.safetensors.index.json")


def test_links_that_lead_in_circles(pair: Folders, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        path = pair[0] / name
        kept = path.read_bytes()
        path.unlink()
        path.symlink_to(name)
        refused(*pair, tmp_path / "out", name)
        path.unlink()
        path.write_bytes(kept)
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", pair[1], tmp_path / "out", "loop", "not a folder")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "loop")])
    assert done.exit_code == 1
    assert "loop" in done.stderr


def test_a_pipe_where_a_file_should_be(pair: Folders, tmp_path: Path) -> None:
    (pair[0] / "model.safetensors").unlink()
    os.mkfifo(pair[0] / "model.safetensors")
    refused(*pair, tmp_path / "out", "model.safetensors", "not a file")
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(MtpError, match="not a file"):
        link.read_header(tmp_path / "x.gguf")


def test_a_truncated_shard_among_others(pair: Folders, tmp_path: Path) -> None:
    sharded = make_target(tmp_path / "sharded", shard="1MB")
    path = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 1)
    refused(sharded, pair[1], tmp_path / "out", path.name, "partly downloaded")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.float(), ("F32", "I64 or I32")),
        (lambda t: t.to(torch.int16), ("I16",)),
        (lambda t: t[:-1], ("[3071]", "[3072]")),
        (lambda t: t * 0, ("every token once",)),
        (lambda t: t - 1, ("every token once",)),
        (lambda t: t + 2**40, ("every token once",)),
    ],
)
def test_a_token_ordering_of_another_kind(
    change: Callable[[torch.Tensor], torch.Tensor], words: tuple[str, ...], pair: Folders, tmp_path: Path
) -> None:
    edit_weights(pair[1], lambda w: w.update({ORDERING: change(w[ORDERING])}))
    refused(*pair, tmp_path / "out", ORDERING, *words)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[" * 100_000),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", BPE % "[1, 2]"),
        ("tokenizer.json", BPE % '{"a": 0}}, "added_tokens": [{}], "x": {'),
        ("tokenizer.json", '{"model": 3}'),
    ],
)
def test_json_of_another_kind(file: str, text: str, pair: Folders, tmp_path: Path) -> None:
    (pair[0] / file).write_text(text)
    refused(*pair, tmp_path / "out", file)


def test_values_of_another_kind_in_the_configuration(pair: Folders) -> None:
    """Each value of config.json in turn is another: it is refused in one line, or it can be planned."""
    path = pair[0] / "config.json"
    whole, refusals = json.loads(path.read_text()), 0
    others: list[Any] = ["x", [], {"a": 1}, -1, 1e400, None, True]
    for key in whole["text_config"]:
        for value in others:
            path.write_text(json.dumps({**whole, "text_config": {**whole["text_config"], key: value}}))
            try:
                with open_checkpoint(pair[0]) as opened:
                    plan.plan(opened.config, opened.index, "Q4_0")
            except MtpError as problem:
                refusals += 1
                assert "\n" not in str(problem)
    assert refusals > 100


def test_a_value_that_no_file_can_hold(pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda c: c["text_config"].update(max_position_embeddings=1 << 32))
    refused(*pair, tmp_path / "out", "config.json", "4294967296", "context_length")
    edit_config(pair[0], lambda c: c["text_config"].update(max_position_embeddings=-1))
    refused(*pair, tmp_path / "out", "config.json", "-1", "max_position_embeddings")


def test_a_tokenizer_of_another_size(pair: Folders, tmp_path: Path) -> None:
    for folder in pair:
        path = folder / "tokenizer.json"
        parsed = json.loads(path.read_text())
        parsed["added_tokens"].append({**parsed["added_tokens"][0], "content": "<more>", "id": 3072})
        path.write_text(json.dumps(parsed))
    refused(*pair, tmp_path / "out", "3073 tokens", "3072")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory with these options, where the machine allows that."""
    points = []

    def mount(options: str) -> Path:
        point = tmp_path / "mounted"
        point.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here: that needs root and CAP_SYS_ADMIN")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True)


def test_a_small_disk(pair: Folders, mounted: Callable[[str], Path]) -> None:
    """Too small for the weights: said before the first byte is written."""
    disk = mounted("size=1m")
    refused(*pair, disk / "out", "bytes to write", "1,048,576 free", "make room")


def test_a_disk_that_fills_up(pair: Folders, mounted: Callable[[str], Path]) -> None:
    """Room for the weights but not for the metadata before them: the write itself fails."""
    disk = mounted("size=8m")
    out = disk / "out"
    room = (
        "import shutil; real = shutil.disk_usage\nshutil.disk_usage = lambda p: real(p)._replace(free=10**12)\n" + MAIN
    )
    done = subprocess.run([*map(str, converting(pair, out, room))], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "bytes are needed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(disk.iterdir())


def test_an_output_that_is_read_only(pair: Folders, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=64m,ro")
    refused(*pair, disk / "out", "Read-only file system")


def test_an_output_that_is_a_file(pair: Folders, tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("mine")
    done = CliRunner().invoke(main, ["convert", *map(str, pair), "-o", str(path)])
    assert done.exit_code == 1
    assert str(path) in done.stderr
    assert path.read_text() == "mine"


FILES = ["Modelfile", "drafter-Q8_0.gguf", "target-F32.gguf"]


# Converts again and again, and is killed before that call of the system whose number it reads; 0 for none.
KILLED = """
import itertools, os, signal, sys
from gemma_mtp.convert import checkpoint, convert_pair, plan, vocab, write

def counted(call):
    def counting(*args, **named):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **named)
    return counting

for name in ("mkdir", "open", "ftruncate", "pwrite", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
for line in sys.stdin:
    calls, last = itertools.count(1), int(line)
    child = os.fork()
    if child == 0:
        convert_pair(*sys.argv[1:4], "F32")
        print(next(calls), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        print("killed", flush=True)
"""


def test_killed_at_any_moment(pair: Folders, tmp_path: Path) -> None:
    """kill -9 at 20 moments from first to last: no output file, and nothing left after the next run."""
    out, moments, left = tmp_path / "out", 20, 0

    def converted(folder: Path, moments: list[int]) -> Iterator[str]:
        """What became of a conversion at each moment."""
        with started([sys.executable, "-c", KILLED, *pair, folder], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            for moment in moments:
                process.stdin.write(f"{moment}\n")
                process.stdin.flush()
                yield process.stdout.readline().strip()

    (calls,) = map(int, converted(tmp_path / "whole", [0]))
    assert calls > 3 * moments
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for became in converted(out, [1 + calls * each // moments for each in range(moments)]):
        assert became == "killed"
        found = sorted(path.name for path in out.iterdir() if path.name != "notes.txt")
        assert not [name for name in found if not name.startswith(PREFIX)], found
        left += bool(found)
    assert left > moments / 2
    done = CliRunner().invoke(main, ["convert", *map(str, pair), "-o", str(out), "-q", "F32"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "notes.txt"])


def test_killed_between_two_moves(pair: Folders, tmp_path: Path) -> None:
    """All files were complete and one had moved: the next run brings the others."""
    out = tmp_path / "out"
    code = (
        "import os, signal; from pathlib import Path; from gemma_mtp.convert import convert_pair; real = Path.replace\n"
        "def replace(self, to):\n"
        "    if self.name == 'target-F32.gguf': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, to)\n"
        "Path.replace = replace\n"
        f"convert_pair({str(pair[0])!r}, {str(pair[1])!r}, {str(out)!r}, 'F32')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (out / "target-F32.gguf").exists()
    done = CliRunner().invoke(main, ["convert", *map(str, pair), "-o", str(out), "-q", "F32"])
    assert done.exit_code == 1
    assert "already holds" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0


def test_two_at_once_leave_each_other_alone(pair: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(converting(pair, out, STOPPING), stdin=PIPE, stdout=PIPE, stderr=PIPE) as first:
        said(first.stdout, "at work")
        done = CliRunner().invoke(main, ["convert", *map(str, pair), "-o", str(out), "-q", "F32", "--name", "other"])
        assert done.exit_code == 0, done.output
        assert len(list(out.glob(f"{PREFIX}*"))) == 1
        status, _, told = ended(first)
        assert (status, told) == (0, "")
    assert {*FILES, "other-F32.gguf", "other-assistant-Q8_0.gguf"} == {path.name for path in out.iterdir()}
