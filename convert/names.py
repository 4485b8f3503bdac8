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

EMBEDDING, PER_LAYER, OUTPUT = "token_embd.weight", "per_layer_token_embd.weight", "output.weight"
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

# Encoders of images and audio, outside the layers; Hugging Face names without the prefix "model.".
ENCODERS = {
    "vision_tower.patch_embedder.input_proj.weight": "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "vision_tower.std_bias": "v.std_bias",
    "vision_tower.std_scale": "v.std_scale",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "audio_tower.subsample_conv_projection.layer0.conv.weight": "a.conv1d.0.weight",
    "audio_tower.subsample_conv_projection.layer0.norm.weight": "a.conv1d.0.norm.weight",
    "audio_tower.subsample_conv_projection.layer1.conv.weight": "a.conv1d.1.weight",
    "audio_tower.subsample_conv_projection.layer1.norm.weight": "a.conv1d.1.norm.weight",
    "audio_tower.subsample_conv_projection.input_proj_linear.weight": "a.input_projection.weight",
    "audio_tower.output_proj.weight": "a.pre_encode.out.weight",
    "audio_tower.output_proj.bias": "a.pre_encode.out.bias",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}
# The 12B has no encoder: patches and frames are projected straight into the text model.
UNIFIED = {
    "vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "vision_embedder.patch_ln1.weight": "v.patch_norm.1.weight",
    "vision_embedder.patch_ln1.bias": "v.patch_norm.1.bias",
    "vision_embedder.patch_ln2.weight": "v.patch_norm.2.weight",
    "vision_embedder.patch_ln2.bias": "v.patch_norm.2.bias",
    "vision_embedder.pos_embedding": "v.position_embd.weight",
    "vision_embedder.pos_norm.weight": "v.patch_norm.3.weight",
    "vision_embedder.pos_norm.bias": "v.patch_norm.3.bias",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}
# Once per layer. A clipped linear layer holds its matrix under "linear" and four bounds beside it.
VISION_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm", "layer_scalar": "out_scale",
}  # fmt: skip
AUDIO_LAYER = {
    "feed_forward1.ffw_layer_1": "ffn_up", "feed_forward1.ffw_layer_2": "ffn_down",
    "feed_forward1.pre_layer_norm": "ffn_norm", "feed_forward1.post_layer_norm": "ffn_post_norm",
    "feed_forward2.ffw_layer_1": "ffn_up_1", "feed_forward2.ffw_layer_2": "ffn_down_1",
    "feed_forward2.pre_layer_norm": "ffn_norm_1", "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.post": "attn_out", "self_attn.relative_k_proj": "attn_k_rel",
    "self_attn.per_dim_scale": "per_dim_scale", "lconv1d.linear_start": "conv_pw1", "lconv1d.linear_end": "conv_pw2",
    "lconv1d.depthwise_conv1d": "conv_dw", "lconv1d.pre_layer_norm": "conv_norm", "lconv1d.conv_norm": "norm_conv",
    "norm_pre_attn": "attn_pre_norm", "norm_post_attn": "attn_post_norm", "norm_out": "ln2",
}  # fmt: skip
ENCODER_LAYER = re.compile(
    r"(vision_tower\.encoder|audio_tower)\.layers\.(\d+)\.(.+?)((?:\.linear)?\.weight|\.(?:in|out)put_m(?:in|ax)|)"
)
ENCODER_NAME = re.compile(r"(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\.")


# What the model computes itself, or what belongs to a training: ends and starts of names.
COMPUTED = "a buffer that the model computes itself"
TRAINING = "it belongs to a training, and the model does not read it"
BUFFERS = re.compile(
    r"(inv_freq|inv_timescales|embed_scale|position_ids|(cos|sin)_cached"
    r"|(activation_post_process|weight_fake_quant|observer)\..*)$"
)
HEADS = re.compile(r"(v_head|value_head|score|classifier|reward|reward_head)\.")
# Names that tell of another kind of checkpoint, and what is to be done with it.
QUANTIZED = "pass the checkpoint before quantization"
FOREIGN = (
    (r"\.lora_|\.base_layer\.|modules_to_save", "is of a LoRA adapter; merge it into its model first, and save that"),
    (r"\.(qweight|qzeros|g_idx)$", f"was quantized by GPTQ or AWQ; {QUANTIZED}"),
    (r"\.(SCB|(nested_)?(absmax|quant_map)|quant_state\..*)$", f"was quantized by bitsandbytes; {QUANTIZED}"),
    (r"\.(weight_scale|weight_scale_inv|weight_packed|weight_shape|input_scale|[kqv]_scale)$",
     f"was quantized to FP8 or compressed; {QUANTIZED}"),
    (r"\.(scales|biases)$", f"was quantized by MLX; {QUANTIZED}"),
    (r"(^|\.)(mtp\w*|nextn|assistant|draft_model|drafter|eagle\w*|medusa\w*|speculator)\.",
     "is of a drafter within its target's checkpoint; pass the two folders as they were published"),
)  # fmt: skip


class Place(NamedTuple):
    """Where a tensor goes: its GGUF name, its row of the tables above, and its layer (None outside the layers)."""

    gguf: str
    key: str
    layer: int | None


# What wraps a model when it is saved: at any place of a name, and before it, again and again.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = re.compile(r"(base_model\.model|module|model|language_model|text_model)\.")


def bare(name: str) -> str:
    """A Hugging Face name without what different exports put before it: "model.", "language_model.", both, and more."""
    name = WRAPPERS.sub("", name)
    while found := PREFIXES.match(name):
        name = name[found.end() :]
    return name.replace("language_model.", "")


def short(name: str) -> str:
    """As `bare`, and without what some exports put around the experts of a layer, which are in one tensor."""
    found = bare(name).replace(".moe.experts.", ".experts.")
    return found.removesuffix(".weight") if ".experts." in found else found


def foreign(name: str) -> str | None:
    """What a name tells of a checkpoint of another kind, with the next step; None if nothing."""
    return next((said for pattern, said in FOREIGN if re.search(pattern, name)), None)


class Expert(NamedTuple):
    """One expert's matrix: name of the tensor that holds those of all, number of the expert, and which part of it."""

    name: str
    number: int
    part: int


def expert(name: str) -> Expert | None:
    """Where a tensor of a single expert goes, as some exports have them: gate before up, as in experts.gate_up_proj."""
    found = re.fullmatch(r"(layers\.\d+\.)(?:moe\.)?experts\.(\d+)\.(gate|up|down)_proj(?:\.weight)?", bare(name))
    if found is None:
        return None
    whole = "down_proj" if found[3] == "down" else "gate_up_proj"
    return Expert(f"{found[1]}experts.{whole}", int(found[2]), int(found[3] == "up"))


def place(name: str) -> Place | None:
    """The place of a Hugging Face tensor, or None if the tables do not know it."""
    found = short(name)
    if found in MODEL:
        return Place(MODEL[found], found, None)
    inside = re.fullmatch(r"layers\.(\d+)\.(.+)", found)
    if inside and inside[2] in LAYER:
        return Place(f"blk.{inside[1]}.{LAYER[inside[2]]}", inside[2], int(inside[1]))
    return None


def dropped(name: str) -> str | None:
    """The reason why a tensor is left out of every file, or None if it is not."""
    found = short(name)
    if BUFFERS.search(found):
        return COMPUTED
    if HEADS.match(found):
        return TRAINING
    return next((reason for start, reason in DROPPED.items() if found.startswith(start)), None)


def place_encoder(bare: str, unified: bool) -> str | None:
    """GGUF name of a tensor of the encoders, its Hugging Face name as `bare` has it, or None if it is not known."""
    table = UNIFIED if unified else ENCODERS
    found = ENCODER_LAYER.fullmatch(bare)
    if bare in table or unified or found is None:
        return table.get(bare)
    tower, layer, part, end = found.groups()
    inner = (VISION_LAYER if tower.startswith("vision") else AUDIO_LAYER).get(part)
    if inner is None:
        return None
    end = ".weight" if end in ("", ".linear.weight") else end
    return f"{tower[0]}.blk.{layer}.{inner}{end}"
