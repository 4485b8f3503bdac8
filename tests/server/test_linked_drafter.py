"""llama-server finds the linked drafter of its target, as `Llama` does, and says in one line what it drafts with."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import llama_cpp
import pytest
from children import ended, post, server, serving, started
from gemma_mtp.convert import Pair, convert_pair, link
from gguf import GGUFReader, GGUFWriter
from gguf_files import copy_metadata, copy_tensors, finish
from prompts import PROMPT

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
BODY = {"prompt": PROMPT, "n_predict": 48, "temperature": 0.0}


def answered(target: Path, log: Path, *options: object) -> tuple[dict[str, Any], str]:
    """What a server answers that is given a target alone, and what it said meanwhile; it drafts in every round."""
    with serving(SERVER, log, "-m", target, "-c", 512, "--spec-draft-adaptive", "off", *options) as url:
        return post(f"{url}/completion", BODY), log.read_text()


def refused(*arguments: object) -> list[str]:
    """The errors of a server that does not start."""
    with started([SERVER, *arguments, "-c", "512", "--port", "0"], stdout=PIPE, stderr=STDOUT) as process:
        status, told, _ = ended(process)
    assert status == 1
    return re.findall(r"^\S+ E (.*)$", told, re.MULTILINE)


def test_a_target_alone_drafts_with_its_drafter_and_gives_the_same_text(demo: Pair, tmp_path: Path) -> None:
    answer, log = answered(demo.target, tmp_path / "log")
    assert answer["timings"]["draft_n_accepted"] > answer["timings"]["draft_n"] / 3 > 0
    lines = [line for line in log.splitlines() if "drafting with" in line]
    assert len(lines) == 1
    assert f"'{demo.drafter}', found beside the target" in lines[0]
    assert not re.search(r"^\S+ E ", log, re.MULTILINE)
    assert "failed to measure" not in log
    for place, off in enumerate([("--spec-draft-model", "none"), ("--spec-type", "none")]):
        plain, log = answered(demo.target, tmp_path / f"log {place}", *off)
        assert plain["content"] == answer["content"]
        assert "draft_n" not in plain["timings"]
        assert "drafting with" not in log


def test_a_drafter_alone_needs_no_type(demo: Pair, tmp_path: Path) -> None:
    alone = Path(shutil.copy(demo.target, tmp_path / "target.gguf"))
    answer, log = answered(alone, tmp_path / "log", "--spec-draft-model", demo.drafter)
    assert answer["timings"]["draft_n_accepted"] > 0
    assert f"'{demo.drafter}', as named" in log
    with server(SERVER, tmp_path / "other log", "-m", alone, "-c", 512):
        said = (tmp_path / "other log").read_text()
    assert f"no linked drafter beside {alone}; put '{demo.drafter.name}' there" in said
    assert refused("-m", alone, "--spec-type", "draft-mtp") == [
        f"srv  llama_server: error: no linked drafter beside {alone}; put '{demo.drafter.name}' there; or name one "
        "with --spec-draft-model"
    ]


def places(demo: Pair, folder: Path, tiny: Pair) -> dict[str, Callable[[], Path]]:
    """Where a target finds its drafter: by what is made there, whose result is the path to give."""

    def linked() -> Path:
        (folder / "link.gguf").symlink_to(demo.target)
        return folder / "link.gguf"

    def renamed() -> Path:
        for file, name in ((tiny.drafter, "a.gguf"), (demo.drafter, "b"), (demo.target, "c.gguf")):
            os.link(file, folder / name)
        (folder / "aa.gguf").write_bytes(demo.drafter.read_bytes()[:9000])  # broken, and named by nobody
        return folder / "c.gguf"

    def cached() -> Path:
        snapshots = folder / "models--someone--gemma" / "snapshots"
        for revision, file in (("1", demo.drafter), ("2", demo.target)):
            (snapshots / revision / "Q8_0").mkdir(parents=True)
            (snapshots / revision / "Q8_0" / file.name).symlink_to(shutil.copy(file, folder / f"blob {revision}"))
        return snapshots / "2" / "Q8_0" / demo.target.name

    def of_others() -> Path:
        """Known by its weights: another converter's file, which tells of no checkpoint."""
        os.link(demo.drafter, folder / "drafter.gguf")
        reader, writer = GGUFReader(demo.target), GGUFWriter(folder / "theirs.gguf", "gemma4")
        copy_metadata(reader, writer, [name for name in reader.fields if name.startswith("mtp.")])
        copy_tensors(reader, writer)
        finish(writer)
        return folder / "theirs.gguf"

    return {"linked": linked, "renamed": renamed, "cached": cached, "of others": of_others}


@pytest.mark.parametrize("place", ["linked", "renamed", "cached", "of others"])
def test_it_is_found_where_llama_finds_it(place: str, demo: Pair, tiny_f32: Pair, tmp_path: Path) -> None:
    given = places(demo, tmp_path, tiny_f32)[place]()
    wanted = link.find_drafter(given)
    assert wanted is not None
    answer, log = answered(given, tmp_path / "log")
    assert answer["timings"]["draft_n_accepted"] > 0
    found = re.search(r"drafting with '(.*)', found", log)
    assert found is not None
    assert wanted.samefile(found[1])


def test_a_split_target_finds_it(tiny: dict[str, Path], tmp_path: Path) -> None:
    pair = convert_pair(tiny["target"], tiny["ordered"], tmp_path, "F32", "F32", split_max_size=200_000)
    assert "-00001-of-" in pair.target.name
    answer, log = answered(pair.target, tmp_path / "log")
    assert answer["timings"]["draft_n"] > 0
    assert pair.drafter.name in log


def test_a_file_of_ollamas_store_has_the_drafter_that_ollama_gives_it(demo: Pair, tmp_path: Path) -> None:
    """A model without DRAFT lies beside the drafters of all others, and is run without."""
    for file, number in ((demo.target, "a"), (demo.drafter, "b")):
        os.link(file, tmp_path / f"sha256-{number * 64}")
    answer, log = answered(tmp_path / f"sha256-{'a' * 64}", tmp_path / "log")
    assert "draft_n" not in answer["timings"]
    assert "linked drafter" not in log


def test_another_targets_drafter_is_refused_in_one_line(demo: Pair, tiny_f32: Pair, tmp_path: Path) -> None:
    alone = Path(shutil.copy(demo.target, tmp_path / "target.gguf"))
    told = refused("-m", alone, "--spec-draft-model", tiny_f32.drafter)
    assert len(told) == 1
    assert f"{tiny_f32.drafter.name} was made for the target with fingerprint" in told[0]
    os.link(tiny_f32.drafter, tmp_path / "drafter.gguf")
    _, log = answered(alone, tmp_path / "log")
    assert f"no linked drafter beside {alone}: {tmp_path / 'drafter.gguf'} is of another target" in log


def test_what_does_not_fit_is_said_with_what_to_lower(demo: Pair, tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    needs = []
    for place, options in enumerate([(), ("-fitt", memory - 60), ("-fitt", memory)]):
        log = tmp_path / f"log {place}"
        with server(SERVER, log, "-m", demo.target, "-c", 65536, *options):
            needs.append(re.search(r"target and drafter need .*", log.read_text()))
    enough, some, none = needs
    assert enough is None
    assert some is not None and none is not None
    lower = re.search(r"at a context of 65536, \d+ MiB more than there is: lower -c to (\d+); the drafter", some[0])
    assert lower is not None, some[0]
    assert 0 < int(lower[1]) < 65536
    assert "take a smaller quantization; the drafter alone is" in none[0]
    log = tmp_path / "log"
    with server(SERVER, log, "-m", demo.target, "-c", lower[1], "-fitt", memory - 60):
        assert "target and drafter need" not in log.read_text()
