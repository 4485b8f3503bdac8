"""config.json and names of tensors as trainers, merge tools and other versions of transformers write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import Folders, edit_config, edit_weights, experts_apart, refused
from gemma_mtp.convert import convert_pair, plan_pair
from gemma_mtp.convert.config import DrafterConfig, TextConfig, parse_config
from gemma_mtp.convert.errors import MtpError, MtpWarning
from gemma_mtp.convert.json_file import read_json
from safetensors.torch import load_file
from tiny import make_pair
from transformers import Gemma4Config
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gemma4_assistant import Gemma4AssistantConfig

HARMLESS = [
    "pretraining_tp", "query_pre_attn_scalar", "model_name", "max_length", "temperature", "num_beams", "length_penalty",
    "auto_map", "lora_alpha", "hidden_act", "unsloth_version", "transformers.js_config", "_x",
]  # fmt: skip
Change = Callable[[dict[str, Any]], Any]


def read_config(folder: Path) -> TextConfig:
    return parse_config(read_json(folder / "config.json"), folder / "config.json")


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config.get("text_config", config)
    return found


def flat(config: dict[str, Any]) -> None:
    """The text configuration at the root, as Gemma4ForCausalLM is saved."""
    inner = config.pop("text_config")
    config.clear()
    config.update(inner, architectures=["Gemma4ForCausalLM"])


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("key", HARMLESS)
def test_keys_of_trainers_pass(key: str, flatten: bool, pair: Folders, recwarn: pytest.WarningsRecorder) -> None:
    wanted = read_config(pair[0])
    if flatten:
        edit_config(pair[0], flat)
    edit_config(pair[0], lambda config: text_of(config).__setitem__(key, 7))
    assert read_config(pair[0]) == wanted
    assert not [each for each in recwarn if each.category is MtpWarning]


def test_frequencies_of_transformers_4(pair: Folders, recwarn: pytest.WarningsRecorder) -> None:
    """transformers looks at none of them, and neither do we; where they differ it is said."""
    wanted = read_config(pair[0])
    edit_config(pair[0], lambda config: text_of(config).update(rope_theta=1e6, rope_local_base_freq=10000))
    assert read_config(pair[0]) == wanted
    assert not [each for each in recwarn if each.category is MtpWarning]
    edit_config(pair[0], lambda config: text_of(config).update(rope_theta=5e5))
    with pytest.warns(MtpWarning, match=r"rope_theta = 500000.0 is left out.*1e\+06 is taken"):
        assert read_config(pair[0]) == wanted


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_rope_under_its_older_name(pair: Folders, recwarn: pytest.WarningsRecorder) -> None:
    def older(config: dict[str, Any]) -> None:
        text = text_of(config)
        text["rope_scaling"] = json.loads(json.dumps(text["rope_parameters"]))
        text["rope_scaling"]["full_attention"]["rope_theta"] = 5e5
        del text["rope_scaling"]["full_attention"]["partial_rotary_factor"]

    edit_config(pair[0], older)
    found = Gemma4Config.from_pretrained(pair[0]).text_config.rope_parameters["full_attention"]
    ours = read_config(pair[0])
    assert (ours.rope_theta, ours.partial_rotary) == (found["rope_theta"], found.get("partial_rotary_factor", 1.0))
    assert not [each for each in recwarn if each.category is MtpWarning]


def test_other_keys_warn(pair: Folders) -> None:
    wanted = read_config(pair[0])
    edit_config(pair[0], lambda config: text_of(config).update(frobnicate=1, wobble="x"))
    with pytest.warns(MtpWarning, match="not known.*frobnicate, wobble"):
        assert read_config(pair[0]) == wanted


@pytest.mark.parametrize("key", ["altup_num_inputs", "laurel_rank", "activation_sparsity_pattern", "rope_scaling",
                                 "embedding_multiplier", "mlp_bias", "mtp_num_hidden_layers"])  # fmt: skip
def test_keys_that_may_change_the_model_refuse(key: str, pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda config: text_of(config).__setitem__(key, 3))
    refused(*pair, tmp_path / "out", "config.json", key, f"--allow-unknown {key}")
    refused(*pair, tmp_path / "out", key, options=("--allow-unknown", "another"))
    assert plan_pair(*pair, "F32", "F32", allow_unknown=[key]).n_bytes


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.__setitem__("architectures", None), lambda c: c.pop("architectures"),
        lambda c: c.__setitem__("architectures", []), lambda c: c.__setitem__("architectures", "Gemma4ForCausalLM"),
        lambda c: c.__setitem__("architectures", ["PeftModel", "Gemma4ForCausalLM"]),
        lambda c: c.__setitem__("architectures", ["Gemma4TextForCausalLM"]),
        lambda c: c.__setitem__("architectures", ["Gemma4Model"]),
    ],
)  # fmt: skip
def test_classes(change: Change, pair: Folders) -> None:
    wanted = read_config(pair[0])
    edit_config(pair[0], change)
    assert read_config(pair[0]) == wanted


def test_what_is_no_gemma_4(pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda c: c.update(architectures=None, model_type="llama"))
    refused(*pair, tmp_path / "out", "config.json", "model_type 'llama'", "Gemma 4")


@pytest.mark.parametrize("unified", [False, True])
def test_defaults_are_those_of_transformers(unified: bool) -> None:
    """Those of the 12B's classes are others."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig

    theirs = Gemma4UnifiedTextConfig() if unified else Gemma4TextConfig()
    ours = parse_config({"model_type": theirs.model_type}, Path("config.json"))
    inner = {"hidden_size": 2304}
    assert ours == parse_config(
        {"model_type": theirs.model_type.removesuffix("_text"), "text_config": inner}, Path("config.json")
    )
    rope = theirs.rope_parameters
    assert (ours.n_embd, ours.n_ff, ours.n_layer) == (
        theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers,
    )  # fmt: skip
    assert (ours.n_head, ours.vocab_size) == (theirs.num_attention_heads, theirs.vocab_size)
    assert ours.per_layer_input == (0 if unified else theirs.hidden_size_per_layer_input)
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.sliding_window == theirs.sliding_window
    assert ours.context_length == theirs.max_position_embeddings
    for layer, values in ((0, (ours.n_kv, ours.head_dim)), (5, (ours.n_kv, ours.head_dim_full))):
        wanted = theirs.per_layer_config[layer]
        assert values == (wanted.num_key_value_heads, wanted.head_dim)
    assert ours.rope_theta == rope["full_attention"]["rope_theta"]
    assert ours.partial_rotary == rope["full_attention"]["partial_rotary_factor"]
    assert ours.rope_theta_sliding == rope["sliding_attention"]["rope_theta"]
    assert list(ours.layer_types) == theirs.layer_types


def test_defaults_of_drafters() -> None:
    silent = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
              "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}  # fmt: skip
    theirs = Gemma4AssistantConfig(text_config=silent)
    ours = parse_config({"model_type": "gemma4_assistant", "text_config": silent}, Path("config.json"))
    assert isinstance(ours, DrafterConfig)
    assert (ours.backbone, ours.ordered) == (theirs.backbone_hidden_size, theirs.use_ordered_embeddings)
    assert (ours.n_centroids, ours.top_k) == (theirs.num_centroids, theirs.centroid_intermediate_top_k)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "x", True, -1, [1], 1e300, 10**400])
@pytest.mark.parametrize("key", ["rms_norm_eps", "final_logit_softcapping"])
def test_numbers_that_are_none(key: str, value: Any, pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda config: text_of(config).__setitem__(key, value))
    refused(*pair, tmp_path / "out", "config.json", key)


@pytest.mark.parametrize("value", ["false", "no", 1, []])
@pytest.mark.parametrize("key", ["attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block"])
def test_what_is_neither_true_nor_false(key: str, value: Any, pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda config: text_of(config).__setitem__(key, value))
    refused(*pair, tmp_path / "out", "config.json", key, "neither true nor false")


def test_how_much_of_a_head_is_rotated(pair: Folders, tmp_path: Path) -> None:
    """More than all of it makes no sense; in sliding layers transformers rotates all, whatever stands there."""
    wanted = read_config(pair[0])

    def part(kind: str, value: float) -> None:
        rope = "rope_parameters"
        edit_config(pair[0], lambda c: text_of(c)[rope][kind].__setitem__("partial_rotary_factor", value))

    part("sliding_attention", 0.5)
    rotary = Gemma4TextRotaryEmbedding(Gemma4Config.from_pretrained(pair[0]).text_config)
    assert len(rotary.sliding_attention_inv_freq) == wanted.head_dim // 2
    with pytest.warns(MtpWarning, match="partial_rotary_factor = 0.5 of sliding_attention is left out"):
        assert read_config(pair[0]) == wanted
    part("full_attention", 1.5)
    refused(*pair, tmp_path / "out", "config.json", "partial_rotary_factor of full_attention is 1.5")


def test_bounds_name_the_file(pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[1], lambda config: text_of(config).__setitem__("max_position_embeddings", 0))
    refused(*pair, tmp_path / "out", f"{pair[1] / 'config.json'} is damaged", "context_length")


def test_a_byte_order_mark(pair: Folders) -> None:
    wanted = read_config(pair[0])
    path = pair[0] / "config.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert read_config(pair[0]) == wanted


def test_a_quantization_that_is_left_over(pair: Folders, tmp_path: Path) -> None:
    edit_config(pair[0], lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.warns(MtpWarning, match="bitsandbytes.*left out"):
        plan_pair(*pair, "F32", "F32")
    edit_weights(pair[0], lambda weights: weights.update({"x.weight": torch.zeros(4, dtype=torch.uint8)}))
    refused(*pair, tmp_path / "out", "quantized (bitsandbytes)", "before quantization")


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[change(name)] = weights.pop(name)

    edit_weights(folder, rename)


def names_of(pair: Folders) -> list[str]:
    return [tensor.name for plan in plan_pair(*pair, "F32", "F32").targets.values() for tensor in plan.tensors]


@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module.", "model."])
@pytest.mark.parametrize("at", [0, 1])
def test_prefixes_of_trainers(prefix: str, at: int, pair: Folders) -> None:
    wanted = names_of(pair)
    for folder in pair[at : at + 1]:
        renamed(folder, lambda name: prefix + name)
    assert names_of(pair) == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "LoRA adapter"),
        (lambda n: n.replace("q_proj.weight", "q_proj.lora_A.default.weight"), "LoRA adapter"),
        (lambda n: n.replace("q_proj.weight", "q_proj.qweight"), "GPTQ"),
        (lambda n: n.replace("q_proj.weight", "q_proj.weight.absmax"), "bitsandbytes"),
        (lambda n: n.replace("q_proj.weight", "q_proj.weight_scale"), "FP8"),
        (lambda n: n.replace("q_proj.weight", "q_proj.biases"), "MLX"),
        (lambda n: n.replace("model.language_model.layers.1.", "mtp.layers.1."), "two folders"),
        (lambda n: n.replace("model.language_model.layers.1.", "medusa_head.1."), "two folders"),
    ],
)
def test_another_kind_of_checkpoint_is_named(
    change: Callable[[str], str], said: str, pair: Folders, tmp_path: Path
) -> None:
    renamed(pair[0], change)
    refused(*pair, tmp_path / "out", said)


def test_buffers_and_heads_of_a_training_are_left_out(pair: Folders) -> None:
    wanted = names_of(pair)
    more = [
        "model.language_model.rotary_emb.inv_freq", "model.language_model.embed_tokens.embed_scale",
        "model.language_model.layers.0.self_attn.q_proj.weight_fake_quant.scale", "v_head.summary.weight",
        "score.weight", "model.language_model.layers.0.self_attn.rotary_emb.cos_cached",
    ]  # fmt: skip
    edit_weights(pair[0], lambda weights: weights.update({name: torch.ones(2) for name in more}))
    assert names_of(pair) == wanted
    plans = plan_pair(*pair, "F32", "F32").targets
    assert set(more) <= set(next(iter(plans.values())).dropped)


def test_norms_in_double_precision(pair: Folders, tmp_path: Path) -> None:
    one = convert_pair(*pair, tmp_path / "one", "F32", "F32")
    edit_weights(pair[0], lambda weights: weights.update({n: t.double() for n, t in weights.items() if "norm" in n}))
    two = convert_pair(*pair, tmp_path / "two", "F32", "F32")
    data = [path.read_bytes()[-100_000:] for path in (one.target, two.target)]
    assert data[0] == data[1]


def test_experts_one_by_one(tmp_path: Path) -> None:
    target, drafter = make_pair("26B-A4B", tmp_path)
    whole = convert_pair(target, drafter, tmp_path / "whole", "F32", "F32")
    apart = shutil.copytree(target, tmp_path / "apart")
    assert any(".experts." in name for name in load_file(apart / "model.safetensors"))
    edit_weights(apart, experts_apart)
    made = convert_pair(apart, drafter, tmp_path / "made", "F32", "F32")
    from gguf import GGUFReader

    ours, theirs = ({t.name: t for t in GGUFReader(path).tensors} for path in (made.target, whole.target))
    assert ours.keys() == theirs.keys()
    assert all((ours[name].data == theirs[name].data).all() for name in ours)
    edit_weights(apart, lambda weights: weights.pop(next(n for n in weights if ".experts.1.up" in n)))
    refused(apart, drafter, tmp_path / "out", "not every expert")


def test_a_wrong_kind_of_value_names_the_file(pair: Folders) -> None:
    path = pair[0] / "config.json"
    path.write_text(json.dumps([1]))
    with pytest.raises(MtpError, match=r"config\.json"):
        plan_pair(*pair)
