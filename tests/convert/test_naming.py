"""What files and models are called, whatever their folders are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from faulty import Folders, refused
from gemma_mtp.convert import MtpError, convert_pair, link, plan_pair
from gemma_mtp.convert.modelfile import SMALL, modelfile
from gemma_mtp.convert.naming import check_names, name_of, stems
from gemma_mtp.runtime.cli.main import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DESCRIBED = ("name", "basename", "finetune", "version", "organization", "size_label")


def described(path: Path) -> dict[str, str]:
    metadata = link.read_header(path).metadata
    return {key: metadata[f"general.{key}"] for key in DESCRIBED if f"general.{key}" in metadata}


def test_a_snapshot_is_called_as_its_repository(pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as it is, as ".", through a link, and as an ordinary folder of that name: the files are the same."""
    snapshot = tmp_path / "hub" / "models--google--gemma-4-E2B-it" / "snapshots" / COMMIT
    shutil.copytree(pair[0], snapshot)
    plain = tmp_path / "gemma-4-E2B-it"
    shutil.copytree(pair[0], plain)
    (tmp_path / "alias").symlink_to(snapshot)
    wanted = convert_pair(plain, pair[1], tmp_path / "wanted", "Q8_0")
    assert described(wanted.target)["name"] == "Gemma 4 E2B It"
    given: list[tuple[str | Path, Path]] = [(snapshot, tmp_path), (".", snapshot), (tmp_path / "alias", tmp_path)]
    for number, (source, work) in enumerate(given):
        monkeypatch.chdir(work)
        made = convert_pair(source, pair[1], tmp_path / f"out{number}", "Q8_0")
        assert made.target.name == wanted.target.name
        assert made.target.read_bytes() == wanted.target.read_bytes()


def test_what_tells_nothing_of_a_model_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "my-model"
    kept = real / "snapshots" / COMMIT
    kept.mkdir(parents=True)
    (tmp_path / "alias").symlink_to(real)
    monkeypatch.chdir(kept)
    assert [name_of(each) for each in (real, tmp_path / "alias", kept, ".", "../..")] == ["my-model"] * 5
    assert name_of("org/other@v1") == "other"
    with pytest.raises(MtpError, match="--name"):
        stems(Path("/"), kept, None)


def test_a_name_is_that_of_files_and_models(pair: Folders, tmp_path: Path) -> None:
    made = convert_pair(*pair, tmp_path, "Q8_0", name="My Model")
    assert (made.target.name, made.drafter.name) == ("My Model-Q8_0.gguf", "My Model-assistant-Q8_0.gguf")
    assert described(made.target)["name"] == "My Model"
    assert described(made.drafter)["name"] == "My Model-assistant"


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (b"caf\xe9", "caf%E9"),
        (b"two\nlines\x1b[1m", "two%0Alines%1B[1m"),
        ("a\u2028b\x85".encode(), "a%E2%80%A8b%C2%85"),
    ],
)
def test_names_that_are_no_line_of_text(given: bytes, wanted: str, pair: Folders, tmp_path: Path) -> None:
    folder = pair[0].rename(tmp_path / os.fsdecode(given))
    done = CliRunner().invoke(main, ["convert", str(folder), str(pair[1]), "-o", str(tmp_path / "out"), "-q", "Q8_0"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / f"{wanted}-Q8_0.gguf").is_file()
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM ./{wanted}-Q8_0.gguf", "DRAFT ./drafter-Q8_0.gguf"]
    assert described(tmp_path / "out" / f"{wanted}-Q8_0.gguf")["name"].isprintable()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_an_output_that_is_not_utf8(pair: Folders, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"out\xe9")
    for command in (["convert", *map(str, pair), "-o", str(out), "-q", "Q8_0"], ["verify", str(out)]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "drafter-Q8_0.gguf", "target-Q8_0.gguf"]


@pytest.mark.parametrize("name", ["", ".", "..", " ", ". .", "a/b", "a\nb", "a\x00b", "\udce9", "\u2029"])
def test_a_name_that_cannot_begin_a_file(name: str, pair: Folders, tmp_path: Path) -> None:
    refused(*pair, tmp_path / "out", repr(name), "plain file name", "--name", options=("--name", name))


def test_names_that_are_too_long(pair: Folders, tmp_path: Path) -> None:
    """With all that is put behind them, in bytes; the longest that fit are written."""
    longest = "x" * (255 - len("-assistant-Q8_0.gguf"))
    options = ("-q", "Q8_0", "--name")
    refused(*pair, tmp_path / "out", "256 bytes", "pass --name", options=(*options, f"{longest}x"))
    refused(*pair, tmp_path / "out", "bytes", "pass --name", options=(*options, longest, "--split-max-size", "1M"))
    refused(*pair, tmp_path / "out", "bytes", "pass --name", options=(*options, "ü" * 128, "--dry-run"))
    made = convert_pair(*pair, tmp_path / "out", "Q8_0", name=longest)
    assert len(made.drafter.name) == 255
    folder = pair[0].rename(tmp_path / ("模" * 83))
    refused(folder, pair[1], tmp_path / "no", "bytes", "pass --name")
    assert plan_pair(folder, pair[1], name="x").first == ("x-Q4_K_M.gguf", "x-assistant-Q8_0.gguf")


def test_names_that_some_disks_take_for_equal(tmp_path: Path) -> None:
    for first, second in (("Model", "model"), ("STRASSE", "straße"), ("u\u0308x", "üx"), ("same", "same")):
        (tmp_path / "1" / first).mkdir(parents=True)
        (tmp_path / "2" / second).mkdir(parents=True)
        assert stems(tmp_path / "1" / first, tmp_path / "2" / second, None) == (first, f"{second}-assistant")
    with pytest.raises(MtpError, match="two files"):
        check_names(["mmproj-a-F16.gguf", "MMPROJ-A-F16.gguf"])


@pytest.mark.parametrize("name", ["a\nFROM /etc/passwd", "a\rb.gguf", "\udce9.gguf"])
def test_a_modelfile_has_one_line_for_a_name(name: str) -> None:
    for names in ((name, "d.gguf"), ("t.gguf", name)):
        with pytest.raises(MtpError, match="rename it"):
            modelfile([names[0]], [names[1]], {}, SMALL)
    with pytest.raises(MtpError, match="rename it"):
        modelfile(["t.gguf"], ["d.gguf"], {}, SMALL, name)
