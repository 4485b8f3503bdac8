"""What goes wrong in daily life: one clear line, an exit status, and nothing half-written left behind."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from children import MAIN, STOPPING, ended, said, started
from click.testing import CliRunner
from faulty import Folders, converting, edit_config, edit_weights, refused
from gemma_mtp.convert import checkpoint, link, plan_pair
from gemma_mtp.convert.staging import PREFIX
from gemma_mtp.runtime.cli.main import main
from safetensors.torch import load_file, save_file
from tiny import make_drafter, make_target

NORM = "model.language_model.norm.weight"


def test_a_drafter_of_another_target(pair: Folders, tmp_path: Path) -> None:
    other = make_drafter(tmp_path / "other", ordered=False, backbone=512)
    refused(pair[0], other, tmp_path / "out", "another target", "hidden size is 256", "512")


def test_a_drafter_with_other_tokens(pair: Folders, tmp_path: Path) -> None:
    path = pair[1] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = (next(token for token, place in vocab.items() if place == wanted) for wanted in (700, 701))
    vocab[first], vocab[second] = 701, 700
    path.write_text(json.dumps(tokenizer))
    refused(*pair, tmp_path / "out", "another target", "token 700")


def test_folders_in_the_wrong_order(pair: Folders, tmp_path: Path) -> None:
    refused(pair[1], pair[0], tmp_path / "out", "target first")


def test_a_truncated_file(pair: Folders, tmp_path: Path) -> None:
    path = pair[0] / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    refused(*pair, tmp_path / "out", "model.safetensors", "download it again")


def test_a_missing_shard(pair: Folders, tmp_path: Path) -> None:
    sharded = make_target(tmp_path / "sharded", shard="1MB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    refused(sharded, pair[1], tmp_path / "out", "missing", lost.name)


def test_an_index_that_promises_what_nobody_needs(pair: Folders, tmp_path: Path) -> None:
    sharded = make_target(tmp_path / "sharded", shard="1MB")
    index = sharded / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    promised["weight_map"]["model.language_model.layers.0.extra"] = next(iter(promised["weight_map"].values()))
    index.write_text(json.dumps(promised))
    plan_pair(sharded, pair[1])


def test_a_shard_without_a_tensor_that_is_needed(pair: Folders, tmp_path: Path) -> None:
    sharded = make_target(tmp_path / "sharded", shard="1MB")
    shard = next(path for path in sharded.glob("*.safetensors") if NORM in load_file(path))
    save_file({name: value for name, value in load_file(shard).items() if name != NORM}, shard)
    refused(sharded, pair[1], tmp_path / "out", "lacks output_norm.weight")


def test_an_unknown_tensor(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda w: w.update({"model.language_model.layers.0.mystery.weight": torch.zeros(4)}))
    refused(*pair, tmp_path / "out", "unknown tensor", "mystery")


def test_a_missing_tensor(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda w: w.pop(NORM))
    refused(*pair, tmp_path / "out", "lacks output_norm.weight")


def test_a_tensor_of_another_shape(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda w: w.update({NORM: torch.ones(255, dtype=torch.bfloat16)}))
    refused(*pair, tmp_path / "out", NORM, "[255]", "[256]")


def test_a_tensor_of_an_unknown_type(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda w: w.update({NORM: torch.ones(256, dtype=torch.int8)}))
    refused(*pair, tmp_path / "out", NORM, "I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(value: float, pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda w: w[NORM].__setitem__(7, value))
    refused(*pair, tmp_path / "out", NORM, "NaN or infinite")


def test_values_too_large_for_f16(pair: Folders, tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    edit_weights(pair[0], lambda w: w[name].__setitem__((0, 0), 1e6))
    refused(*pair, tmp_path / "out", name, "BF16", options=("-q", "F16"))


def test_importances_that_overflow(pair: Folders, tmp_path: Path) -> None:
    """Finite ones, of which the quantizer makes scales that are not."""
    name, values = b"blk.0.attn_q.weight", struct.pack("<256f", *[3e38] * 256)
    matrix = tmp_path / "imatrix.dat"
    matrix.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, 256) + values)
    options = ("-q", "Q4_K_M", "--imatrix", str(matrix))
    refused(*pair, tmp_path / "out", "layers.0.self_attn.q_proj.weight", "importance", "Q4_K", options=options)


def test_a_token_ordering_that_is_no_permutation(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[1], lambda w: w["masked_embedding.token_ordering"].__setitem__(0, 5))
    refused(*pair, tmp_path / "out", "token_ordering", "every token once")


def test_an_ordered_drafter_without_its_tables(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[1], lambda w: w.pop("masked_embedding.centroids.weight"))
    refused(*pair, tmp_path / "out", "centroids", "download")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["text_config"].update(hidden_size="x"), ("hidden_size", "config.json")),
        (
            lambda c: c.update(architectures=["LlamaForCausalLM"], model_type="llama"),
            ("LlamaForCausalLM", "not supported"),
        ),
        (lambda c: c["text_config"].update(enable_moe_block=True), ("enable_moe_block",)),
        (lambda c: c["text_config"].update(attention_bias=True), ("attention_bias",)),
        (lambda c: c["text_config"].update(use_bidirectional_attention="all"), ("use_bidirectional_attention",)),
        (lambda c: c["text_config"].update(rope_scaling=2), ("rope_scaling = 2", "--allow-unknown rope_scaling")),
        (lambda c: c["text_config"].update(num_kv_shared_layers=2), ("layers with KV caches", "full_attention")),
        (lambda c: c["text_config"]["per_layer_config"]["2"].update(rank=8), ("per_layer_config", "layer 2", "rank")),
        (lambda c: c["text_config"]["layer_types"].__setitem__(0, "chunked_attention"), ("chunked_attention",)),
        (lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"), ("yarn",)),
        (lambda c: c["text_config"].update(num_hidden_layers=7), ("layer_types", "7 layers")),
    ],
)
def test_a_configuration_that_cannot_be_converted(
    change: Callable[[dict[str, Any]], None], words: tuple[str, ...], pair: Folders, tmp_path: Path
) -> None:
    edit_config(pair[0], change)
    refused(*pair, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ("Git LFS",)),
        ("config.json", "{", ("config.json", "not JSON")),
        ("tokenizer.json", "{", ("tokenizer.json", "not JSON")),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', ("tokenizer.json", "BPE")),
    ],
)
def test_a_damaged_file(file: str, text: str, words: tuple[str, ...], pair: Folders, tmp_path: Path) -> None:
    (pair[0] / file).write_text(text)
    refused(*pair, tmp_path / "out", *words)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(file: str, pair: Folders, tmp_path: Path) -> None:
    (pair[1] / file).unlink()
    refused(*pair, tmp_path / "out", file)


def test_a_folder_that_is_not_there(pair: Folders, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", pair[1], tmp_path / "out", "nowhere", "not a folder")


def test_output_that_exists_is_kept(pair: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "target-F32.gguf").write_text("mine")
    command = ["convert", *map(str, pair), "-o", str(out), "-q", "F32"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "already holds target-F32.gguf" in done.stderr
    assert [path.name for path in out.iterdir()] == ["target-F32.gguf"]
    assert (out / "target-F32.gguf").read_text() == "mine"
    assert CliRunner().invoke(main, [*command, "--force"]).exit_code == 0
    assert link.read_header(out / "target-F32.gguf").arch == "gemma4"


def test_too_little_room(pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(*pair, tmp_path / "out", "1,000 free", "make room")


def test_a_full_disk(pair: Folders, tmp_path: Path) -> None:
    """The file system refuses to go on in the middle of the weights."""
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
    done = subprocess.run([*map(str, converting(pair, out, limit + MAIN))], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write into {out}: File too large; ")
    assert "bytes are needed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_ctrl_c(pair: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with started(converting(pair, out, STOPPING), stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        said(process.stdout, "at work")
        assert list(out.glob(f"{PREFIX}*/*.gguf"))
        status, _, told = ended(process, signal.SIGINT)
    assert status == 130
    assert told.split() == ["interrupted"]
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_the_fingerprint_is_of_the_weights_not_of_the_files(tmp_path: Path) -> None:
    folders = [make_target(tmp_path / name, shard=shard) for name, shard in (("one", "1GB"), ("many", "1MB"))]
    assert len(list(folders[1].glob("*.safetensors"))) > 1
    found = []
    for folder in folders:
        with checkpoint.open_checkpoint(folder) as opened:
            found.append(opened.fingerprint())
    assert found[0] == found[1]
    edit_weights(folders[0], lambda w: w[NORM].__setitem__(3, 0.5))
    with checkpoint.open_checkpoint(folders[0]) as opened:
        assert opened.fingerprint() != found[0]
