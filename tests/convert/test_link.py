"""The pairing contract: the right drafter is found under any name, a wrong one named before llama.cpp sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.runtime.pair import drafter_of
from tiny import PAIR, make_drafter, make_target


def test_a_header_reads_as_ggufs_own_reader_reads_it(demo: Pair) -> None:
    from gguf import GGUFReader

    for path in (demo.target, demo.drafter):
        ours, theirs = link.read_header(path), GGUFReader(path)
        fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            value = ours.metadata[key]
            got = list(value) if isinstance(value, link.Strings) else value
            got = got.tolist() if isinstance(got, np.ndarray) else got
            assert got == field.contents(), key
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert mine == link.Tensor(
                tensor.tensor_type, tuple(tensor.shape.tolist()), tensor.data_offset, tensor.n_bytes
            )


def test_strings_behave_like_a_list(demo: Pair) -> None:
    tokens = link.read_header(demo.target).vocabulary
    assert tokens[1] == "<eos>"
    assert tokens[-len(tokens)] == tokens[0]
    assert tokens[:3] == [tokens[0], tokens[1], tokens[2]]
    with pytest.raises(IndexError):
        tokens[len(tokens)]


def test_one_drafter_serves_every_quantization(tiny: dict[str, Path], tmp_path: Path) -> None:
    pair = convert_pair(tiny["target"], tiny["dense"], tmp_path / "one", "Q4_K_M")
    other = convert_pair(tiny["target"], tiny["dense"], tmp_path / "two", "F16")
    renamed = tmp_path / "one" / "anything at all.gguf"
    pair.drafter.rename(renamed)
    shutil.move(other.target, tmp_path / "one")
    assert link.find_drafter(pair.target) == renamed
    assert link.find_drafter(tmp_path / "one" / other.target.name) == renamed


def test_the_drafter_is_its_own_among_others(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Two pairs of the same shapes in one folder, a broken file beside them, and the hint leading astray."""
    make_target(tmp_path / "second", initializer_range=0.2)
    first = convert_pair(tiny["target"], tiny["dense"], tmp_path / "out", name="b")
    second = convert_pair(tmp_path / "second", tiny["dense"], tmp_path / "out", name="a", force=True)
    (tmp_path / "out" / "0-broken.gguf").write_bytes(b"GGUF\x03\0\0\0 and no more")
    assert link.find_drafter(first.target) == first.drafter
    assert link.find_drafter(second.target) == second.drafter
    keep = first.drafter.with_name("z.gguf")
    first.drafter.rename(keep)
    shutil.copy(second.drafter, first.drafter)
    assert link.find_drafter(first.target) == keep
    with pytest.raises(link.PairError, match="fingerprint"):
        link.check(link.read_header(first.target), link.read_header(second.drafter))


def test_no_drafter_is_not_an_error(demo: Pair, tmp_path: Path) -> None:
    shutil.copy(demo.target, tmp_path)
    assert link.find_drafter(tmp_path / demo.target.name) is None
    assert drafter_of(tmp_path / demo.target.name, "auto") is None


def test_a_drafter_that_does_not_fit_is_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Each property that shared keys and values need, with both values, also where no fingerprint tells."""
    pair = convert_pair(tiny["target"], tiny["dense"], tmp_path / "out", "F32", "F32")
    target, drafter = link.read_header(pair.target), link.read_header(pair.drafter)
    link.check(target, drafter)
    arch = link.DRAFTER_ARCH
    spoilt = {
        f"{arch}.embedding_length_out": (512, "hidden size is 256 in the target, 512 in the drafter"),
        f"{arch}.attention.key_length": (64, "head size is 128"),
        f"{arch}.attention.key_length_swa": (32, "sliding head size is 64"),
        f"{arch}.attention.head_count_kv": (2, "KV heads of sliding layers is 1"),
        f"{arch}.attention.sliding_window": (512, "sliding window is 32"),
        "tokenizer.ggml.tokens": (["a", "b"], "vocabulary size is 3072"),
        link.KEY_TARGET: ("0" * 64, "fingerprint 000000000000"),
    }
    for key, (value, words) in spoilt.items():
        wrong = link.Header(drafter.path, arch, {**drafter.metadata, key: value}, drafter.tensors)
        with pytest.raises(link.PairError, match=words):
            link.check(target, wrong)
    with pytest.raises(link.PairError, match="not a drafter"):
        link.check(target, target)
    with pytest.raises(link.PairError, match="must be 'gemma4'"):
        link.check(drafter, drafter)


def test_other_tokens_are_found_by_text(demo: Pair, tiny: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(tiny["dense"], path)
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace('"<unused5>"', '"<unusedX>"'))
    shutil.copytree(tiny["target"], tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").write_text((path / "tokenizer.json").read_text())
    pair = convert_pair(tmp_path / "target", path, tmp_path / "out", "F32", "F32")
    good = convert_pair(tiny["target"], tiny["dense"], tmp_path / "good", "F32", "F32")
    target, drafter = link.read_header(good.target), link.read_header(pair.drafter)
    unlinked = {key: value for key, value in drafter.metadata.items() if key != link.KEY_TARGET}
    with pytest.raises(link.PairError, match="<unusedX>"):
        link.check(target, link.Header(drafter.path, drafter.arch, unlinked, drafter.tensors))


@pytest.mark.parametrize("kept", [0, 3, 40, 5000, -1000])
def test_a_cut_off_file_is_one_line(kept: int, demo: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(demo.drafter.read_bytes()[:kept])
    with pytest.raises(link.MtpError, match=r"cut\.gguf") as caught:
        link.read_header(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_files_that_are_not_there_or_not_gguf(tmp_path: Path) -> None:
    with pytest.raises(link.MtpError, match="No such file"):
        link.read_header(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(link.MtpError, match="not a GGUF file"):
        link.read_header(tmp_path / "text.gguf")
    with pytest.raises(link.MtpError):
        link.read_header(tmp_path)


def test_the_link_holds_the_contract(demo: Pair) -> None:
    target, drafter = link.read_header(demo.target).metadata, link.read_header(demo.drafter).metadata
    assert (target[link.KEY_VERSION], target[link.KEY_ROLE], target[link.KEY_PEER]) == (1, "target", demo.drafter.name)
    assert (drafter[link.KEY_VERSION], drafter[link.KEY_ROLE]) == (1, "drafter")
    assert drafter[link.KEY_TARGET] == target[link.KEY_SOURCE] != drafter[link.KEY_SOURCE]


def test_the_ordered_head_travels_whole(demo: Pair) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(PAIR / "gemma-4-demo-assistant" / "model.safetensors")
    header = link.read_header(demo.drafter)
    wanted = weights["masked_embedding.centroids.weight"].float().flatten()
    assert torch.equal(torch.tensor(header.metadata[link.KEY_CENTROIDS]), wanted)
    ordering = torch.tensor(header.metadata[link.KEY_ORDERING])
    assert torch.equal(ordering.long(), weights["masked_embedding.token_ordering"])
    assert (header.metadata[link.KEY_N_CENTROIDS], header.metadata[link.KEY_TOP_K]) == (96, 12)
    assert not [name for name in header.tensors if "masked" in name]


def test_a_drafter_can_be_named_in_another_folder(demo: Pair, tmp_path: Path) -> None:
    shutil.copy(demo.drafter, tmp_path / "x.gguf")
    (tmp_path / "t.gguf").symlink_to(demo.target)
    assert drafter_of(demo.target, tmp_path / "x.gguf") == tmp_path / "x.gguf"
    assert drafter_of(tmp_path / "t.gguf", "auto") == tmp_path / "x.gguf"
    with pytest.raises(link.PairError, match="cannot run alone"):
        drafter_of(demo.drafter, "auto")


def test_a_drafter_for_other_shapes_is_refused_at_conversion(tiny: dict[str, Path], tmp_path: Path) -> None:
    other = make_drafter(tmp_path / "other", ordered=False, sliding_window=64)
    with pytest.raises(link.PairError, match="sliding window is 32"):
        convert_pair(tiny["target"], other, tmp_path / "out")
