"""The same model as others export it: other types, prefixes, classes, shards, and tensors that nobody reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gemma_mtp.convert import convert_pair, link, names, plan_pair
from safetensors.torch import load_file, save_file
from tiny import make_pair, make_target
from upstream import Upstream, assert_same, data

Sizes = dict[str, tuple[Path, Path]]
START = "model.language_model."


def re_export(source: Path, folder: Path, start: str, text_only: bool = False) -> Path:
    """A copy whose tensors have another prefix, and whose configuration is that of the text model alone."""
    shutil.copytree(source, folder)
    weights = {name.replace(START, start): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    if text_only:
        config = json.loads((folder / "config.json").read_text())["text_config"]
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma4ForCausalLM"]}))
    return folder


@pytest.mark.parametrize(("dtype", "source"), [(torch.float16, "F16"), (torch.float32, "F32")], ids=["f16", "f32"])
@pytest.mark.parametrize("quant", ["BF16", "Q4_K_M"])
def test_sources_of_other_types(
    dtype: torch.dtype, source: str, quant: str, sizes: Sizes, converted: Upstream, tmp_path: Path
) -> None:
    folder = make_target(tmp_path / f"target-{source}", dtype)
    pair = convert_pair(folder, sizes["E2B"][1], tmp_path / "out", quant)
    assert_same(pair.target, converted(folder, quant, source=source))


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_text_only_re_exports(size: str, sizes: Sizes, converted: Upstream, tmp_path: Path) -> None:
    folder = re_export(sizes[size][0], tmp_path / f"text-{size}", "model.", text_only=True)
    pair = convert_pair(folder, sizes[size][1], tmp_path / "out", "BF16")
    assert_same(pair.target, converted(folder, "BF16"))


def test_other_prefixes_and_shards_make_the_same_tensors(sizes: Sizes, tmp_path: Path) -> None:
    target, drafter = sizes["E2B"]
    wanted = link.read_header(convert_pair(target, drafter, tmp_path / "wanted", "Q4_0").target)
    folders = [
        re_export(target, tmp_path / "other", "language_model.model."),
        make_pair("E2B", tmp_path, shard="1MB")[0],
    ]
    assert len(list(folders[1].glob("*.safetensors"))) > 1
    for folder in folders:
        found = link.read_header(convert_pair(folder, drafter, tmp_path / f"out-{folder.name}", "Q4_0").target)
        assert list(found.tensors) == list(wanted.tensors)
        assert all(data(found, name) == data(wanted, name) for name in wanted.tensors)


def test_keys_and_values_of_shared_layers_are_kept_as_upstream_keeps_them(
    sizes: Sizes, converted: Upstream, tmp_path: Path
) -> None:
    folder = re_export(sizes["E2B"][0], tmp_path / "shared-kv", START)
    weights = load_file(folder / "model.safetensors")
    for part in ("k_proj", "v_proj", "k_norm"):
        for layer in (3, 4, 5):
            name = f"{START}layers.{{}}.self_attn.{part}.weight"
            weights[name.format(layer)] = weights[name.format(layer - 3)].clone()
    save_file(weights, folder / "model.safetensors")
    for quant in ("BF16", "Q4_K_M"):
        pair = convert_pair(folder, sizes["E2B"][1], tmp_path / quant, quant)
        assert_same(pair.target, converted(folder, quant))


def test_what_the_model_does_not_read_is_left_out_with_its_reason(sizes: Sizes, tmp_path: Path) -> None:
    folder = re_export(sizes["31B"][0], tmp_path / "more", START)
    weights = load_file(folder / "model.safetensors")
    value = f"{START}layers.2.self_attn.v_proj.weight"
    weights |= {"lm_head.weight": weights[f"{START}embed_tokens.weight"].clone()}
    weights |= {value: torch.zeros(4, 4), "model.vision_tower.a": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors")
    (planned,) = plan_pair(folder, sizes["31B"][1]).targets.values()
    assert planned.dropped == {value: names.V_IS_K, "lm_head.weight": names.TIED, "model.vision_tower.a": names.IMAGE}


def test_global_head_dim_at_the_top_is_read_as_well(sizes: Sizes, tmp_path: Path) -> None:
    folder = re_export(sizes["12B"][0], tmp_path / "top", START)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["per_layer_config"]
    config["text_config"] |= {"global_head_dim": 128, "num_global_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    plans = [plan_pair(each, sizes["12B"][1], name="x").targets["x-Q4_K_M.gguf"] for each in (folder, sizes["12B"][0])]
    assert plans[0].parameters == plans[1].parameters
    assert plans[0].tensors == plans[1].tensors
