"""The vision and audio encoders of a target as an mmproj GGUF file, which llama.cpp's mtmd and Ollama load beside it.

Names, types and metadata as upstream's converter has them (conversion/gemma.py, `Gemma4VisionAudioModel` and
`Gemma4UnifiedVisionAudioModel`); the encoders' own names are those of transformers' gemma4 and gemma4_unified.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gemma_mtp.convert import names, tensor_types
from gemma_mtp.convert.checkpoint import Checkpoint
from gemma_mtp.convert.errors import MtpError, damaged, listed
from gemma_mtp.convert.files import writing
from gemma_mtp.convert.gguf_io.types import Type, padded
from gemma_mtp.convert.gguf_io.write import TensorInfo, header
from gemma_mtp.convert.metadata import add_card, collector, packed
from gemma_mtp.convert.mmproj_keys import EncoderConfig, has_audio, is_unified, parameters
from gemma_mtp.convert.plan import SOURCE_TYPES
from gemma_mtp.convert.progress import More
from gemma_mtp.convert.quantize import Bytes, Floats, quantize
from gguf import GGUFValueType, GGUFWriter

# SLEEF's polynomials of e^x and log(1 + x), and log 2 as the sum of two float32 (sleefsimdsp.c, `xexpf`, `xlog1pf`).
EXP = (0.000198527617612853646278381, 0.00139304355252534151077271, 0.00833336077630519866943359,
       0.0416664853692054748535156, 0.166666671633720397949219, 0.5)  # fmt: skip
LOG1P = (0.3027294874, 0.3996108174, 0.6666694880)
LN2 = 0.69314718246459960938 - 1.904654323148236017e-09
# The GGUF type of a value.
KINDS = {
    bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}  # fmt: skip


@dataclass(frozen=True)
class Placed(TensorInfo):
    """One tensor to write, its Hugging Face name, and what becomes of its values."""

    source: str
    change: Callable[[Floats], Floats]


@dataclass(frozen=True)
class ProjectorPlan:
    """A projector's file: its format, what `clip.*` says of the encoders, its tensors."""

    quant: str
    parameters: Mapping[str, Any]
    tensors: tuple[Placed, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def plan_mmproj(checkpoint: Checkpoint, quant: str = "F16") -> ProjectorPlan:
    """Place the encoders of a target in one GGUF file.

    Args:
        checkpoint: of a target with vision, or vision and audio.
        quant: one of `tensor_types.PROJECTOR_QUANTS`.

    Raises:
        MtpError: the checkpoint has no encoder, a file is missing or damaged, or a tensor is unknown or missing.
    """
    file = checkpoint.folder / "config.json"
    with damaged(file):
        settings = checkpoint.settings
        if not isinstance(settings.get("vision_config"), dict):
            raise MtpError(f"{file} has no vision_config: this checkpoint has no projector to convert.")
        return ProjectorPlan(quant, parameters(checkpoint), _place_all(checkpoint, quant))


def write_mmproj(plan: ProjectorPlan, checkpoint: Checkpoint, path: Path, more: More = lambda n_bytes: None) -> None:
    """Write a projector, tensor after tensor.

    Args:
        plan: of this checkpoint.
        checkpoint: where the values come from.
        path: file to write; the caller keeps it out of sight until it is whole.
        more: called with the number of bytes after each tensor.

    Raises:
        MtpError: a tensor holds NaN or infinite values.
        WriteError: the disk is full or cannot be written.
    """
    with writing(path), path.open("xb") as file:
        file.write(header(list(packed(_entries(plan, checkpoint)).values()), plan.tensors))
        for tensor in plan.tensors:
            data = _blocks(checkpoint.folder, tensor, checkpoint.values(tensor.source))
            file.write(data.data)
            file.write(b"\0" * (padded(len(data)) - len(data)))
            more(len(data))
        file.flush()
        os.fsync(file.fileno())


def _place_all(checkpoint: Checkpoint, quant: str) -> tuple[Placed, ...]:
    """Place every tensor of the encoders, in the order of the checkpoint."""
    if quant not in tensor_types.PROJECTOR_QUANTS:
        raise MtpError(
            f"unknown format {quant!r} of a projector; choose one of {', '.join(tensor_types.PROJECTOR_QUANTS)}."
        )
    config, placed = checkpoint.settings, []
    vision = EncoderConfig(checkpoint.folder / "config.json", "vision_config", config["vision_config"])
    for source, piece in checkpoint.index.items():
        if not names.ENCODER_NAME.match(bare := names.bare(source)) or names.dropped(source) == names.COMPUTED:
            continue
        name = names.place_encoder(bare, unified=is_unified(config))
        if name is None:
            raise MtpError(f"{checkpoint.folder}: unknown tensor {source!r}; its projector is not of a known kind.")
        if piece.dtype not in SOURCE_TYPES:
            raise MtpError(f"{piece.file}: {source!r} is {piece.dtype}; pass an unquantized one.")
        change = _change(source, vision)
        try:
            shape = change(np.broadcast_to(np.float32(0), piece.shape)).shape  # of an array that takes no memory
        except ValueError:
            raise MtpError(
                f"{piece.file}: {source!r} has the shape {list(piece.shape)}, which does not fit the patch sizes that "
                f"vision_config has in {checkpoint.folder / 'config.json'}."
            ) from None
        if not _fits(name, shape, vision):
            raise MtpError(
                f"{piece.file}: {source!r} has the shape {list(piece.shape)}, which does not fit the hidden_size that "
                f"vision_config has in {checkpoint.folder / 'config.json'}."
            )
        placed.append(Placed(name, shape, _type_of(source, name, shape, Type[quant]), source, change))
    _complete(checkpoint.folder, {tensor.name for tensor in placed}, config)
    return tuple(placed)


def _fits(name: str, shape: tuple[int, ...], vision: EncoderConfig) -> bool:
    """Whether a tensor of a layer of the vision encoder is as wide as the encoder, where it is to be."""
    layer = re.fullmatch(r"v\.blk\.\d+\.(\w+)\.weight", name)
    if layer is None or layer[1] in ("attn_q_norm", "attn_k_norm", "out_scale"):  # of a head; of one value
        return True
    return shape[0 if layer[1] in ("attn_out", "ffn_down") else -1] == vision.size("hidden_size")


def _change(source: str, vision: EncoderConfig) -> Callable[[Floats], Floats]:
    """What mtmd wants other than transformers has it."""
    if source.endswith("per_dim_scale"):
        return softplus
    if source.endswith("depthwise_conv1d.weight"):
        return lambda values: values.reshape(values.shape[0], values.shape[2])
    if source.endswith("pos_embedding"):
        return lambda values: values.transpose(1, 0, 2)
    if source.endswith("patch_embedder.input_proj.weight"):  # pixels row by row, RGB each, to one plane for each colour
        side = vision.size("patch_size")
        return lambda values: values.reshape(values.shape[0], side, side, 3).transpose(0, 3, 1, 2)
    if ".patch_dense.weight" in source or ".patch_ln1." in source:  # the same, flat
        if vision.values.get("model_patch_size"):
            side = vision.size("model_patch_size")
        else:
            side = vision.size("patch_size") * vision.size("pooling_kernel_size")
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


def _type_of(source: str, name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """The type of a tensor: vectors, norms, bounds, convolutions of the audio encoder and positions stay float32."""
    audio = "audio_tower" in source or "embed_audio" in source
    if len(shape) <= 1 or not name.endswith(".weight") or name.endswith("_norm.weight") or "position_emb" in name:
        return Type.F32
    if audio and (".conv" in source or "_conv" in source):
        return Type.F32
    if name == "v.patch_embd.weight":
        return Type.F16 if wanted is Type.F16 else Type.F32
    return tensor_types.fitting_type(wanted, tensor_types.Row(name, shape, wanted))


def _complete(folder: Path, placed: set[str], config: Mapping[str, Any]) -> None:
    """Every part of the tables that the configuration calls for is there; scales and clipping bounds are optional."""
    audio = has_audio(config)
    wanted = set((names.UNIFIED if is_unified(config) else names.ENCODERS).values()) - {"v.std_bias", "v.std_scale"}
    if not is_unified(config):
        towers = [("vision", names.VISION_LAYER), *([("audio", names.AUDIO_LAYER)] if audio else [])]
        for tower, table in towers:
            parts, count = set(table.values()) - {"out_scale"}, int(config[f"{tower}_config"]["num_hidden_layers"])
            wanted |= {f"{tower[0]}.blk.{n}.{part}.weight" for n in range(count) for part in parts}
    if not audio:
        wanted = {name for name in wanted if not name.startswith(("a.", "mm.a."))}
    missing = sorted(wanted - placed)
    if missing:
        raise MtpError(f"{folder}: the projector lacks {listed(missing)}; download the weights again.")


def _blocks(folder: Path, tensor: Placed, values: Floats) -> Bytes:
    changed = np.ascontiguousarray(tensor.change(values))
    if tensor.source.endswith(("_min", "_max")):  # a bound that is infinite clips nothing
        return changed.reshape(-1).view(np.uint8)
    try:
        return quantize(changed, tensor.type)
    except MtpError as problem:
        raise MtpError(f"{folder}: tensor {tensor.source!r}: {problem}.") from None


def _entries(plan: ProjectorPlan, checkpoint: Checkpoint) -> GGUFWriter:
    """All keys in the order of upstream's converter (conversion/base.py, `MmprojModel`)."""
    writer = collector("clip", plan.tensors)
    writer.add_type("mmproj")
    add_card(writer, checkpoint)
    writer.add_file_type(tensor_types.QUANTS[plan.quant].file_type)
    for key, value in plan.parameters.items():
        writer.add_key_value(f"clip.{key}", value, KINDS[type(value)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer
