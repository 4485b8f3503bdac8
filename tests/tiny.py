"""Tiny random Gemma 4 pairs, made with transformers in a second: right in every shape, and without a thought."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4_assistant import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

PAIR = Path(__file__).parent / "pair"
VOCAB = 3072  # that of the bundled tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
    "num_kv_shared_layers": 3,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCAB,
    "use_double_wide_mlp": True,
    "max_position_embeddings": 1024,
    "final_logit_softcapping": 30.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.1,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

DRAFTER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "final_logit_softcapping": None,
}


def _save(model: Any, folder: Path, dtype: torch.dtype, like: str, shard: str) -> Path:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for part in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (PAIR / like / part).exists():
            shutil.copy(PAIR / like / part, folder / part)
    return folder


def make_target(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB", **text: Any) -> Path:
    """A target like E2B: per-layer embeddings, shared-KV layers, both kinds of attention, double-wide MLP."""
    torch.manual_seed(0)
    config = Gemma4Config(text_config=TEXT | text, vision_config=None, audio_config=None)
    return _save(Gemma4ForConditionalGeneration(config), folder, dtype, "gemma-4-demo", shard)


def make_drafter(folder: Path, *, ordered: bool, backbone: int = 256, **text: Any) -> Path:
    """A drafter for `make_target`, with ordered embeddings (96 clusters, 12 of them read) or a dense head."""
    torch.manual_seed(1)
    config = Gemma4AssistantConfig(
        text_config=TEXT | DRAFTER | text,
        backbone_hidden_size=backbone,
        use_ordered_embeddings=ordered,
        num_centroids=96,
        centroid_intermediate_top_k=12,
    )
    model = Gemma4AssistantForCausalLM(config)
    if ordered:
        model.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB))
    return _save(model, folder, torch.bfloat16, "gemma-4-demo-assistant", "1GB")
