"""The one table from Hugging Face names to GGUF names, and what is left out with its reason.

GGUF names as in gguf-py/gguf/constants.py, mapped as gguf-py/gguf/tensor_mapping.py does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Once per model; the Hugging Face name without the prefix "model." and without "language_model.".
MODEL = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
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
}

# Written by the converter itself; no tensor of the checkpoint.
ROPE_FREQS = "rope_freqs.weight"

CENTROIDS = "masked_embedding.centroids.weight"
ORDERING = "masked_embedding.token_ordering"

# What a checkpoint holds and the GGUF file does not: start of the name, reason.
DROPPED = {
    "masked_embedding.": "travels as mtp.ordered.* metadata, because stock llama.cpp cannot load these tensors",
    "lm_head.weight": "the output matrix is the token embedding",
    "model.vision_tower.": "image input is not part of the text model",
    "model.embed_vision.": "image input is not part of the text model",
    "model.audio_tower.": "audio input is not part of the text model",
    "model.embed_audio.": "audio input is not part of the text model",
}


class Place(NamedTuple):
    """Where a tensor goes: its GGUF name, its row of the tables above, and its layer (None outside the layers)."""

    gguf: str
    key: str
    layer: int | None


def place(name: str) -> Place | None:
    """The place of a Hugging Face tensor, or None if the tables do not know it."""
    short = name.replace("language_model.", "").removeprefix("model.")
    if short in MODEL:
        return Place(MODEL[short], short, None)
    inside = re.fullmatch(r"layers\.(\d+)\.(.+)", short)
    if inside and inside[2] in LAYER:
        return Place(f"blk.{inside[1]}.{LAYER[inside[2]]}", inside[2], int(inside[1]))
    return None


def dropped(name: str) -> str | None:
    """The reason why a tensor is left out, or None if it is not."""
    return next((reason for start, reason in DROPPED.items() if name.startswith(start)), None)
