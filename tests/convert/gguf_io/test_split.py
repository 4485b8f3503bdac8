"""Models in several files: each part says whose it is, and what does not belong together is told apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.convert.gguf_io.read import read
from gemma_mtp.convert.gguf_io.split import KEY_COUNT, KEY_PLACE, KEY_TENSORS
from gemma_mtp.convert.integrity import verify_files
from gemma_mtp.convert.relink import rewrite
from gemma_mtp.runtime.cli.main import main
from gemma_mtp.runtime.pair import drafter_of
from tiny import make_target

SIZE = 1_500_000


@pytest.fixture(scope="module")
def split(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    out = tmp_path_factory.mktemp("split")
    return convert_pair(tiny["target"], tiny["dense"], out, "Q8_0", name="x", split_max_size=SIZE)


@pytest.fixture(scope="module")
def others(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Splits under the same names: of another target, of the same in other types, and in parts of another size."""
    root = tmp_path_factory.mktemp("others")
    target = make_target(root / "target", seed=5)
    made = {
        "target": convert_pair(target, tiny["dense"], root / "1", "Q8_0", name="x", split_max_size=SIZE),
        "types": convert_pair(tiny["target"], tiny["dense"], root / "2", "Q5_0", name="x", split_max_size=900_000),
        "sizes": convert_pair(tiny["target"], tiny["dense"], root / "3", "Q8_0", name="x", split_max_size=SIZE * 2),
    }
    for path in (root / "2").iterdir():
        path.rename(path.with_name(path.name.replace("Q5_0", "Q8_0")))
    return made


@pytest.fixture
def parts(split: Pair, tmp_path: Path) -> list[Path]:
    """A copy of a split pair: the files of its target."""
    out = tmp_path / "out"
    shutil.copytree(split.target.parent, out)
    return sorted(out.glob("x-Q8_0-*.gguf"))


def refused(path: Path, *words: str) -> None:
    """By verify of the file and of its folder, and by what loads it."""
    said = [CliRunner().invoke(main, ["verify", str(place)]) for place in (path, path.parent)]
    assert [done.exit_code for done in said] == [1, 1]
    with pytest.raises(link.MtpError) as caught:
        drafter_of(path, "auto")
    for text in (*(done.stderr for done in said), f"{caught.value}\n"):
        assert text.count("\n") == 1
        for word in words:
            assert word in text, text


def test_each_part_says_whose_it_is(split: Pair, tiny: dict[str, Path], tmp_path: Path) -> None:
    parts = [read(path) for path in split.files if "assistant" not in path.name]
    whole = convert_pair(tiny["target"], tiny["dense"], tmp_path, "Q8_0", name="x")
    assert len(parts) > 2
    for key in (link.KEY_VERSION, link.KEY_ROLE, link.KEY_SOURCE, link.KEY_SPLIT):
        assert len({part.metadata[key] for part in parts}) == 1
    assert parts[0].metadata[link.KEY_SOURCE] == read(whole.target).metadata[link.KEY_SOURCE]
    assert link.KEY_SPLIT not in read(whole.target).metadata
    # all else of a later part is what llama-gguf-split writes there, and the hashes
    ours = {link.KEY_VERSION, link.KEY_ROLE, link.KEY_SOURCE, link.KEY_SPLIT, link.KEY_HASHES}
    assert set(parts[1].metadata) == ours | {KEY_PLACE, KEY_COUNT, KEY_TENSORS}
    assert len({path.read_bytes()[-100:] for path in split.files}) == len(split.files)


def test_the_same_conversion_makes_the_same_parts(split: Pair, tiny: dict[str, Path], tmp_path: Path) -> None:
    again = convert_pair(tiny["target"], tiny["dense"], tmp_path, "Q8_0", name="x", split_max_size=SIZE)
    assert [path.read_bytes() for path in again.files] == [path.read_bytes() for path in split.files]


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    refused(parts[0], parts[1].name, f"part 2 of {len(parts)}, is missing")


def test_the_first_part_is_missing(parts: list[Path]) -> None:
    parts[0].unlink()
    refused(parts[1], parts[0].name, "part 1 of", "is missing")


def test_a_later_part_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(link.MtpError, match=r"is part 2 of \d; name the first part: .*x-Q8_0-00001-of-"):
        drafter_of(parts[1], "auto")
    for drafter in ("auto", None):
        with pytest.raises(link.MtpError, match="name the first part"):
            drafter_of(parts[1], drafter)
    for command in (
        ("verify", parts[1]),
        ("modelfile", parts[1]),
        ("link", parts[1], next(parts[0].parent.glob("*assistant*"))),
    ):
        assert "name the first part" in CliRunner().invoke(main, [*map(str, command)]).stderr


def test_a_part_of_another_target(parts: list[Path], others: dict[str, Pair]) -> None:
    for part in parts[1:]:
        kept = part.read_bytes()
        shutil.copy(others["target"].target.with_name(part.name), part)
        refused(parts[0], f"{part.name}, part {parts.index(part) + 1}, is of another conversion", link.KEY_SOURCE)
        part.write_bytes(kept)
    assert verify_files(parts[0])


@pytest.mark.parametrize("other", ["types", "sizes"])
def test_a_part_of_the_same_checkpoint_otherwise_converted(
    other: str, parts: list[Path], others: dict[str, Pair]
) -> None:
    theirs = sorted(others[other].target.parent.glob("x-Q8_0-*.gguf"))
    shutil.copy(theirs[1], parts[1])
    refused(parts[0], f"{parts[1].name}, part 2, is of another conversion")


def test_the_conversion_alone_tells_parts_apart(parts: list[Path], others: dict[str, Pair]) -> None:
    """Where nothing else does: as many parts, and the same tensors in them."""
    theirs = read(next(others["types"].target.parent.glob("x-Q8_0-00001-*"))).metadata
    assert theirs[link.KEY_SPLIT] != read(parts[0]).metadata[link.KEY_SPLIT]
    _rewritten(parts[1], {link.KEY_SPLIT: theirs[link.KEY_SPLIT]})
    refused(parts[0], "part 2, is of another conversion", link.KEY_SPLIT)


def test_parts_whose_names_were_swapped(parts: list[Path]) -> None:
    other = parts[1].with_name("aside")
    parts[1].rename(other)
    parts[2].rename(parts[1])
    other.rename(parts[2])
    refused(parts[0], f"{parts[1].name}, part 2 by its name, is part 3 of {len(parts)}")


@pytest.mark.parametrize(
    ("name", "stem"),
    [("model-{}.gguf", "model"), ("x-Q8_0-{:05}-of-00009.gguf", "x-Q8_0"), ("{}", "{}"), ("x.part{}.gguf", "x.part")],
)
def test_renamed_parts_are_refused(name: str, stem: str, parts: list[Path]) -> None:
    """With a name that they can all have."""
    count = len(parts)
    renamed = [part.rename(part.with_name(name.format(place))) for place, part in enumerate(parts, 1)]
    refused(renamed[0], f"part 1 of {count} under another name", f"rename it to {stem.format(1)}-00001-of-{count:05}.g")
    with pytest.raises(link.MtpError, match=f"rename it to {stem.format(2)}-00002-of-{count:05}.gguf"):
        drafter_of(renamed[1], "auto")


def test_a_whole_file_under_the_name_of_a_part(parts: list[Path], tiny_f32: Pair) -> None:
    shutil.copy(tiny_f32.target, parts[1])
    assert "is of another conversion: its split.count is not there" in str(
        CliRunner().invoke(main, ["verify", str(parts[0])]).stderr
    )


def test_a_link_to_the_first_part(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "t.gguf").symlink_to(parts[0])
    with pytest.raises(link.MtpError, match=f"name it itself: {parts[0]}"):
        drafter_of(tmp_path / "t.gguf", "auto")


def _rewritten(path: Path, values: dict[str, Any], wanted: Callable[[str], bool] = lambda key: True) -> None:
    """A part with other metadata."""
    header = read(path)
    kept = replace(header, spans={key: span for key, span in header.spans.items() if wanted(key)})
    rewrite(kept, values, path.with_suffix(".new"), lambda done, total: None)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("kept", ["hashes", "split"])
@pytest.mark.parametrize("first", [True, False])
def test_parts_of_older_conversions_and_of_llama_gguf_split(kept: str, first: bool, parts: list[Path]) -> None:
    """Their later parts name no checkpoint; the first is as ever, or has kept what ours says of a split."""
    if first:
        _rewritten(parts[0], {}, lambda key: key != link.KEY_SPLIT)
    for part in parts[1:]:
        _rewritten(part, {}, lambda key: key.startswith("split.") or (kept == "hashes" and key == link.KEY_HASHES))
    found = verify_files(parts[0].parent)
    assert len(found["files"]) == len(parts) + 1
    assert drafter_of(parts[0], "auto") is not None


def test_parts_that_do_not_add_up(parts: list[Path]) -> None:
    """Without any fingerprint their tensors still tell."""
    count = read(parts[0]).metadata[KEY_TENSORS]
    for part in parts:
        _rewritten(part, {KEY_TENSORS: count + 1})
    refused(parts[0], f"hold {count} different tensors in {count}, wanted {count + 1}")
