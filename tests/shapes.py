"""Gemma 4 at its true shapes, without weights: configurations, headers of sparse files, plans."""

from __future__ import annotations

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gemma_mtp.convert import names, plan, sizes
from gemma_mtp.convert.checkpoint import Source
from gemma_mtp.convert.config import DrafterConfig, TargetConfig, parse_config
from gemma_mtp.convert.gguf_io.types import ALIGNMENT
from gguf import GGUFValueType, GGUFWriter


def target_json(size: str) -> dict[str, Any]:
    """config.json of a target."""
    config = sizes.configs(size)[0]
    text = config["text_config"]
    if text["hidden_size_per_layer_input"]:
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    return config


def drafter_json(size: str) -> dict[str, Any]:
    """config.json of a drafter."""
    return sizes.configs(size)[1]


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
    """A safetensors file whose weights are a hole: true header, true size, on the disk an ordering alone."""
    header, size = safetensors_header(tensors)
    path.write_bytes(header)
    os.truncate(path, len(header) + size)
    if ordering := tensors.get(names.ORDERING):
        begin, _ = json.loads(header[8:])[names.ORDERING]["data_offsets"]
        with path.open("r+b") as file:
            file.seek(len(header) + begin)
            file.write(np.arange(ordering.shape[0], dtype="<i8").tobytes())


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
