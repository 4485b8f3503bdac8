"""The vision and audio encoders of a target as an mmproj GGUF file, which llama.cpp's mtmd and Ollama load beside it.

Names, types and metadata as upstream's converter has them (conversion/gemma.py, `Gemma4VisionAudioModel` and
`Gemma4UnifiedVisionAudioModel`); the encoders' own names are those of transformers' gemma4 and gemma4_unified.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gemma_mtp.convert import names, tensor_types
from gemma_mtp.convert.checkpoint import Source, Weights
from gemma_mtp.convert.config import read_json
from gemma_mtp.convert.errors import MtpError, damaged
from gemma_mtp.convert.gguf_io import types
from gemma_mtp.convert.gguf_io.types import Type as T
from gemma_mtp.convert.quantize import STORED_AS, Bytes, Floats, quantize
from gguf import GGUFWriter

FORMATS = ("F16", "BF16", "F32", "Q8_0")
ALIGNMENT = 32
# Outside the layers: Hugging Face name without the prefix "model.", and GGUF name.
SINGLE = {
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
LAYER = re.compile(
    r"(vision_tower\.encoder|audio_tower)\.layers\.(\d+)\.(.+?)((?:\.linear)?\.weight|\.(?:in|out)put_m(?:in|ax)|)"
)
ENCODERS = re.compile(r"(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\.")
# SLEEF's polynomials of e^x and log(1 + x), and log 2 as the sum of two float32 (sleefsimdsp.c, `xexpf`, `xlog1pf`).
EXP = (0.000198527617612853646278381, 0.00139304355252534151077271, 0.00833336077630519866943359,
       0.0416664853692054748535156, 0.166666671633720397949219, 0.5)  # fmt: skip
LOG1P = (0.3027294874, 0.3996108174, 0.6666694880)
LN2 = 0.69314718246459960938 - 1.904654323148236017e-09


@dataclass(frozen=True)
class Placed:
    """One tensor to write: GGUF name, Hugging Face name, what becomes of its values, shape as torch has it, type."""

    name: str
    source: str
    change: Callable[[Floats], Floats]
    shape: tuple[int, ...]
    type: T

    @property
    def n_bytes(self) -> int:
        return types.n_bytes(self.type, self.shape)


def write_mmproj(
    folder: Path, path: Path, quant: str = "F16", progress: Callable[[int], None] = lambda more: None
) -> None:
    """Write the encoders of a Hugging Face folder as one GGUF file, tensor after tensor.

    Args:
        folder: of a target with vision, or vision and audio.
        path: file to write; the caller keeps it out of sight until it is whole.
        quant: one of FORMATS.
        progress: called with the number of bytes after each tensor.

    Raises:
        MtpError: the checkpoint has no encoder, or a tensor is unknown, missing or holds NaN or infinite values.
    """
    config, tensors = plan_mmproj(folder, quant)
    with ExitStack() as files:
        weights = Weights(folder, files)
        writer = GGUFWriter(path, "clip")
        try:
            for tensor in tensors:
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
            _metadata(writer, folder, config, quant)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with path.open("ab") as file:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            for tensor in tensors:
                data = _blocks(folder, tensor, weights.values(tensor.source))
                file.write(data.data)
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                progress(len(data))
            file.flush()
            os.fsync(file.fileno())


def plan_mmproj(folder: Path, quant: str) -> tuple[dict[str, Any], list[Placed]]:
    """The configuration and every tensor that `write_mmproj` will write; raises what it raises, but for values."""
    with ExitStack() as files, damaged(folder / "config.json"):
        config = read_config(folder)
        return config, place_all(folder, Weights(folder, files).index, config, quant)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with the image processor's settings under "image_processor".

    Raises:
        MtpError: a file is missing or damaged, or the model has no vision.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config.get("vision_config"), dict):
        raise MtpError(f"{folder / 'config.json'} has no vision_config: this checkpoint has no projector to convert.")
    merged: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            settings = read_json(folder / name)
            merged |= settings | settings.get("image_processor", {})
    for key in ("image_mean", "image_std"):
        if len(merged.get(key) or ()) != 3:
            raise MtpError(
                f"{folder}: neither preprocessor_config.json nor processor_config.json has {key}; download them."
            )
    return {**config, "image_processor": merged}


def _unified(config: Mapping[str, Any]) -> bool:
    return "mm_embed_dim" in config["vision_config"]


def place_all(folder: Path, index: Mapping[str, Source], config: Mapping[str, Any], quant: str) -> list[Placed]:
    """Place every tensor of the encoders, in the order of the checkpoint.

    Raises:
        MtpError: a tensor is unknown or missing, or of a type that is no number.
    """
    if quant not in FORMATS:
        raise MtpError(f"unknown format {quant!r} of a projector; choose one of {', '.join(FORMATS)}.")
    placed = []
    for source, piece in index.items():
        if not ENCODERS.match(bare := names.bare(source)):
            continue
        name = gguf_name(bare, unified=_unified(config))
        if name is None:
            raise MtpError(f"{folder}: unknown tensor {source!r}; its projector is not of a known kind.")
        if piece.dtype not in STORED_AS:
            raise MtpError(f"{piece.file}: {source!r} is {piece.dtype}; pass an unquantized one.")
        change = _change(source, config["vision_config"])
        shape = change(np.broadcast_to(np.float32(0), piece.shape)).shape  # of an array that takes no memory
        placed.append(Placed(name, source, change, shape, _type(source, name, shape, T[quant])))
    _complete(folder, {tensor.name for tensor in placed}, config)
    return placed


def gguf_name(short: str, unified: bool) -> str | None:
    """GGUF name of a tensor of the encoders, or None if the tables do not know it."""
    table = UNIFIED if unified else SINGLE
    found = LAYER.fullmatch(short)
    if short in table or unified or found is None:
        return table.get(short)
    tower, layer, part, end = found.groups()
    inner = (VISION_LAYER if tower.startswith("vision") else AUDIO_LAYER).get(part)
    if inner is None:
        return None
    end = ".weight" if end in ("", ".linear.weight") else end
    return f"{tower[0]}.blk.{layer}.{inner}{end}"


def _change(source: str, vision: Mapping[str, Any]) -> Callable[[Floats], Floats]:
    """What mtmd wants other than transformers has it."""
    if source.endswith("per_dim_scale"):
        return softplus
    if source.endswith("depthwise_conv1d.weight"):
        return lambda values: values.reshape(values.shape[0], values.shape[2])
    if source.endswith("pos_embedding"):
        return lambda values: values.transpose(1, 0, 2)
    if source.endswith("patch_embedder.input_proj.weight"):  # pixels row by row, RGB each, to one plane for each colour
        side = int(vision["patch_size"])
        return lambda values: values.reshape(values.shape[0], side, side, 3).transpose(0, 3, 1, 2)
    if ".patch_dense.weight" in source or ".patch_ln1." in source:  # the same, flat
        side = int(vision.get("model_patch_size") or vision["patch_size"] * vision["pooling_kernel_size"])
        return lambda values: values.reshape(-1, side * side, 3).transpose(0, 2, 1).reshape(values.shape)
    return lambda values: values.reshape(values.shape or (1,))


def softplus(values: Floats) -> Floats:
    """log(1 + e^x) of values of any shape, to the last bit as upstream's converter has it on a CPU with vectors.

    It has it from torch, which computes both functions with SLEEF, in float32 and with one rounding in a multiply-add;
    the same is done here, but for results that are not even normal numbers (x below -86).
    """
    one, two = np.float32(1), np.float32(2)
    x = np.clip(values, -104, 20)
    x[np.isnan(x)] = 0  # NaN stays what it is
    n = np.rint(x * np.float32(1.442695040888963))
    rest = _multiply_add(n, np.float32(-1.428606765330187e-06), _multiply_add(n, np.float32(-0.693145751953125), x))
    power = np.ldexp(one + _multiply_add(rest * rest, _polynomial(EXP, rest), rest), n.astype(np.int32))
    exponent = np.frexp((power + one) * np.float32(1 / 0.75))[1] - 1
    scale = np.ldexp(one, -exponent)
    m = _multiply_add(power, scale, scale - one)
    ratio = m * (one / (two + m))
    square = ratio * ratio
    # SLEEF adds these up in pairs of float32, about as exactly.
    exact = exponent * LN2 + 2 * m.astype(np.float64) / (2 + m.astype(np.float64))
    result = (exact + square * ratio * _polynomial(LOG1P, square)).astype(np.float32)
    return np.where(values <= 20, result, values)


def _polynomial(coefficients: Sequence[float], x: Floats) -> Floats:
    """Horner's rule, highest power first."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = _multiply_add(result, x, np.float32(coefficient))
    return result


def _multiply_add(a: Floats, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a * b + c, rounded as good as once: the product of two float32 fits a float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _type(source: str, name: str, shape: tuple[int, ...], wanted: T) -> T:
    """The type of a tensor: vectors, norms, bounds, convolutions of the audio encoder and positions stay float32."""
    audio = "audio_tower" in source or "embed_audio" in source
    if len(shape) <= 1 or not name.endswith(".weight") or name.endswith("_norm.weight") or "position_emb" in name:
        return T.F32
    if audio and (".conv" in source or "_conv" in source):
        return T.F32
    if name == "v.patch_embd.weight":
        return T.F16 if wanted is T.F16 else T.F32
    return tensor_types.fitting(wanted, tensor_types.Shape(name, shape, wanted))


def _complete(folder: Path, names: set[str], config: Mapping[str, Any]) -> None:
    """Every part of the tables that the configuration calls for is there; scales and clipping bounds are optional."""
    audio = isinstance(config.get("audio_config"), dict)
    wanted = set((UNIFIED if _unified(config) else SINGLE).values()) - {"v.std_bias", "v.std_scale"}
    if not _unified(config):
        towers = [("v", config["vision_config"], VISION_LAYER)]
        towers += [("a", config["audio_config"], AUDIO_LAYER)] if audio else []
        for start, tower, table in towers:
            parts = set(table.values()) - {"out_scale"}
            wanted |= {f"{start}.blk.{n}.{part}.weight" for n in range(tower["num_hidden_layers"]) for part in parts}
    if not audio:
        wanted = {name for name in wanted if not name.startswith(("a.", "mm.a."))}
    missing = sorted(wanted - names)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MtpError(f"{folder}: the projector lacks {', '.join(missing[:3])}{more}; download the weights again.")


def _blocks(folder: Path, tensor: Placed, values: Floats) -> Bytes:
    changed = np.ascontiguousarray(tensor.change(values))
    if tensor.source.endswith(("_min", "_max")):  # a bound that is infinite clips nothing
        return changed.reshape(-1).view(np.uint8)
    try:
        return quantize(changed, tensor.type)
    except MtpError as problem:
        raise MtpError(f"{folder}: tensor {tensor.source!r}: {problem}.") from None


def _metadata(writer: GGUFWriter, folder: Path, config: Mapping[str, Any], quant: str) -> None:
    """All keys in the order of upstream's converter (conversion/base.py, `MmprojModel`)."""
    vision, audio, unified = config["vision_config"], config.get("audio_config"), _unified(config)
    writer.add_type("mmproj")
    described = gguf.Metadata.load(None, folder, None, total := writer.get_total_parameter_count()[0])
    described.name = described.name or folder.name
    described.size_label = described.size_label or gguf.size_label(total, *writer.get_total_parameter_count()[1:])
    described.set_gguf_meta_model(writer)
    writer.add_file_type(tensor_types.QUANTS[quant].file_type)
    width = int((config.get("text_config") or config)["hidden_size"])

    def add(modality: str, settings: Mapping[str, Any], embedding: str, feed_forward: int) -> None:
        sizes = {
            "embedding_length": settings[embedding],
            "feed_forward_length": feed_forward,
            "block_count": 0 if unified else settings["num_hidden_layers"],
            "attention.head_count": 0 if unified else settings["num_attention_heads"],
        }
        for key, value in sizes.items():
            writer.add_uint32(f"clip.{modality}.{key}", int(value))

    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_uint32("clip.vision.projection_dim", width)
    writer.add_uint32("clip.vision.image_size", 224)  # mtmd wants the key and takes the size from the image
    writer.add_uint32("clip.vision.patch_size", int(vision["patch_size"]))
    if unified:
        add("vision", vision, "mm_embed_dim", 0)
    else:
        add("vision", vision, "hidden_size", vision["intermediate_size"])
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [float(value) for value in config["image_processor"][key]])
    if isinstance(audio, dict):
        writer.add_bool("clip.has_audio_encoder", True)
        writer.add_uint32("clip.audio.projection_dim", width)
        if unified:
            add("audio", audio, "audio_embed_dim", 0)
        else:
            add("audio", audio, "hidden_size", 4 * audio["hidden_size"])
    writer.add_string("clip.vision.projector_type", "gemma4uv" if unified else "gemma4v")
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", float(vision.get("rms_norm_eps", 1e-6)))
    if isinstance(audio, dict):
        writer.add_string("clip.audio.projector_type", "gemma4ua" if unified else "gemma4a")
        writer.add_uint32("clip.audio.num_mel_bins", int(audio.get("input_feat_size", 128)))
        writer.add_float32("clip.audio.attention.layer_norm_epsilon", float(audio.get("rms_norm_eps", 1e-6)))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
