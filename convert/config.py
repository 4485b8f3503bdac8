"""config.json of a target or a drafter, read once and checked: what is not understood is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError

TARGET_CLASSES = (
    "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM",
    "Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedForCausalLM",
)  # fmt: skip
DRAFTER_CLASSES = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")
# Keys of a text configuration that say nothing about its tensors or about how they are used.
IGNORED = {
    "architectures", "attention_dropout", "cache_implementation", "chunk_size_feed_forward", "dtype", "id2label",
    "initializer_range", "is_assistant", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "task_specific_params", "torch_dtype", "use_cache",
    "vocab_size_per_layer_input",
}  # fmt: skip
IGNORED_ENDS = ("_token_id", "_token_index", "_version", "_config", "_implementation")
IGNORED_STARTS = ("_", "unsloth")
# What transformers assumes where the configuration is silent (configuration_gemma4.py).
GLOBAL_HEAD_DIM = 512
LAYER_PERIOD = 6


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text model of a target or a drafter, as config.json gives it.

    Sizes are in elements. `per_layer_input` is 0 without per-layer embeddings, `n_kv_full` is None when all layers have
    the same number of KV heads. `v_is_k`: full-attention layers have no value projection and use the keys'. `moe`: each
    layer has `n_expert` experts of width `n_ff_expert` beside its MLP, and `n_expert_used` of them run for a token;
    the three are None where config.json has none. `tied`: the output matrix is the token embedding.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_kv: int
    n_kv_full: int | None
    head_dim: int
    head_dim_full: int
    layer_types: tuple[str, ...]
    sliding_window: int
    n_kv_shared: int
    v_is_k: bool
    per_layer_input: int
    double_wide_mlp: bool
    moe: bool
    n_expert: int | None
    n_expert_used: int | None
    n_ff_expert: int | None
    context_length: int
    rms_eps: float
    softcap: float | None
    rope_theta: float
    rope_theta_sliding: float
    partial_rotary: float
    partial_rotary_sliding: float
    vocab_size: int
    tied: bool

    def is_full(self, layer: int) -> bool:
        return self.layer_types[layer] == "full_attention"

    def n_kv_of(self, layer: int) -> int:
        """KV heads of a layer."""
        return self.n_kv_full if self.is_full(layer) and self.n_kv_full is not None else self.n_kv

    def n_ff_of(self, layer: int) -> int:
        """Width of a layer's MLP: doubled where the KV cache is shared, if the model says so."""
        wide = self.double_wide_mlp and layer >= self.n_layer - self.n_kv_shared
        return self.n_ff * (2 if wide else 1)


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TextConfig):
    """A target: nothing beyond its text model is converted."""


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(TextConfig):
    """A drafter. `ordered`: it has the clustered head, with `n_centroids` clusters of which `top_k` are read."""

    backbone: int
    ordered: bool
    n_centroids: int
    top_k: int


class _Keys:
    """Required and optional keys of a configuration, with an error that names file and key; knows which were read."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values, self.file = values, file
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if self.get(key) is None:
            raise MtpError(f"{self.file} has no {key!r}; download the configuration again.")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str) -> int:
        """A size: a whole number, not negative."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise MtpError(f"{self.file}: {key} = {value!r} is not a size; download the configuration again.")
        return value

    def some_size(self, key: str) -> int | None:
        return None if self.get(key) is None else self.size(key)

    def inner(self, key: str) -> _Keys:
        if not isinstance(self[key], dict):
            raise MtpError(f"{self.file}: {key} is not an object; download the configuration again.")
        return _Keys(self[key], self.file)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Keys that nobody asked for and that hold something."""
        for key, value in self.values.items():
            known = key in self.read or key in IGNORED or key.startswith(IGNORED_STARTS) or key.endswith(IGNORED_ENDS)
            if not known and value not in (None, False, 0, "", [], {}):
                yield key, value


def parse_config(values: Mapping[str, Any], file: Path) -> TargetConfig | DrafterConfig:
    """A parsed config.json as a configuration; `file` is named in errors.

    Raises:
        MtpError: it is damaged, lacks a key, or asks for a feature that is not supported.
    """
    root = _Keys(values, file)
    name = str(next(iter(root["architectures"]), None))
    if name not in TARGET_CLASSES + DRAFTER_CLASSES:
        wanted = ", ".join(TARGET_CLASSES + DRAFTER_CLASSES)
        raise MtpError(f"{file}: architecture {name!r} is not supported; wanted one of {wanted}.")
    text = root if root.get("text_config") is None else root.inner("text_config")
    _refuse_unsupported(root, text)
    shared = _text_fields(text) | {"tied": all(keys.get("tie_word_embeddings", True) is True for keys in (root, text))}
    if name in TARGET_CLASSES:
        _check_donors(file, shared["layer_types"], shared["n_kv_shared"])
    backbone = {} if name in TARGET_CLASSES else _drafter(root, shared)
    for key, value in text.unread():
        raise MtpError(f"{file}: {key} = {json.dumps(value)[:60]} is not known; this converter could get it wrong.")
    return TargetConfig(**shared) if name in TARGET_CLASSES else DrafterConfig(**shared | backbone)


def _refuse_unsupported(root: _Keys, text: _Keys) -> None:
    """Name the features that this converter would get wrong."""
    for keys in (root, text):
        method = keys.get("quantization_config")
        if method:
            name = method.get("quant_method", "?") if isinstance(method, dict) else method
            raise MtpError(f"{text.file}: the weights are quantized ({name}); pass the checkpoint before quantization.")
    known: dict[str, Any] = {
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": "vision",
        "is_causal": True,
        "attn_logit_softcapping": None,
    }
    for key, value in known.items():
        if text.get(key) not in (None, value):
            raise MtpError(f"{text.file}: {key} = {text.get(key)!r} is not supported by llama.cpp's Gemma 4.")
    rope = text.inner("rope_parameters")
    for kind, wanted in (("full_attention", "proportional"), ("sliding_attention", "default")):
        inner = rope.inner(kind)
        if inner["rope_type"] != wanted:
            got = inner["rope_type"]
            raise MtpError(f"{text.file}: rope_type of {kind} is {got!r}, only {wanted!r} is supported.")
        if inner.get("factor", 1.0) != 1.0:
            raise MtpError(f"{text.file}: rope scaling of {kind} (factor {inner.get('factor')}) is not supported.")


def _layer_types(text: _Keys) -> tuple[str, ...]:
    """Types of the layers; as in transformers a missing list means every sixth is full, and the last always is."""
    n_layer = text.size("num_hidden_layers")
    default = ["sliding_attention" if (layer + 1) % LAYER_PERIOD else "full_attention" for layer in range(n_layer)]
    types = list(text.get("layer_types", default))
    if len(types) != n_layer or not types:
        raise MtpError(f"{text.file}: {len(types)} layer_types for {n_layer} layers.")
    for layer, kind in enumerate(types):
        if kind not in ("sliding_attention", "full_attention"):
            raise MtpError(f"{text.file}: layer {layer} is of type {kind!r}, which is not supported.")
    return (*types[:-1], "full_attention")


def _full_layers(text: _Keys, types: tuple[str, ...]) -> tuple[int, int | None]:
    """Head size and KV heads of full-attention layers, the latter None if they are those of the sliding layers.

    transformers writes them per layer from 5.22 on, and once for all before.
    """
    per_layer = text.get("per_layer_config")
    top = text.some_size("global_head_dim"), text.some_size("num_global_key_value_heads")
    if per_layer is None:
        head_dim, n_kv = top
        return GLOBAL_HEAD_DIM if head_dim is None else head_dim, n_kv if text.get("attention_k_eq_v") else None
    found = set()
    for layer, kind in enumerate(types):
        values = _Keys(per_layer.get(str(layer), {}), text.file)
        pair = values.some_size("head_dim"), values.some_size("num_key_value_heads")
        for key, value in values.unread():
            raise MtpError(f"{text.file}: per_layer_config of layer {layer} has {key} = {value!r}, which is not known.")
        if kind == "full_attention":
            found.add(pair)
        elif pair != (None, None):
            raise MtpError(f"{text.file}: per_layer_config changes layer {layer}, which is no full-attention layer.")
    if len(found) != 1:
        raise MtpError(f"{text.file}: per_layer_config differs between full-attention layers, which is not supported.")
    head_dim, n_kv = found.pop()
    return text.size("head_dim") if head_dim is None else head_dim, n_kv


def _check_donors(file: Path, types: tuple[str, ...], n_shared: int) -> None:
    """llama.cpp lets shared layers and drafters read the KV cache of the last two layers that have one: the very last
    for full attention, the one before for sliding (llama-model.cpp, `layer_reuse_cb`)."""
    own = types[: len(types) - n_shared]
    wanted = ("sliding_attention", "full_attention") if "sliding_attention" in types else ("full_attention",)
    if own[-len(wanted) :] != wanted:
        raise MtpError(
            f"{file}: the last of the {len(own)} layers with KV caches of their own are of the types "
            f"{', '.join(own[-2:]) or 'none'}; llama.cpp needs {', '.join(wanted)}."
        )


def _text_fields(text: _Keys) -> dict[str, Any]:
    rope = text.inner("rope_parameters")
    full, sliding = rope.inner("full_attention"), rope.inner("sliding_attention")
    types = _layer_types(text)
    head_dim_full, n_kv_full = _full_layers(text, types)
    moe = bool(text.get("enable_moe_block", False))
    experts = {key: text.some_size(key) for key in ("num_experts", "top_k_experts", "moe_intermediate_size")}
    for key, value in experts.items():
        if moe and not value:
            raise MtpError(f"{text.file}: enable_moe_block, but {key} = {value!r}; download the configuration again.")
    return {
        "n_layer": len(types),
        "n_embd": text.size("hidden_size"),
        "n_ff": text.size("intermediate_size"),
        "n_head": text.size("num_attention_heads"),
        "n_kv": text.size("num_key_value_heads"),
        "n_kv_full": n_kv_full,
        "head_dim": text.size("head_dim"),
        "head_dim_full": head_dim_full,
        "layer_types": types,
        "sliding_window": text.size("sliding_window"),
        "n_kv_shared": text.some_size("num_kv_shared_layers") or 0,
        "v_is_k": bool(text.get("attention_k_eq_v", False)),
        "per_layer_input": text.some_size("hidden_size_per_layer_input") or 0,
        "double_wide_mlp": bool(text.get("use_double_wide_mlp", False)),
        "moe": moe,
        "n_expert": experts["num_experts"],
        "n_expert_used": experts["top_k_experts"],
        "n_ff_expert": experts["moe_intermediate_size"],
        "context_length": text.size("max_position_embeddings"),
        "rms_eps": float(text["rms_norm_eps"]),
        "softcap": float(text.get("final_logit_softcapping", 0)) or None,
        "rope_theta": float(full["rope_theta"]),
        "rope_theta_sliding": float(sliding["rope_theta"]),
        "partial_rotary": float(full["partial_rotary_factor"]),
        "partial_rotary_sliding": float(sliding.get("partial_rotary_factor", 1.0)),
        "vocab_size": text.size("vocab_size"),
    }


def _drafter(root: _Keys, text: dict[str, Any]) -> dict[str, Any]:
    """What a drafter has on top of its text model, whose layers all read the target's KV cache."""
    backbone = root.size("backbone_hidden_size")
    for wrong, what in ((text["moe"], "enable_moe_block"), (not text["tied"], "tie_word_embeddings = false"),
                        (text["per_layer_input"], "hidden_size_per_layer_input"),
                        (text["n_kv_shared"] not in (0, text["n_layer"]), "num_kv_shared_layers"),
                        (backbone == text["n_embd"], "hidden_size = backbone_hidden_size")):  # fmt: skip
        if wrong:
            raise MtpError(f"{root.file}: {what} is not supported in a drafter.")
    return {
        "n_kv_shared": text["n_layer"],
        "backbone": backbone,
        "ordered": bool(root.get("use_ordered_embeddings", False)),
        "n_centroids": root.some_size("num_centroids") or 0,
        "top_k": root.some_size("centroid_intermediate_top_k") or 0,
    }
