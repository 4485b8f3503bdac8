"""Never another model: which files of a folder are its weights, and which tensor is its output matrix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from faulty import Folders, edit_config, edit_weights, refused
from gemma_mtp.convert import convert_pair, link
from gemma_mtp.convert.errors import MtpWarning
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny import make_target

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def converted(pair: Folders, out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the target's F32 file."""
    made = convert_pair(*pair, out, "F32", "F32")
    assert link.find_drafter(made.target) == made.drafter
    return {tensor.name: torch.tensor(tensor.data.copy()) for tensor in GGUFReader(made.target).tensors}


def values(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / SINGLE)[name].float()


@pytest.mark.parametrize("tie", [True, None])
def test_a_tied_head_that_differs_is_kept(tie: bool | None, pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda weights: weights.__setitem__(HEAD, weights[EMBEDDING] + 1))
    edit_config(pair[0], lambda config: config.__setitem__("tie_word_embeddings", tie))
    with pytest.warns(MtpWarning, match="differs"):
        made = converted(pair, tmp_path / "out")
    assert torch.equal(made["output.weight"], values(pair[0], HEAD))
    assert torch.equal(made["token_embd.weight"], values(pair[0], EMBEDDING))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_that_is_equal_is_dropped(dtype: torch.dtype, pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda weights: weights.__setitem__(HEAD, weights[EMBEDDING].to(dtype).clone()))
    assert "output.weight" not in converted(pair, tmp_path / "out")


def test_a_tied_head_of_another_shape(pair: Folders, tmp_path: Path) -> None:
    edit_weights(pair[0], lambda weights: weights.__setitem__(HEAD, weights[EMBEDDING][:-8].clone()))
    refused(*pair, tmp_path / "out", HEAD, "shape")


def test_a_drafters_head_that_differs(pair: Folders, tmp_path: Path) -> None:
    name = next(name for name in load_file(pair[1] / SINGLE) if name.endswith("embed_tokens.weight"))
    edit_weights(pair[1], lambda weights: weights.__setitem__(HEAD, weights[name] + 1))
    refused(*pair, tmp_path / "out", HEAD, name, "differ")


@pytest.mark.parametrize("tie", [True, False, None])
def test_a_drafters_head_that_is_equal(tie: bool | None, pair: Folders, tmp_path: Path) -> None:
    """Whatever is said of it, there is one matrix; where there is none to be equal to it, it is missing."""
    name = next(name for name in load_file(pair[1] / SINGLE) if name.endswith("embed_tokens.weight"))
    edit_config(pair[1], lambda config: config.__setitem__("tie_word_embeddings", tie))
    if tie is False:
        refused(*pair, tmp_path / "out", "lacks output.weight")
    edit_weights(pair[1], lambda weights: weights.__setitem__(HEAD, weights[name].float()))
    assert "output.weight" not in link.read_header(convert_pair(*pair, tmp_path / "out", "F32").drafter).tensors


@pytest.mark.parametrize("tie", ["true", 1, [True]])
def test_what_is_neither_true_nor_false(tie: object, pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda config: config.__setitem__("tie_word_embeddings", tie))
    refused(*pair, tmp_path / "out", "config.json: tie_word_embeddings", "neither true nor false")


def test_the_outer_word_about_tying_counts(pair: Folders, tmp_path: Path) -> None:
    """As in transformers; and `save_model` keeps only one name of the two."""

    def outer(tied: bool) -> None:
        def change(config: dict[str, object]) -> None:
            config["tie_word_embeddings"] = tied
            config["text_config"]["tie_word_embeddings"] = not tied  # type: ignore[index]

        edit_config(pair[0], change)

    outer(True)
    assert "output.weight" not in converted(pair, tmp_path / "tied")
    edit_weights(pair[0], lambda weights: weights.__setitem__(HEAD, weights.pop(EMBEDDING)))
    assert torch.equal(converted(pair, tmp_path / "one")["token_embd.weight"], values(pair[0], HEAD))
    edit_weights(pair[0], lambda weights: weights.__setitem__(EMBEDDING, weights[HEAD] + 1))
    outer(False)
    assert torch.equal(converted(pair, tmp_path / "apart")["output.weight"], values(pair[0], HEAD))


def sharded(folder: Path) -> list[Path]:
    """Another model of the same configuration, in shards, put into a folder."""
    other = make_target(folder.with_name("other"), shard="1MB", seed=5)
    for path in [*other.glob("model-*.safetensors"), other / INDEX]:
        shutil.copy(path, folder)
    return sorted(folder.glob("model-*.safetensors"))


def test_a_fine_tune_beside_the_shards_of_its_base(pair: Folders, tmp_path: Path) -> None:
    shards = sharded(pair[0])
    with pytest.warns(MtpWarning, match=f"{SINGLE} is converted.*left aside.*{shards[0].name}"):
        made = converted(pair, tmp_path / "out")
    assert torch.equal(made["token_embd.weight"], values(pair[0], EMBEDDING))
    for shard in shards:
        shard.unlink()
    with pytest.warns(MtpWarning, match=f"left aside: {INDEX}"):
        converted(pair, tmp_path / "stale")


def test_shards_without_an_index(pair: Folders, tmp_path: Path) -> None:
    shards = sharded(pair[0])
    (pair[0] / SINGLE).unlink()
    (pair[0] / INDEX).unlink()
    converted(pair, tmp_path / "out")
    shards[-1].unlink()
    refused(*pair, tmp_path / "missing", "1 of", "missing", shards[-1].name)
    one = make_target(tmp_path / "one")
    (one / SINGLE).rename(one / "model-00001-of-00001.safetensors")
    converted((one, pair[1]), tmp_path / "single")


def test_an_index_that_promises_what_nobody_needs(pair: Folders, tmp_path: Path) -> None:
    shards = sharded(pair[0])
    (pair[0] / SINGLE).unlink()
    index = json.loads((pair[0] / INDEX).read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    index["weight_map"]["lm_head.weight"] = shards[0].name
    (pair[0] / INDEX).write_text(json.dumps(index))
    converted(pair, tmp_path / "out")
    weights = load_file(shards[0])
    lost = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, shards[0])
    refused(*pair, tmp_path / "lost", "lacks", "download")


@pytest.mark.parametrize("name", ["model.bf16.safetensors", "Model.safetensors", "pytorch_model.bin", "x.gguf.part"])
def test_what_lies_there_instead_of_weights_is_named(name: str, pair: Folders, tmp_path: Path) -> None:
    (pair[0] / SINGLE).rename(pair[0] / name)
    refused(*pair, tmp_path / "out", "neither", name)


def adapter(folder: Path, base: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(8, 8)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("gone", [["model.safetensors"], ["model.safetensors", "config.json"]])
def test_an_adapter_is_no_model(gone: list[str], pair: Folders, tmp_path: Path) -> None:
    for name in gone:
        (pair[0] / name).unlink()
    adapter(pair[0], "google/gemma-4-E2B-it")
    refused(*pair, tmp_path / "out", "an adapter of google/gemma-4-E2B-it", "merge it into its model")
    adapter(pair[0], ["x"])
    refused(*pair, tmp_path / "out", "an adapter, not a model")


def test_an_adapter_beside_a_model(pair: Folders, tmp_path: Path) -> None:
    adapter(pair[0], "google/gemma-4-E2B-it")
    with pytest.warns(MtpWarning, match="adapter that lies there is left out"):
        converted(pair, tmp_path / "out")
