"""What will be written, decided from names and shapes alone: `plan` places every tensor or says why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gemma_mtp.convert import names, tensor_types
from gemma_mtp.convert.checkpoint import Source
from gemma_mtp.convert.config import DrafterConfig, TargetConfig
from gemma_mtp.convert.errors import MtpError, PairError, listed
from gemma_mtp.convert.gguf_io.check import check_parameters
from gemma_mtp.convert.gguf_io.ordered import broken_sizes
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.gguf_io.write import TensorInfo
from gemma_mtp.convert.link import DRAFTER_ARCH, TARGET_ARCH, Interface, differences
from gguf import GGUFValueType

Config = TargetConfig | DrafterConfig
CONFIG = Path("config.json")
SOURCE_TYPES = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}


@dataclass(frozen=True)
class Planned(TensorInfo):
    """One tensor to write, and its Hugging Face name, None for what the converter makes itself."""

    source: str | None


@dataclass(frozen=True)
class Plan:
    """One GGUF file: architecture, format, metadata of the model (name: type and value), tensors, what is left out."""

    arch: str
    quant: str
    parameters: Mapping[str, tuple[GGUFValueType, Any]]
    tensors: tuple[Planned, ...]
    dropped: Mapping[str, str]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_params(self) -> int:
        """Parameters of the checkpoint that the file holds."""
        return sum(prod(tensor.shape) for tensor in self.tensors if tensor.source is not None)


def plan(
    config: Config, index: Mapping[str, Source], quant: str, options: tensor_types.Options = tensor_types.DEFAULT
) -> Plan:
    """Place every tensor of a checkpoint in a GGUF file.

    Args:
        config: of the checkpoint.
        index: its tensors by Hugging Face name.
        quant: a key of `tensor_types.QUANTS`.
        options: types that the user wants otherwise than the format has them.

    Raises:
        MtpError: a tensor is unknown, there twice, missing, or of another shape or type than the configuration says.
    """
    if quant not in tensor_types.QUANTS:
        raise MtpError(f"unknown format {quant!r}; choose one of {', '.join(tensor_types.QUANTS)}.")
    file = next((source.file.with_name(CONFIG.name) for source in index.values()), CONFIG)
    placed, dropped = _place(config, index, file.parent)
    if isinstance(config, DrafterConfig) and config.ordered:
        _check_ordered_tensors(config, index, file)
    rows = [tensor_types.Row(name, index[source].shape, SOURCE_TYPES[index[source].dtype])
            for name, source in placed.items()]  # fmt: skip
    rows.append(tensor_types.Row(names.ROPE_FREQS, (config.head_dim_full // 2,), Type.F32))
    rows.sort(key=lambda row: _order(row.name))
    traits = tensor_types.Traits(config.n_layer, config.n_head // config.n_kv_of(0), config.n_expert or 0)
    types = tensor_types.choose(rows, quant, traits, options)
    if not options.imatrix:
        _check_imatrix(types, quant)
    return Plan(
        arch=arch_of(config),
        quant=quant,
        parameters=parameters(config, file),
        tensors=tuple(Planned(row.name, row.shape, types[row.name], placed.get(row.name)) for row in rows),
        dropped=dropped,
    )


def arch_of(config: Config) -> str:
    """The architecture of a checkpoint's file."""
    return DRAFTER_ARCH if isinstance(config, DrafterConfig) else TARGET_ARCH


def _place(config: Config, index: Mapping[str, Source], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """GGUF name to Hugging Face name of every tensor to write; and of those left out, the reason."""
    wanted = shapes(config)
    placed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    _check_kind(index)
    embedded = any(place.gguf == names.EMBEDDING for name in index if (place := names.place(name)) is not None)
    for name, source in index.items():
        place = names.place(name)
        if place is not None and place.gguf == names.OUTPUT and config.tied and not embedded:
            place = place._replace(gguf=names.EMBEDDING)  # safetensors.torch.save_model keeps one name of two
        reason = names.dropped(name) or _unused(config, place)
        if reason is not None:
            dropped[name] = reason
            continue
        if place is None or place.gguf not in wanted:
            raise MtpError(f"{source.file}: unknown tensor {name!r}; this checkpoint is not a Gemma 4 of a known kind.")
        if place.gguf in placed:
            raise MtpError(f"{source.file}: {name!r} and {placed[place.gguf]!r} are both {place.gguf}.")
        if source.dtype not in SOURCE_TYPES:
            raise MtpError(
                f"{source.file}: {name!r} is {source.dtype}; pass an unquantized one ({', '.join(SOURCE_TYPES)})."
            )
        if source.shape != wanted[place.gguf]:
            raise MtpError(
                f"{source.file}: {name!r} has shape {list(source.shape)}, config.json wants {list(wanted[place.gguf])}."
            )
        placed[place.gguf] = name
    missing = sorted(set(wanted) - set(placed) - _optional(config))
    if missing:
        raise MtpError(f"{folder} lacks {listed(missing)}; download its weights again.")
    return placed, dropped


def _check_kind(index: Mapping[str, Source]) -> None:
    """Refuse a checkpoint of another kind by the names of its tensors, which say more than their types and shapes."""
    for name, source in index.items():
        if names.dropped(name) is None and (said := names.foreign(name)) is not None:
            raise MtpError(f"{source.file}: {name!r} {said}.")


def _check_imatrix(types: Mapping[str, Type], quant: str) -> None:
    needy = [name for name, kind in types.items() if tensor_types.needs_imatrix(name, kind, quant)]
    if needy:
        raise MtpError(
            f"{quant} makes {needy[0]} {types[needy[0]].name}, which is garbage without an importance matrix; make one "
            "with llama-imatrix and pass it with --imatrix."
        )


def _unused(config: Config, place: names.Place | None) -> str | None:
    """The reason why the model itself would not read a tensor that it could have."""
    if place is None:
        return None
    if place.gguf == names.OUTPUT and config.tied:
        return names.TIED
    if place.key == "self_attn.v_proj.weight" and place.layer is not None and place.layer < config.n_layer:
        return names.V_IS_K if config.v_is_k and config.is_full(place.layer) else None
    return None


def _order(name: str) -> tuple[int, str]:
    """Outside the layers first, then layer by layer: the order in which llama.cpp's quantizer writes."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """GGUF name to shape, as torch has it, of every tensor that the configuration calls for or allows."""
    embd, per_layer = config.n_embd, config.per_layer_input
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, embd),
        "output_norm.weight": (embd,),
    }
    if not config.tied:
        found["output.weight"] = (config.vocab_size, embd)
    if per_layer:
        width = config.n_layer * per_layer
        found["per_layer_token_embd.weight"] = (config.vocab_size, width)
        found["per_layer_model_proj.weight"] = (width, embd)
        found["per_layer_proj_norm.weight"] = (per_layer,)
    if isinstance(config, DrafterConfig):
        found["nextn.pre_projection.weight"] = (embd, 2 * config.backbone)
        found["nextn.post_projection.weight"] = (config.backbone, embd)
    for layer in range(config.n_layer):
        found |= {f"blk.{layer}.{name}": shape for name, shape in _layer_shapes(config, layer).items()}
    return found


def _layer_shapes(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    embd, per_layer, ff = config.n_embd, config.per_layer_input, config.n_ff_of(layer)
    full = config.is_full(layer)
    head = config.head_dim_full if full else config.head_dim
    q, kv = config.n_head * head, config.n_kv_of(layer) * head
    found: dict[str, tuple[int, ...]] = {
        "attn_norm": (embd,), "post_attention_norm": (embd,), "ffn_norm": (embd,), "post_ffw_norm": (embd,),
        "attn_q": (q, embd), "attn_output": (embd, q), "attn_q_norm": (head,),
        "ffn_gate": (ff, embd), "ffn_up": (ff, embd), "ffn_down": (embd, ff), "layer_output_scale": (1,),
    }  # fmt: skip
    if isinstance(config, TargetConfig):
        found |= {"attn_k": (kv, embd), "attn_k_norm": (head,)}
        if not (full and config.v_is_k):
            found["attn_v"] = (kv, embd)
    if per_layer:
        found |= {"inp_gate": (per_layer, embd), "proj": (embd, per_layer), "post_norm": (embd,)}
    scales: dict[str, tuple[int, ...]] = {}
    if config.moe and config.n_expert and config.n_ff_expert:
        n, width = config.n_expert, config.n_ff_expert
        found |= {"pre_ffw_norm_2": (embd,), "post_ffw_norm_1": (embd,), "post_ffw_norm_2": (embd,),
                  "ffn_gate_inp": (n, embd), "ffn_gate_up_exps": (n, 2 * width, embd),
                  "ffn_down_exps": (n, embd, width)}  # fmt: skip
        scales = {"ffn_gate_inp.scale": (embd,), "ffn_down_exps.scale": (n,)}
    return {f"{name}.weight": shape for name, shape in found.items()} | scales


def _optional(config: Config) -> set[str]:
    """Keys and values of layers that read another layer's KV cache: some exports hold them, most do not."""
    shared = range(config.n_layer - config.n_kv_shared, config.n_layer)
    return {f"blk.{layer}.{name}.weight" for layer in shared for name in ("attn_k", "attn_v", "attn_k_norm")}


def _check_ordered_tensors(config: DrafterConfig, index: Mapping[str, Source], file: Path) -> None:
    """The tables of an ordered head: there, of the right shape, and cutting the vocabulary into equal clusters."""
    wanted = {names.CENTROIDS: (config.n_centroids, config.n_embd), names.ORDERING: (config.n_ordered,)}
    for name, shape in wanted.items():
        if name not in index:
            raise MtpError(f"{file} asks for ordered embeddings, but the checkpoint lacks {name!r}; download again.")
        if index[name].shape != shape:
            raise MtpError(f"{index[name].file}: {name!r} has shape {list(index[name].shape)}, wanted {list(shape)}.")
        kinds = ("I64", "I32") if name == names.ORDERING else tuple(SOURCE_TYPES)
        if index[name].dtype not in kinds:
            raise MtpError(f"{index[name].file}: {name!r} is {index[name].dtype}, wanted {' or '.join(kinds)}.")
    if any(broken_sizes(config.n_ordered, config.n_centroids, config.top_k)):
        raise MtpError(
            f"{file}: {config.n_ordered} tokens in {config.n_centroids} clusters, {config.top_k} of them read, "
            "do not make an ordered head."
        )


def parameters(config: Config, file: Path = CONFIG) -> dict[str, tuple[GGUFValueType, Any]]:
    """Metadata of the model, keys without the architecture's prefix, in the order of upstream's converter.

    Args:
        config: of the model.
        file: that it comes from, named in errors.

    Raises:
        MtpError: a value is out of bounds.
    """
    u32, f32, array = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY
    sliding = [not config.is_full(layer) for layer in range(config.n_layer)]
    widths = [config.n_ff_of(layer) for layer in range(config.n_layer)]
    kv_heads = [config.n_kv_of(layer) for layer in range(config.n_layer)]
    found: dict[str, tuple[GGUFValueType, Any]] = {
        "block_count": (u32, config.n_layer),
        "context_length": (u32, config.context_length),
        "embedding_length": (u32, config.n_embd),
        "feed_forward_length": (array, widths) if config.double_wide_mlp else (u32, config.n_ff),
        "attention.head_count": (u32, config.n_head),
        "attention.head_count_kv": (u32, config.n_kv) if config.n_kv_full is None else (array, kv_heads),
        "rope.freq_base": (f32, config.rope_theta),
        "rope.freq_base_swa": (f32, config.rope_theta_sliding),
        "attention.layer_norm_rms_epsilon": (f32, config.rms_eps),
        "attention.key_length": (u32, config.head_dim_full),
        "attention.value_length": (u32, config.head_dim_full),
        "attention.sliding_window": (u32, config.sliding_window),
        "attention.shared_kv_layers": (u32, config.n_kv_shared),
        "embedding_length_per_layer_input": (u32, config.per_layer_input),
        "attention.sliding_window_pattern": (array, sliding),
        "attention.key_length_swa": (u32, config.head_dim),
        "attention.value_length_swa": (u32, config.head_dim),
        "rope.dimension_count": (u32, config.head_dim_full),
        "rope.dimension_count_swa": (u32, config.head_dim),
    }
    experts = {
        "expert_count": config.n_expert,
        "expert_used_count": config.n_expert_used,
        "expert_feed_forward_length": config.n_ff_expert,
    }
    found |= {key: (u32, value) for key, value in experts.items() if value is not None}
    if config.softcap is not None or isinstance(config, TargetConfig):
        # Where a target's file says nothing, llama.cpp takes 30 (llama-hparams.h); 0 is none.
        found["final_logit_softcapping"] = (f32, float(config.softcap or 0))
    if isinstance(config, DrafterConfig):
        found["embedding_length_out"] = (u32, config.backbone)
        found["nextn_predict_layers"] = (u32, config.n_layer)
    for key, (kind, value) in found.items():
        if kind is u32 and not 0 <= value < 1 << 32:
            raise MtpError(f"{file} gives {value} for {key}, wanted 0 to {(1 << 32) - 1}; download it again.")
    check_parameters(file, arch_of(config), {key: value for key, (_, value) in found.items()})
    return found


def rope_freqs(config: Config) -> list[float]:
    """Divisors of the rotary frequencies of full-attention layers, length head_dim / 2; 1e30 leaves a pair unrotated.

    conversion/gemma.py (`generate_extra_tensors`): the way to say "proportional" RoPE to ggml.
    """
    rotated = int(config.head_dim_full * config.partial_rotary / 2)
    return [1.0] * rotated + [1e30] * (config.head_dim_full // 2 - rotated)


def check_roles(target: Config, drafter: Config) -> None:
    """Check that the first checkpoint is a target and the second a drafter.

    Raises:
        PairError: they are not.
    """
    if not isinstance(target, TargetConfig):
        raise PairError("the first folder holds a drafter; pass the target first, then its drafter.")
    if not isinstance(drafter, DrafterConfig):
        raise PairError("the second folder holds a target, not a drafter; pass the target first, then its drafter.")


def check_pair(target: Config, drafter: Config) -> None:
    """Check that two checkpoints are a target and a drafter made for its shapes.

    Raises:
        PairError: naming the first property that differs, with both values.
    """
    check_roles(target, drafter)
    assert isinstance(drafter, DrafterConfig)
    for name, ours, theirs in differences(
        _config_interface(target, target.n_embd), _config_interface(drafter, drafter.backbone)
    ):
        raise other_target(f"{name} is {ours} in the target, the drafter wants {theirs}")


def other_target(difference: str) -> PairError:
    """The error that two checkpoints are no pair."""
    return PairError(f"the drafter is of another target: {difference}; pass the drafter published for this target.")


def _config_interface(config: Config, n_embd: int) -> Interface:
    kinds = {("full" if config.is_full(layer) else "sliding"): config.n_kv_of(layer) for layer in range(config.n_layer)}
    return Interface(n_embd, config.sliding_window, config.vocab_size, config.head_dim_full, config.head_dim, kinds)
