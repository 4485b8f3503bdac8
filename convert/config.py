"""config.json of a target or a drafter, read once and checked: what is not understood is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.convert.config_keys import (
    CHANGES,
    DEFAULTS,
    DRAFTER_DEFAULTS,
    GLOBAL_HEAD_DIM,
    LAYER_PERIOD,
    ROPE_DEFAULTS,
    UNIFIED_DEFAULTS,
    Keys,
)
from gemma_mtp.convert.errors import MtpError, warn
from gemma_mtp.convert.gguf_io.types import F32_MAX

TARGET_CLASSES = (
    "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4TextForCausalLM", "Gemma4Model", "Gemma4TextModel",
    "Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedForCausalLM", "Gemma4UnifiedTextForCausalLM",
    "Gemma4UnifiedModel", "Gemma4UnifiedTextModel",
)  # fmt: skip
DRAFTER_CLASSES = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")
# model_type, for configurations whose architectures say nothing.
TARGET_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


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
    """A drafter. `ordered`: it has the clustered head, with `n_centroids` clusters of which `top_k` are read, and in
    them the first `n_ordered` tokens."""

    backbone: int
    ordered: bool
    n_ordered: int
    n_centroids: int
    top_k: int


def parse_config(values: Mapping[str, Any], file: Path, allowed: Collection[str] = ()) -> TargetConfig | DrafterConfig:
    """A parsed config.json as a configuration.

    Args:
        values: config.json.
        file: named in errors.
        allowed: keys that are let pass although they speak of what would change tensors or their use.

    Raises:
        MtpError: it is damaged, lacks a key, or asks for a feature that is not supported.
    """
    root = Keys(values, file)
    target = _is_target(root)
    text = root if root.get("text_config") is None else root.inner("text_config")
    unified = UNIFIED_DEFAULTS if _is_unified(root, text) else {}
    text.defaults = root.defaults = {**DEFAULTS, **unified, **({} if target else DRAFTER_DEFAULTS)}
    _refuse_unsupported(text)
    text.get("tie_word_embeddings")  # transformers goes by the outer one
    shared = _text_fields(text) | {"tied": root.flag("tie_word_embeddings", True)}
    if target:
        _check_donors(file, shared["layer_types"], shared["n_kv_shared"])
    backbone = {} if target else _drafter(root, shared)
    _unknown(text, allowed)
    _older_rope(text, shared)
    return TargetConfig(**shared) if target else DrafterConfig(**shared | backbone)


def _is_target(root: Keys) -> bool:
    """Whether a configuration is a target's, by its class or, where that says nothing, by its model_type."""
    classes = root.get("architectures", [])
    named = [str(each) for each in (classes if isinstance(classes, list) else [classes])]
    kind = root.get("model_type")
    for targets, drafters, given in ((TARGET_CLASSES, DRAFTER_CLASSES, named), (TARGET_TYPES, DRAFTER_TYPES, [kind])):
        if found := [each for each in given if each in targets + drafters]:
            return found[0] in targets
    said = f"architecture {named[0]!r}" if named else f"model_type {kind!r}"
    raise MtpError(f"{root.file}: {said} is not supported; a Gemma 4 target or its assistant is wanted.")


def _is_unified(root: Keys, text: Keys) -> bool:
    """Whether the text model is the 12B's, which has other defaults."""
    kinds = text.get("model_type"), root.get("model_type"), root.get("architectures")
    return "unified" in str(next((kind for kind in kinds if kind), "")).lower()


def _rope(text: Keys) -> Keys:
    """The settings of RoPE; as in transformers those under their older name come first, if they are of this kind."""
    older = text.values.get("rope_scaling")
    text.get("rope_parameters")
    both = isinstance(older, dict) and older.keys() >= ROPE_DEFAULTS.keys()
    return text.inner("rope_scaling" if both else "rope_parameters")


def _older_rope(text: Keys, used: Mapping[str, Any]) -> None:
    """Tell of frequencies as Gemma 3 had them, which transformers does not look at, where they differ."""
    for key, name in (("rope_theta", "rope_theta"), ("rope_local_base_freq", "rope_theta_sliding")):
        value = text.values.get(key)
        if value is not None and value != used[name]:
            said = json.dumps(value)[:60]
            warn(f"{text.file}: {key} = {said} is left out, as in transformers: {used[name]:g} is taken.")


def _unknown(text: Keys, allowed: Collection[str]) -> None:
    """Refuse keys that nobody asked for and that may change tensors or their use; warn of others."""
    unknown = []
    for key, value in text.unread():
        if key in allowed:
            continue
        if CHANGES.search(key):
            raise MtpError(
                f"{text.file}: {key} = {json.dumps(value)[:60]} may change the model, and is not known here; "
                f"--allow-unknown {key} converts as if it were not there."
            )
        unknown.append(key)
    if unknown:
        warn(f"{text.file}: not known, and left out as in transformers: {', '.join(unknown)}.")


def _refuse_unsupported(text: Keys) -> None:
    """Name the features that this converter would get wrong."""
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
    rope = _rope(text)
    for kind, known_types in (("full_attention", ("proportional", "default")), ("sliding_attention", ("default",))):
        inner = rope.inner(kind)
        if (got := inner.get("rope_type", "default")) not in known_types:
            raise MtpError(f"{text.file}: rope_type of {kind} is {got!r}, only {known_types[0]!r} is supported.")
        if inner.get("factor", 1.0) != 1.0:
            raise MtpError(f"{text.file}: rope scaling of {kind} (factor {inner.get('factor')}) is not supported.")
        if (part := _finite(inner, "partial_rotary_factor", 1.0)) > 1:
            raise MtpError(f"{text.file}: partial_rotary_factor of {kind} is {part:g}, wanted 0 to 1.")
        if part != 1 and kind == "sliding_attention":  # where transformers rotates all of a head
            warn(f"{text.file}: partial_rotary_factor = {part:g} of {kind} is left out, as in transformers.")


def _layer_types(text: Keys) -> tuple[str, ...]:
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


def _full_layers(text: Keys, types: tuple[str, ...]) -> tuple[int, int | None]:
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
        values = Keys(per_layer.get(str(layer), {}), text.file)
        pair = values.some_size("head_dim"), values.some_size("num_key_value_heads")
        for key, value in values.unread():
            raise MtpError(f"{text.file}: per_layer_config of layer {layer} has {key} = {value!r}, which is not known.")
        if kind == "full_attention":
            found.add(pair)
        elif pair[0] not in (None, text.size("head_dim")) or pair[1] not in (None, text.size("num_key_value_heads")):
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


def _text_fields(text: Keys) -> dict[str, Any]:
    rope = _rope(text)
    full, sliding = rope.inner("full_attention"), rope.inner("sliding_attention")
    types = _layer_types(text)
    head_dim_full, n_kv_full = _full_layers(text, types)
    moe = text.flag("enable_moe_block", False)
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
        "v_is_k": text.flag("attention_k_eq_v", False),
        "per_layer_input": _per_layer_input(text),
        "double_wide_mlp": text.flag("use_double_wide_mlp", False),
        "moe": moe,
        "n_expert": experts["num_experts"],
        "n_expert_used": experts["top_k_experts"],
        "n_ff_expert": experts["moe_intermediate_size"],
        "context_length": text.size("max_position_embeddings"),
        "rms_eps": _finite(text, "rms_norm_eps"),
        "softcap": _finite(text, "final_logit_softcapping", 0) or None,
        "rope_theta": _finite(full, "rope_theta"),
        "rope_theta_sliding": _finite(sliding, "rope_theta"),
        "partial_rotary": _partial_rotary(full),
        "vocab_size": text.size("vocab_size"),
    }


def _per_layer_input(text: Keys) -> int:
    """Width of a layer's share of the per-layer embeddings, 0 for none; null says that there are none."""
    key = "hidden_size_per_layer_input"
    return text.some_size(key) or 0 if key in text.values else text.size(key)


def _partial_rotary(full: Keys) -> float:
    """The rotated share of a full-attention head. RoPE of the type "default" rotates all, whatever the key says."""
    share = _finite(full, "partial_rotary_factor", 1.0)
    return share if full.get("rope_type") == "proportional" else 1.0


def _finite(keys: Keys, key: str, default: float | None = None) -> float:
    """A number, not negative, with which can be reckoned."""
    value = keys[key] if default is None else keys.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= F32_MAX:
        raise MtpError(f"{keys.file}: {key} = {value!r} is not a number to reckon with; download it again.")
    return float(value)


def _drafter(root: Keys, text: dict[str, Any]) -> dict[str, Any]:
    """What a drafter has on top of its text model, whose layers all read the target's KV cache."""
    backbone = root.size("backbone_hidden_size")
    for wrong, what in ((text["moe"], "enable_moe_block"),
                        (text["per_layer_input"], "hidden_size_per_layer_input"),
                        (text["n_kv_shared"] not in (0, text["n_layer"]), "num_kv_shared_layers"),
                        (backbone == text["n_embd"], "hidden_size = backbone_hidden_size")):  # fmt: skip
        if wrong:
            raise MtpError(f"{root.file}: {what} is not supported in a drafter.")
    return {
        "n_kv_shared": text["n_layer"],
        "backbone": backbone,
        "ordered": root.flag("use_ordered_embeddings", False),
        "n_ordered": text["vocab_size"],
        "n_centroids": root.size("num_centroids"),
        "top_k": root.size("centroid_intermediate_top_k"),
    }
