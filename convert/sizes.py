"""The five published sizes of Gemma 4, as data: what config.json of each target and drafter says of its shape.

As collected in ollama's x/models/gemma4/gemma4_test.go and in the drafters' model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_mtp.convert.errors import MtpError

DRAFTER_LAYERS = 4
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
COMMON: dict[str, Any] = {
    "vocab_size": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": ROPE,
}
SMALL = {"sliding_window": 512, "max_position_embeddings": 131072, "num_global_key_value_heads": None}
SMALL_DRAFTER = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
LARGE = {"sliding_window": 1024, "max_position_embeddings": 262144, "attention_k_eq_v": True}
LARGE_TARGET = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
LARGE_DRAFTER = {"hidden_size": 1024, "intermediate_size": 8192}


@dataclass(frozen=True)
class Size:
    """One published pair. A group of `period` layers ends in one of full attention."""

    period: int
    target: Mapping[str, Any]
    drafter: Mapping[str, Any]
    ordered: bool
    shared: Mapping[str, Any]  # what both text configurations hold

    @property
    def n_embd(self) -> int:
        """Hidden size of the target."""
        return int(self.target["hidden_size"])


SIZES = {
    "E2B": Size(
        5,
        {"hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "use_double_wide_mlp": True,
         "num_attention_heads": 8, "num_kv_shared_layers": 20, "hidden_size_per_layer_input": 256},
        SMALL_DRAFTER, True, SMALL | {"num_key_value_heads": 1},
    ),
    "E4B": Size(
        6,
        {"hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240, "use_double_wide_mlp": False,
         "num_attention_heads": 8, "num_kv_shared_layers": 18, "hidden_size_per_layer_input": 256},
        SMALL_DRAFTER, True, SMALL | {"num_key_value_heads": 2},
    ),
    "12B": Size(
        6,
        LARGE_TARGET | {"hidden_size": 3840, "num_hidden_layers": 48, "intermediate_size": 15360},
        LARGE_DRAFTER, False,
        LARGE | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1},
    ),
    "26B-A4B": Size(
        6,
        LARGE_TARGET | {"hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
                        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        LARGE_DRAFTER, False,
        LARGE | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2},
    ),
    "31B": Size(
        6,
        LARGE_TARGET | {"hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504},
        LARGE_DRAFTER, False,
        LARGE | {"num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4},
    ),
}  # fmt: skip


def configs(size: str, layers: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a size's target and drafter, the target cut to fewer layers if asked.

    The share of layers that read another layer's KV cache is kept; the layers that lend theirs are always there.

    Raises:
        MtpError: the number of layers is no multiple of the period, or more than the size has.
    """
    spec = SIZES[size]
    text = {**COMMON, **spec.shared, **spec.target}
    all_layers, period = text["num_hidden_layers"], spec.period
    count = all_layers if layers is None else layers
    if count % period or not 0 < count <= all_layers:
        raise MtpError(f"{size} with {layers} layers: give a multiple of {period}, at most {all_layers}.")
    if count < all_layers and text["num_kv_shared_layers"]:
        own = round((all_layers - text["num_kv_shared_layers"]) / all_layers * count / period) * period
        text["num_kv_shared_layers"] = count - max(own, period)
    text["num_hidden_layers"] = count
    text["layer_types"] = ([SLIDING] * (period - 1) + [FULL]) * (count // period)
    text["final_logit_softcapping"] = 30.0
    drafter = {
        **COMMON, **spec.shared, **spec.drafter, "num_hidden_layers": DRAFTER_LAYERS, "use_double_wide_mlp": False,
        "num_kv_shared_layers": DRAFTER_LAYERS, "layer_types": [SLIDING] * (DRAFTER_LAYERS - 1) + [FULL],
        "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    unified = "Unified" if size == "12B" else ""
    return (
        {"architectures": [f"Gemma4{unified}ForConditionalGeneration"], "text_config": text},
        {"architectures": [f"Gemma4{unified}AssistantForCausalLM"], "text_config": drafter,
         "backbone_hidden_size": text["hidden_size"], "use_ordered_embeddings": spec.ordered,
         "num_centroids": 2048, "centroid_intermediate_top_k": 32},
    )  # fmt: skip
