"""A Hugging Face folder, opened and checked: its configuration, its tensor index, and reads of a few rows at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gemma_mtp.convert.errors import MtpError, damaged
from gemma_mtp.convert.safetensors_file import check_file
from safetensors import SafetensorError, safe_open

TARGET_CLASSES = ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM")
DRAFTER_CLASSES = ("Gemma4AssistantForCausalLM",)
# The number of values taken from each of three places of every tensor for the fingerprint.
SAMPLE = 4096
# Keys of config.json that change without the model changing.
INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class TextConfig:
    """The text model of a target or a drafter, as config.json gives it.

    Sizes are in elements. `per_layer_input` is 0 without per-layer embeddings, `n_kv_full` is None when all layers have
    the same number of KV heads.
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
    per_layer_input: int
    double_wide_mlp: bool
    context_length: int
    rms_eps: float
    softcap: float | None
    rope_theta: float
    rope_theta_sliding: float
    partial_rotary: float
    partial_rotary_sliding: float
    vocab_size: int

    def is_full(self, layer: int) -> bool:
        return self.layer_types[layer] == "full_attention"

    def n_ff_of(self, layer: int) -> int:
        """Width of a layer's MLP: doubled where the KV cache is shared, if the model says so."""
        wide = self.double_wide_mlp and layer >= self.n_layer - self.n_kv_shared
        return self.n_ff * (2 if wide else 1)


@dataclass(frozen=True)
class TargetConfig(TextConfig):
    """A target: nothing beyond its text model is converted."""


@dataclass(frozen=True)
class DrafterConfig(TextConfig):
    """A drafter. `ordered`: it has the clustered head, with `n_centroids` clusters of which `top_k` are read."""

    backbone: int
    ordered: bool
    n_centroids: int
    top_k: int


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: file, shape as torch has it, and safetensors' name of its type."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Keys:
    """Required and optional keys of a configuration, with an error that names file and key."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values, self.file = values, file

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise MtpError(f"{self.file} has no {key!r}; download the configuration again.")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def inner(self, key: str) -> _Keys:
        return _Keys(self[key], self.file)


def read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise MtpError(f"{path}: {problem.strerror}; a Hugging Face model folder is wanted.") from None
    except (ValueError, RecursionError) as problem:
        raise MtpError(f"{path} is not JSON ({problem}); download it again.") from None
    if not isinstance(parsed, dict):
        raise MtpError(f"{path} does not hold a JSON object; download it again.")
    return parsed


def _refuse_unknown(text: _Keys) -> None:
    """Name the features that this converter would get wrong."""
    unknown = {
        "enable_moe_block": not text.get("enable_moe_block", False),
        "attention_k_eq_v": not text.get("attention_k_eq_v", False),
        "attention_bias": not text.get("attention_bias", False),
        "hidden_activation": text.get("hidden_activation", "gelu_pytorch_tanh") == "gelu_pytorch_tanh",
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
    }
    for key, known in unknown.items():
        if not known:
            raise MtpError(
                f"{text.file}: {key} = {text.get(key)!r} is not supported; "
                "E2B- and E4B-style targets and their drafters can be converted."
            )
    rope = text.inner("rope_parameters")
    for kind, wanted in (("full_attention", "proportional"), ("sliding_attention", "default")):
        if rope.inner(kind)["rope_type"] != wanted:
            got = rope.inner(kind)["rope_type"]
            raise MtpError(f"{text.file}: rope_type of {kind} is {got!r}, only {wanted!r} is supported.")


def _of_full_layers(text: _Keys, key: str, inner: str) -> Any:
    """A value of the full-attention layers: under `key`, or per layer as transformers from 5.22 on writes it."""
    if text.get(key) is not None:
        return text[key]
    types = text["layer_types"]
    for layer, values in text.get("per_layer_config", {}).items():
        if int(layer) < len(types) and types[int(layer)] == "full_attention" and inner in values:
            return values[inner]
    return None


def read_config(folder: Path) -> TargetConfig | DrafterConfig:
    """Read config.json.

    Raises:
        MtpError: it is missing or damaged, lacks a key, or asks for a feature that is not supported.
    """
    file = folder / "config.json"
    root = _Keys(read_json(file), file)
    name = str(root["architectures"][0])
    if name not in TARGET_CLASSES + DRAFTER_CLASSES:
        wanted = ", ".join(TARGET_CLASSES + DRAFTER_CLASSES)
        raise MtpError(f"{file}: architecture {name!r} is not supported; wanted one of {wanted}.")
    text = root if root.get("text_config") is None else root.inner("text_config")
    _refuse_unknown(text)
    rope = text.inner("rope_parameters")
    full, sliding = rope.inner("full_attention"), rope.inner("sliding_attention")
    head_dim_full = _of_full_layers(text, "global_head_dim", "head_dim")
    shared = {
        "n_layer": int(text["num_hidden_layers"]),
        "n_embd": int(text["hidden_size"]),
        "n_ff": int(text["intermediate_size"]),
        "n_head": int(text["num_attention_heads"]),
        "n_kv": int(text["num_key_value_heads"]),
        "n_kv_full": _of_full_layers(text, "num_global_key_value_heads", "num_key_value_heads"),
        "head_dim": int(text["head_dim"]),
        "head_dim_full": int(text["head_dim"] if head_dim_full is None else head_dim_full),
        "layer_types": tuple(text["layer_types"]),
        "sliding_window": int(text["sliding_window"]),
        "n_kv_shared": int(text["num_kv_shared_layers"]),
        "per_layer_input": int(text.get("hidden_size_per_layer_input", 0)),
        "double_wide_mlp": bool(text.get("use_double_wide_mlp", False)),
        "context_length": int(text["max_position_embeddings"]),
        "rms_eps": float(text["rms_norm_eps"]),
        "softcap": None if (softcap := text.get("final_logit_softcapping")) is None else float(softcap),
        "rope_theta": float(full["rope_theta"]),
        "rope_theta_sliding": float(sliding["rope_theta"]),
        "partial_rotary": float(full["partial_rotary_factor"]),
        "partial_rotary_sliding": float(sliding.get("partial_rotary_factor", 1.0)),
        "vocab_size": int(text["vocab_size"]),
    }
    if len(shared["layer_types"]) != shared["n_layer"]:
        raise MtpError(f"{file}: {len(shared['layer_types'])} layer_types for {shared['n_layer']} layers.")
    if name in TARGET_CLASSES:
        return TargetConfig(**shared)
    return DrafterConfig(
        **shared,
        backbone=int(root["backbone_hidden_size"]),
        ordered=bool(root.get("use_ordered_embeddings", False)),
        n_centroids=int(root.get("num_centroids", 0)),
        top_k=int(root.get("centroid_intermediate_top_k", 0)),
    )


class Checkpoint:
    """An open checkpoint: `config`, `generation` (generation_config.json or {}), `index`, and rows on demand."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        if not folder.is_dir():
            raise MtpError(f"{folder} is not a folder; pass the folder of a Hugging Face checkpoint.")
        self.folder = folder
        with damaged(folder / "config.json"):
            self.config = read_config(folder)
        generation = folder / "generation_config.json"
        self.generation = read_json(generation) if generation.exists() else {}
        self._open = {path: _open(path, files) for path in _weight_files(folder)}
        self.index: dict[str, Source] = {}
        for path, file in self._open.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name in self.index:
                    raise MtpError(f"{path} holds {name!r}, and so does {self.index[name].file.name}; download again.")
                piece = file.get_slice(name)
                self.index[name] = Source(path, tuple(piece.get_shape()), piece.get_dtype())
        _check_index(folder, self.index)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first dimension of a tensor, in the type it is stored in."""
        source = self.index[name]
        try:
            rows: torch.Tensor = self._open[source.file].get_slice(name)[start:stop]
        except SafetensorError as problem:
            raise MtpError(f"{source.file}: cannot read {name!r} ({problem}); download it again.") from None
        return rows

    def fingerprint(self) -> str:
        """SHA-256 over configuration, tensor names, types and shapes, and a sample of every tensor's values.

        It does not depend on how the tensors are spread over files, nor on the version that saved them.
        """
        config = {key: value for key, value in read_json(self.folder / "config.json").items() if key not in INCIDENTAL}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {key: value for key, value in text.items() if key not in INCIDENTAL}
        total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, source in sorted(self.index.items()):
            total.update(f"{name} {source.dtype} {source.shape}\n".encode())
            count = source.shape[0] if source.shape else 0
            # A vector is sampled in one piece: its rows are single values.
            pieces = [(row, row + 1) for row in sorted({0, count // 2, count - 1})] if count else []
            for start, stop in [(0, min(count, SAMPLE))] if len(source.shape) == 1 else pieces:
                sample = self.rows(name, start, stop).flatten()[:SAMPLE].contiguous()
                total.update(sample.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Open a Hugging Face folder for reading.

    Raises:
        MtpError: a file is missing, cut off or not what it should be.
    """
    with ExitStack() as files:
        yield Checkpoint(folder, files)


def open_weights(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The open safetensors file of every tensor of a folder, by the tensor's name.

    Raises:
        MtpError: a file is missing, cut off or not what it should be.
    """
    opened = [_open(path, files) for path in _weight_files(folder)]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all present."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise MtpError(f"{folder} has neither {single.name} nor {index.name}; download the weights.")
        return [single]
    names = sorted(set(_weight_map(index).values()))
    outside = [name for name in names if Path(name).name != name or name == ".."]
    if outside:
        raise MtpError(f"{index} names {outside[0]!r}, which is not a file of its folder; download it again.")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise MtpError(f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing)}; download them.")
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise MtpError(f"{index} has no weight_map; download it again.")
    return mapped


def _check_index(folder: Path, found: Mapping[str, Source]) -> None:
    """Compare what the index file promises with what the shards hold."""
    index = folder / "model.safetensors.index.json"
    for name, file in (_weight_map(index) if index.exists() else {}).items():
        if name not in found:
            raise MtpError(f"{folder / file} does not hold {name!r}, which {index.name} promises; download it again.")


def _open(path: Path, files: ExitStack) -> Any:
    check_file(path)
    try:
        return files.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as problem:
        raise MtpError(f"{path} is damaged or only partly downloaded ({problem}); download it again.") from None
