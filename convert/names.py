"""The one table from Hugging Face names to GGUF names, and what is left out with its reason.

GGUF names as in gguf-py/gguf/constants.py, mapped as gguf-py/gguf/tensor_mapping.py does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Once per model; Hugging Face names here and below are without their prefixes, see `short`.
MODEL = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}

# Once per layer: layers.N.<left> becomes blk.N.<right>.
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    # Mixture of experts, beside the MLP above: three more norms, the router, the experts of a layer in one tensor.
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Written by the converter itself; no tensor of the checkpoint.
ROPE_FREQS = "rope_freqs.weight"

CENTROIDS = "masked_embedding.centroids.weight"
ORDERING = "masked_embedding.token_ordering"

# What a checkpoint holds and the GGUF file does not: start of the name, reason.
IMAGE = "image input is not part of the text model; llama.cpp reads it from an mmproj file"
AUDIO = "audio input is not part of the text model; llama.cpp reads it from an mmproj file"
DROPPED = {
    "masked_embedding.": "travels as mtp.ordered.* metadata, because stock llama.cpp cannot load these tensors",
    "vision_tower.": IMAGE,
    "vision_embedder.": IMAGE,
    "embed_vision.": IMAGE,
    "audio_tower.": AUDIO,
    "embed_audio.": AUDIO,
}
# Left out where the configuration says that the model does not read it.
TIED = "the output matrix is the token embedding (tie_word_embeddings)"
V_IS_K = "full-attention layers take their values from the key projection (attention_k_eq_v)"


class Place(NamedTuple):
    """Where a tensor goes: its GGUF name, its row of the tables above, and its layer (None outside the layers)."""

    gguf: str
    key: str
    layer: int | None


def short(name: str) -> str:
    """A Hugging Face name without the prefixes that differ between exports: "model.", "language_model.", both."""
    bare = name.replace("language_model.", "").removeprefix("model.")
    return bare.removesuffix(".weight") if ".experts." in bare else bare


def place(name: str) -> Place | None:
    """The place of a Hugging Face tensor, or None if the tables do not know it."""
    bare = short(name)
    if bare in MODEL:
        return Place(MODEL[bare], bare, None)
    inside = re.fullmatch(r"layers\.(\d+)\.(.+)", bare)
    if inside and inside[2] in LAYER:
        return Place(f"blk.{inside[1]}.{LAYER[inside[2]]}", inside[2], int(inside[1]))
    return None


def dropped(name: str) -> str | None:
    """The reason why a tensor is left out of every file, or None if it is not."""
    return next((reason for start, reason in DROPPED.items() if short(name).startswith(start)), None)
