"""Files that upstream's converter and quantizer made: linked, found, checked, and never harmed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.convert.relink import link_files
from gemma_mtp.convert.staging import PREFIX
from gemma_mtp.runtime.cli.main import main
from gemma_mtp.runtime.pair import drafter_of
from gguf_files import copy_metadata, copy_tensors, finish
from tiny import PAIR, make_drafter
from upstream import Upstream, data, plain

TARGET, DRAFTER = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def theirs(converted: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with upstream's files of the demo pair: the target as BF16 and Q4_0, the drafter as Q8_0."""
    folder = tmp_path_factory.mktemp("theirs")
    for source, quant in ((TARGET, "BF16"), (TARGET, "Q4_0"), (DRAFTER, "Q8_0")):
        shutil.copy(converted(source, quant), folder / f"{source.name}-{quant}.gguf")
    return folder


@pytest.fixture
def files(theirs: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    shutil.copytree(theirs, tmp_path / "files")
    folder = tmp_path / "files"
    return folder / "gemma-4-demo-BF16.gguf", folder / "gemma-4-demo-Q4_0.gguf", folder / f"{DRAFTER.name}-Q8_0.gguf"


def test_one_link_serves_every_quantization(files: tuple[Path, Path, Path]) -> None:
    bf16, q4, drafter = files
    before = {path: path.read_bytes() for path in files}
    assert link.find_drafter(q4) is None
    done = run("link", q4, drafter)
    assert done.exit_code == 0, done.output
    linked = drafter.with_name(f"{drafter.stem}-linked.gguf")
    assert link.find_drafter(q4) == link.find_drafter(bf16) == linked
    assert drafter_of(bf16, "auto") == linked
    assert {path: path.read_bytes() for path in files} == before
    assert run("verify", q4).exit_code == 0
    assert f"DRAFT ./{linked.name}" in run("modelfile", q4).stdout


def test_all_but_the_link_is_copied(files: tuple[Path, Path, Path]) -> None:
    _, target, drafter = files
    linked = link_files(target, drafter)
    old, new = link.read_header(drafter), link.read_header(linked)
    assert list(new.tensors) == list(old.tensors)
    for name in old.tensors:
        assert data(new, name) == data(old, name), name
    ours = {key: plain(value) for key, value in new.metadata.items() if not key.startswith("mtp.")}
    assert ours == {key: plain(value) for key, value in old.metadata.items()}
    assert new.metadata[link.KEY_ROLE] == "drafter"
    from gguf import GGUFReader

    assert len(GGUFReader(linked).tensors) == len(old.tensors)


def test_in_place(files: tuple[Path, Path, Path]) -> None:
    _, target, drafter = files
    drafter.chmod(0o640)
    assert run("link", target, drafter, "--in-place").exit_code == 0
    assert link.find_drafter(target) == drafter
    assert drafter.stat().st_mode & 0o777 == 0o640
    first = drafter.read_bytes()
    assert run("link", target, drafter, "--in-place").exit_code == 0  # again is no harm
    assert drafter.read_bytes() == first
    assert sorted(path.name for path in drafter.parent.iterdir()) == sorted(path.name for path in files)


def test_in_place_leaves_links_into_caches_alone(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, target, drafter = files
    name = tmp_path / "link.gguf"
    name.symlink_to(drafter)
    before = drafter.read_bytes()
    done = run("link", target, name, "--in-place")
    assert done.exit_code == 1
    assert str(drafter) in done.stderr
    assert name.is_symlink()
    assert drafter.read_bytes() == before


def test_the_ordered_head_comes_from_the_folder(files: tuple[Path, Path, Path], demo: Pair) -> None:
    _, target, drafter = files
    done = run("link", target, drafter, "--in-place", "--ordered-from", DRAFTER)
    assert done.exit_code == 0, done.output
    ours, reference = link.read_header(drafter), link.read_header(demo.drafter)
    for key in (link.KEY_CENTROIDS, link.KEY_ORDERING):
        assert ours.metadata[key].dtype == reference.metadata[key].dtype
        assert np.array_equal(ours.metadata[key], reference.metadata[key])
    for key in (link.KEY_N_CENTROIDS, link.KEY_TOP_K):
        assert ours.metadata[key] == reference.metadata[key]


def test_an_ordered_head_of_another_drafter(
    files: tuple[Path, Path, Path], tiny: dict[str, Path], tmp_path: Path
) -> None:
    _, target, drafter = files
    for folder, words in ((tiny["ordered"], "differs"), (tiny["dense"], "ordered embeddings"), (TARGET, "ordered")):
        done = run("link", target, drafter, "-o", tmp_path / "out.gguf", "--ordered-from", folder)
        assert done.exit_code == 1
        assert words in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_what_cannot_be_linked(files: tuple[Path, Path, Path], tiny: dict[str, Path], tmp_path: Path) -> None:
    bf16, target, drafter = files
    other = convert_pair(
        tiny["target"], make_drafter(tmp_path / "o", ordered=False), tmp_path / "other", "Q4_0", "Q4_0"
    )
    for command, words in (
        (("link", target, bf16), "not a drafter"),
        (("link", drafter, drafter), "must be 'gemma4'"),
        (("link", target, other.drafter), "made for the target|does not fit"),
        (("link", target, other.drafter, "--force"), "does not fit"),
        (("link", target, drafter, "-o", drafter), "--in-place"),
        (("link", target, drafter, "-o", target), "one of the two"),
        (("link", target, drafter, "-o", bf16), "already holds"),
        (("link", target, tmp_path / "none.gguf"), "No such file"),
    ):
        done = run(*command)
        assert done.exit_code == 1, command
        assert re.search(words, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1
    before = drafter.read_bytes()
    spoilt = bytearray(before)
    header = link.read_header(drafter)
    spoilt[header.tensors["token_embd.weight"].offset + 1] = 0x7C
    drafter.write_bytes(spoilt)
    assert "token_embd.weight" in run("link", target, drafter).stderr


def test_where_a_linked_drafter_is_not_found_it_is_said(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Beside a link to the target, and beside the target itself, it is found."""
    _, target, drafter = files
    (tmp_path / "here").mkdir()
    (tmp_path / "away").mkdir()
    shown = tmp_path / "here" / "t.gguf"
    shown.symlink_to(target)
    for out, found in ((shown.with_name("d"), True), (target.with_name("d"), True), (tmp_path / "away" / "d", False)):
        done = run("link", shown, drafter, "-o", out)
        assert done.exit_code == 0, done.stderr
        assert done.stderr == ("" if found else f"move it into {shown.parent}, where it is found by itself\n")
        assert link.find_drafter(shown) == (out if found else None)
        out.unlink()


def test_killed_while_linking(files: tuple[Path, Path, Path]) -> None:
    _, target, drafter = files
    code = (
        "import os, signal; from gemma_mtp.convert import relink\n"
        "from pathlib import Path\n"
        "relink.seal = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"relink.link_files(Path({str(target)!r}), Path({str(drafter)!r}), in_place=True)"
    )
    before = drafter.read_bytes()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert drafter.read_bytes() == before
    assert [path for path in drafter.parent.iterdir() if path.name.startswith(PREFIX)]
    assert run("link", target, drafter, "--in-place").exit_code == 0
    assert sorted(path.name for path in drafter.parent.iterdir()) == sorted(path.name for path in files)


def test_a_split_target(files: tuple[Path, Path, Path]) -> None:
    """The weights of a target that came in several files are those of the whole one, and its drafter is found."""
    from gguf import GGUFReader, GGUFWriter

    _, target, drafter = files
    writer = GGUFWriter(target.with_name("part.gguf"), link.TARGET_ARCH, split_max_tensors=20)
    reader = GGUFReader(target)
    copy_metadata(reader, writer)
    copy_tensors(reader, writer)
    finish(writer)
    parts = sorted(target.parent.glob("part-*.gguf"))
    assert len(parts) > 1
    assert link.weights_identity(link.read_header(parts[0])) == link.weights_identity(link.read_header(target))
    linked = link_files(parts[0], drafter)
    assert link.find_drafter(parts[0]) == link.find_drafter(target) == linked
    parts[1].unlink()
    done = run("link", parts[0], drafter, "-o", drafter.with_name("other.gguf"))
    assert done.exit_code == 1
    assert parts[1].name in done.stderr


def test_other_weights_are_another_target(theirs: Path, tiny_f32: Pair) -> None:
    found = {link.weights_identity(link.read_header(path)) for path in theirs.glob("gemma-4-demo-[BQ]*.gguf")}
    assert len(found) == 1
    assert link.weights_identity(link.read_header(tiny_f32.target)) not in found


def test_a_wrong_byte_is_found_by_its_hash(demo: Pair, tmp_path: Path) -> None:
    for path in (demo.target, demo.drafter):
        shutil.copy(path, tmp_path)
    found = json.loads(run("verify", tmp_path, "--json").stdout)
    assert {file["hashed"] for file in found["files"]} == {49, len(link.read_header(demo.target).tensors)}
    path = tmp_path / demo.target.name
    tensor = link.read_header(path).tensors["blk.1.ffn_up.weight"]
    whole = bytearray(path.read_bytes())
    whole[tensor.offset + 5] ^= 1  # a quantized value, not a scale: every block stays finite
    path.write_bytes(whole)
    done = run("verify", tmp_path)
    assert done.exit_code == 1
    assert "blk.1.ffn_up.weight" in done.stderr
    assert "SHA-256" in done.stderr


def test_inspect_fits_the_terminal(demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("inspect", demo.drafter).stdout.splitlines()
    assert all(len(line) <= 80 for line in shown)
    keys = [line.split("  ")[0] for line in shown[1:]]
    assert len(keys) == len(set(keys))
    assert "mtp.ordered.token_ordering" in keys
    assert any(line.startswith("link: ordered head") and line.endswith("true") for line in shown)


def test_inspect_shows_what_is_wrong(demo: Pair, tmp_path: Path) -> None:
    """Metadata that makes no sense, with an escape sequence in it, is shown and does not steer the terminal."""
    path = tmp_path / "x.gguf"
    whole = demo.target.read_bytes()
    key = b"gemma4.attention.head_count\x04\0\0\0"
    at = whole.index(key) + len(key)
    whole = whole[:at] + b"\0\0\0\0" + whole[at + 4 :]
    name = link.read_header(demo.target).metadata["general.name"].encode()
    path.write_bytes(whole.replace(name, (b"\x1b[31m" + name)[: len(name)], 1))
    done = run("inspect", path)
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert "head_count is 0, wanted a number from 1" in done.stdout
    assert run("verify", path).exit_code == 1
