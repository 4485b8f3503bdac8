"""Tiny random Gemma 4 pairs, made with transformers in a second: right in every shape, and without a thought."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4_assistant import Gemma4AssistantConfig, Gemma4AssistantForCausalLM
from transformers.models.gemma4_unified import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration
from transformers.models.gemma4_unified_assistant import (
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
)

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
    "enable_moe_block": False,
}

# The five targets, each with what sets it apart at full size, in a sixteenth or less of its width. E2B is TEXT itself.
NO_PER_LAYER: dict[str, Any] = {
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
}  # fmt: skip
K_EQ_V = {"attention_k_eq_v": True, "num_key_value_heads": 4, "num_attention_heads": 8}
SIZES: dict[str, dict[str, Any]] = {
    "E2B": {},
    "E4B": {"num_key_value_heads": 2, "use_double_wide_mlp": False},
    "12B": NO_PER_LAYER | K_EQ_V | {"num_global_key_value_heads": 1},
    "26B-A4B": NO_PER_LAYER | K_EQ_V | {
        "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
        "moe_intermediate_size": 256,
    },
    "31B": NO_PER_LAYER | K_EQ_V | {"num_global_key_value_heads": 2, "num_hidden_layers": 9,
                                    "layer_types": TEXT["layer_types"] + TEXT["layer_types"][:3]},
}  # fmt: skip


def save(model: Any, folder: Path, dtype: torch.dtype, like: str, shard: str) -> Path:
    """Norms and scales that are not 1, the weights in a folder, and a bundled model's tokenizer beside them."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            tensor.data.normal_(1, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for part in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (PAIR / like / part).exists():
            shutil.copy(PAIR / like / part, folder / part)
    return folder


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_target(
    folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB", seed: int = 0, **text: Any
) -> Path:
    """A target like E2B: per-layer embeddings, shared-KV layers, both kinds of attention, double-wide MLP."""
    torch.manual_seed(seed)
    config = Gemma4Config(text_config=TEXT | text, vision_config=None, audio_config=None)
    return save(Gemma4ForConditionalGeneration(config), folder, dtype, "gemma-4-demo", shard)


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
    return save(model, folder, torch.bfloat16, "gemma-4-demo-assistant", "1GB")


def make_pair(size: str, root: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB") -> tuple[Path, Path]:
    """Folders of a target of one of the five `SIZES` and of its drafter."""
    folders = root / f"tiny-{size}", root / f"tiny-{size}-assistant"
    if size != "12B":
        make_target(folders[0], dtype, shard, **SIZES[size])
        kept = {key: value for key, value in SIZES[size].items() if key not in DRAFTER and "expert" not in key}
        make_drafter(folders[1], ordered=size in ("E2B", "E4B"), **kept)
        return folders
    torch.manual_seed(2)
    text = {key: value for key, value in (TEXT | SIZES[size]).items() if "per_layer_input" not in key}
    small = {key: value for key, value in DRAFTER.items() if "per_layer_input" not in key}
    small.pop("enable_moe_block")
    target = Gemma4UnifiedConfig(text_config=text, vision_config=None, audio_config=None)
    drafter = Gemma4UnifiedAssistantConfig(text_config=text | small, backbone_hidden_size=text["hidden_size"])
    save(Gemma4UnifiedForConditionalGeneration(target), folders[0], dtype, "gemma-4-demo", shard)
    save(Gemma4UnifiedAssistantForCausalLM(drafter), folders[1], dtype, "gemma-4-demo-assistant", shard)
    for folder in folders:
        edit_json(folder / "generation_config.json", suppress_tokens=[3070, 3071])
        # transformers 5.22 leaves this key out of a unified text_config; upstream's converter cannot do without it.
        text = json.loads((folder / "config.json").read_text())["text_config"]
        edit_json(folder / "config.json", text_config=text | {"moe_intermediate_size": None})
    return folders
