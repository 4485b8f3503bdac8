"""GGUF files under any name and behind links: what lies in a folder, and the drafter that belongs to a target there."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from gemma_mtp.convert import Pair, link
from gemma_mtp.convert.gguf_io import folder
from gemma_mtp.convert.gguf_io.read import read
from gemma_mtp.convert.integrity import verify_files
from gemma_mtp.runtime.cli.main import main

HASHES = "a" * 64, "b" * 64


def ollama(pair: Pair, root: Path) -> tuple[Path, Path]:
    """Blobs as Ollama keeps them."""
    blobs = [root / f"sha256-{each}" for each in HASHES]
    for blob, path in zip(blobs, (pair.target, pair.drafter), strict=True):
        shutil.copy(path, blob)
    (root / "sha256-cccc").write_text("{}")
    return blobs[0], blobs[1]


def upper(pair: Pair, root: Path) -> tuple[Path, Path]:
    made = root / "T.GGUF", root / "D.Gguf"
    for path, copy in zip((pair.target, pair.drafter), made, strict=True):
        shutil.copy(path, copy)
    return made


def behind_a_link(pair: Pair, root: Path) -> tuple[Path, Path]:
    """A link to the target alone, by way of another link, from a folder that holds nothing else."""
    for name in ("models", "more", "here"):
        (root / name).mkdir()
    for path in (pair.target, pair.drafter):
        shutil.copy(path, root / "models" / f"x{path.name}")
    (root / "more" / "t.gguf").symlink_to(Path("..") / "models" / f"x{pair.target.name}")
    (root / "here" / "model").symlink_to(root / "more" / "t.gguf")
    return root / "here" / "model", root / "models" / f"x{pair.drafter.name}"


def beside_a_link_between(pair: Pair, root: Path) -> tuple[Path, Path]:
    """The drafter lies where the first link leads to, which is a link itself."""
    target, drafter = behind_a_link(pair, root)
    return target, Path(shutil.move(drafter, root / "more"))


def cached(pair: Pair, root: Path) -> tuple[Path, Path]:
    """A repository in the Hugging Face cache: snapshots of links into blobs that have no ending."""
    repository = root / "models--me--x"
    snapshot = repository / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, path in zip(HASHES, (pair.target, pair.drafter), strict=True):
        shutil.copy(path, repository / "blobs" / name)
        (snapshot / f"x{path.name}").symlink_to(Path("..", "..", "blobs", name))
    return snapshot / f"x{pair.target.name}", snapshot / f"x{pair.drafter.name}"


def blob_of_a_repository(pair: Pair, root: Path) -> tuple[Path, Path]:
    target, drafter = cached(pair, root)
    return target.resolve(), drafter.resolve()


def other_revision(pair: Pair, root: Path) -> tuple[Path, Path]:
    """The drafter came with another revision, into a folder of it."""
    target, drafter = cached(pair, root)
    elsewhere = target.parents[1] / "5678" / "mtp"
    elsewhere.mkdir(parents=True)
    (elsewhere / "d.gguf").symlink_to(drafter.resolve())
    drafter.unlink()
    return target, elsewhere / "d.gguf"


def cached_without_links(pair: Pair, root: Path) -> tuple[Path, Path]:
    """As on Windows; and the target in a folder of the repository, the drafter in another."""
    snapshot = root / "models--me--x" / "snapshots" / "1234"
    for name in ("Q8_0", "mtp"):
        (snapshot / name).mkdir(parents=True)
    return (
        Path(shutil.copy(pair.target, snapshot / "Q8_0" / "t.gguf")),
        Path(shutil.copy(pair.drafter, snapshot / "mtp" / "d.gguf")),
    )


def beside_both(pair: Pair, root: Path) -> tuple[Path, Path]:
    """One beside the link and one beside the file: that of the folder that was named."""
    target, _ = behind_a_link(pair, root)
    return target, Path(shutil.copy(pair.drafter, root / "here" / "z"))


def relative(pair: Pair, root: Path) -> tuple[Path, Path]:
    upper(pair, root)
    return Path("T.GGUF"), Path("D.Gguf")


LAYOUTS = (
    ollama, upper, behind_a_link, beside_a_link_between, cached, blob_of_a_repository, other_revision,
    cached_without_links, beside_both, relative,
)  # fmt: skip


@pytest.mark.parametrize("lay", LAYOUTS, ids=lambda lay: lay.__name__)
def test_a_drafter_is_found(
    lay: Callable[[Pair, Path], tuple[Path, Path]], tiny_f32: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target, drafter = lay(tiny_f32, tmp_path)
    assert link.find_drafter(target) == drafter
    assert verify_files(target)["pairs"] == {str(target): str(drafter)}
    drafter.unlink()
    for other in (
        drafter.resolve(),
        *tmp_path.rglob("*assistant*"),
        *tmp_path.rglob("*ordered*"),
        *tmp_path.rglob("b" * 64),
    ):
        other.unlink(missing_ok=True)
    assert link.find_drafter(target) is None


@pytest.mark.parametrize("lay", [ollama, upper, cached], ids=lambda lay: lay.__name__)
def test_a_folder_is_verified(lay: Callable[[Pair, Path], tuple[Path, Path]], tiny_f32: Pair, tmp_path: Path) -> None:
    """All GGUF files that lie in it, and no others."""
    target, drafter = lay(tiny_f32, tmp_path)
    for place in {target.parent, target.resolve().parent}:
        done = CliRunner().invoke(main, ["verify", str(place)])
        assert done.exit_code == 0, done.output
        assert done.stdout.count("ok ") == 3
    if lay is cached:  # the blob that a link in the snapshot leads to is gone
        drafter.resolve().unlink()
        assert drafter.name in CliRunner().invoke(main, ["verify", str(target.parent)]).stderr
    else:
        drafter.write_bytes(drafter.read_bytes()[:-1])
        assert drafter.name in CliRunner().invoke(main, ["verify", str(target.parent)]).stderr


def test_what_is_no_file_is_passed_over(tiny_f32: Pair, tmp_path: Path) -> None:
    """Nothing is waited for, and nothing that cannot be read stops the search."""
    target, drafter = ollama(tiny_f32, tmp_path)
    for name in ("0-fifo", "0-fifo.gguf", link.read_header(target).metadata[link.KEY_PEER]):
        os.mkfifo(tmp_path / name)
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{short}/socket")
        Path(short, "socket").rename(tmp_path / "0-socket.gguf")
    (tmp_path / "0-folder.gguf").mkdir()
    (tmp_path / "0-loop").symlink_to("0-loop")
    (tmp_path / "0-away").symlink_to("nowhere")
    (tmp_path / "0-empty").touch()
    (tmp_path / "0-cut").write_bytes(drafter.read_bytes()[:5000])
    assert link.find_drafter(target) == drafter
    for name in ("0-cut", "0-loop"):
        (tmp_path / name).unlink()
    assert {Path(each["file"]) for each in verify_files(tmp_path)["files"]} == {target, drafter}
    shutil.copy(target, tmp_path / "locked.gguf")
    (tmp_path / "locked.gguf").chmod(0)
    assert link.find_drafter(target) == drafter


def test_what_is_named_gguf_must_be_one(tiny_f32: Pair, tmp_path: Path) -> None:
    ollama(tiny_f32, tmp_path)
    (tmp_path / "text.GGUF").write_text("<html>")
    assert "text.GGUF is not a GGUF file" in CliRunner().invoke(main, ["verify", str(tmp_path)]).stderr


def test_of_many_files_few_are_opened(tiny_f32: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are read of the target and of its own drafter, not of those of others, nor of what begins otherwise."""
    target, drafter = ollama(tiny_f32, tmp_path)
    content = drafter.read_bytes()
    own = str(link.read_header(drafter).metadata[link.KEY_TARGET]).encode()
    for number in range(20):
        (tmp_path / f"0-other-{number}").write_bytes(content.replace(own, f"{number:064}".encode()))
    for number in range(2000):
        (tmp_path / f"0-blob-{number}").write_bytes(b"GGUF" + bytes(60) if number % 2 else b"something else")
    seen: list[Path] = []

    def reading(path: Path) -> link.Header:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(link, "read", reading)
    assert link.find_drafter(target) == drafter
    assert seen == [target, drafter]
    assert len(folder.gguf_files(tmp_path)) == 1000 + 20 + 2


def test_of_two_that_fit_the_first_name_is_taken(tiny_f32: Pair, tmp_path: Path) -> None:
    target, drafter = upper(tiny_f32, tmp_path)
    for name in ("sha256-ff", "b", "c.gguf"):
        shutil.copy(drafter, tmp_path / name)
    assert link.find_drafter(target) == drafter == tmp_path / "D.Gguf"
    named = shutil.copy(drafter, tmp_path / link.read_header(target).metadata[link.KEY_PEER])
    assert link.find_drafter(target) == named
