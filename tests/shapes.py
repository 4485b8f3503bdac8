"""Gemma 4 at its true shapes, without weights: configurations, headers of sparse files, plans.

Values as published in the repositories' config.json (README of google/gemma-4-*, ollama's x/models/gemma4 tests).
"""

from __future__ import annotations

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gemma_mtp.convert import names, plan
from gemma_mtp.convert.checkpoint import Source
from gemma_mtp.convert.config import DrafterConfig, TargetConfig, parse_config
from gemma_mtp.convert.metadata import ALIGNMENT
from gguf import GGUFValueType, GGUFWriter

COMMON = {
    "vocab_size": 262144, "head_dim": 256, "global_head_dim": 512, "rms_norm_eps": 1e-6, "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


def layers(n: int, period: int) -> dict[str, Any]:
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n)]
    return {"num_hidden_layers": n, "layer_types": kinds}


def text(embd: int, ff: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": embd, "intermediate_size": ff, "num_attention_heads": heads, "num_key_value_heads": kv}
    return COMMON | {"sliding_window": 1024, "max_position_embeddings": 262144, "final_logit_softcapping": 30.0,
                     "num_kv_shared_layers": 0, "num_global_key_value_heads": None} | sizes | more  # fmt: skip


EDGE = {"sliding_window": 512, "max_position_embeddings": 131072, "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144}  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "E2B": text(1536, 6144, 8, 1, **EDGE, **layers(35, 5), use_double_wide_mlp=True) | {"num_kv_shared_layers": 20},
    "E4B": text(2560, 10240, 8, 2, **EDGE, **layers(42, 6)) | {"num_kv_shared_layers": 18},
    "12B": text(3840, 15360, 16, 8, **layers(48, 6), attention_k_eq_v=True) | {"num_global_key_value_heads": 1},
    "26B-A4B": text(
        2816, 2112, 16, 8, **layers(30, 6), attention_k_eq_v=True, enable_moe_block=True, num_experts=128,
        top_k_experts=8, moe_intermediate_size=704,
    ) | {"num_global_key_value_heads": 2},
    "31B": text(5376, 21504, 32, 16, **layers(60, 6), attention_k_eq_v=True) | {"num_global_key_value_heads": 4},
}  # fmt: skip
# Hidden size, MLP width and query heads of the drafters; the rest is their target's.
DRAFTERS = {
    "E2B": (256, 2048, 4), "E4B": (256, 2048, 4), "12B": (1024, 8192, 16), "26B-A4B": (1024, 8192, 16),
    "31B": (1024, 8192, 32),
}  # fmt: skip


def target_json(size: str) -> dict[str, Any]:
    """config.json of a target."""
    unified = "Unified" if size == "12B" else ""
    return {"architectures": [f"Gemma4{unified}ForConditionalGeneration"], "text_config": TARGETS[size]}


def drafter_json(size: str) -> dict[str, Any]:
    """config.json of a drafter."""
    embd, ff, heads = DRAFTERS[size]
    inner = {key: value for key, value in TARGETS[size].items() if "expert" not in key and "moe" not in key}
    inner |= {"hidden_size": embd, "intermediate_size": ff, "num_attention_heads": heads, **layers(4, 4)}
    inner |= {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "final_logit_softcapping": None,
              "use_double_wide_mlp": False}  # fmt: skip
    unified = "Unified" if size == "12B" else ""
    return {
        "architectures": [f"Gemma4{unified}AssistantForCausalLM"], "text_config": inner,
        "backbone_hidden_size": TARGETS[size]["hidden_size"], "use_ordered_embeddings": size in ("E2B", "E4B"),
        "num_centroids": 2048, "centroid_intermediate_top_k": 32,
    }  # fmt: skip


def parsed(config: dict[str, Any]) -> TargetConfig | DrafterConfig:
    return parse_config(config, Path("config.json"))


def hugging_face_names(config: TargetConfig | DrafterConfig) -> dict[str, str]:
    """GGUF name to Hugging Face name of everything that a model of this configuration may hold."""
    start = "model.language_model." if isinstance(config, TargetConfig) else "model."
    found = {right: start + left for left, right in names.MODEL.items()}
    found |= {f"nextn.{part}_projection.weight": f"{part}_projection.weight" for part in ("pre", "post")}
    for layer in range(config.n_layer):
        for left, right in names.LAYER.items():
            found[f"blk.{layer}.{right}"] = f"{start}layers.{layer}.{left}"
    return found


def index(config: TargetConfig | DrafterConfig, shared: bool = True) -> dict[str, Source]:
    """The tensors of a checkpoint in bf16; `shared`: with keys and values of layers that do not use them."""
    hf = hugging_face_names(config)
    unused = set() if shared else plan._optional(config)
    wanted = {name: shape for name, shape in plan.shapes(config).items() if name not in unused}
    found = {hf[name]: Source(Path("model.safetensors"), shape, "BF16") for name, shape in wanted.items()}
    if isinstance(config, DrafterConfig) and config.ordered:
        found[names.CENTROIDS] = Source(Path("model.safetensors"), (config.n_centroids, config.n_embd), "BF16")
        found[names.ORDERING] = Source(Path("model.safetensors"), (config.vocab_size,), "I64")
    return found


def safetensors_header(tensors: dict[str, Source]) -> tuple[bytes, int]:
    """What a safetensors file of bf16 and I64 tensors begins with, and how many bytes of weights follow."""
    header, end = {}, 0
    for name, source in tensors.items():
        size = prod(source.shape) * (8 if source.dtype == "I64" else 2)
        header[name] = {"dtype": source.dtype, "shape": source.shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, end


def sparse_safetensors(path: Path, tensors: dict[str, Source]) -> None:
    """A safetensors file whose weights are a hole: true header, true size, no bytes on the disk."""
    header, size = safetensors_header(tensors)
    path.write_bytes(header)
    os.truncate(path, len(header) + size)


def sparse_gguf(path: Path, planned: plan.Plan) -> None:
    """A GGUF file that llama-quantize --dry-run can plan for: true header, no weights."""
    writer = GGUFWriter(path, planned.arch)
    for key, (kind, value) in planned.parameters.items():
        if kind is GGUFValueType.ARRAY:
            writer.add_array(f"{planned.arch}.{key}", value)
        else:
            writer.add_key_value(f"{planned.arch}.{key}", value, kind)
    for tensor in planned.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + sum(tensor.n_bytes + ALIGNMENT for tensor in planned.tensors))
