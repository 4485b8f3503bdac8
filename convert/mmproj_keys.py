"""What a projector's file says of its encoders under `clip.*`, and the settings of a folder that it comes from.

In the order of upstream's converter (conversion/base.py, `MmprojModel`; conversion/gemma.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_mtp.convert.checkpoint import Checkpoint
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.ordered import quoted
from gemma_mtp.convert.gguf_io.types import F32_MAX
from gemma_mtp.convert.json_file import read_json

IMAGES = ("image_mean", "image_std")
# What no encoder's size reaches.
MOST_SIZE = 1 << 16


def _finite(value: Any) -> bool:
    """Whether it is a number that a float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= F32_MAX


class EncoderConfig(NamedTuple):
    """One object of config.json, its values read by kind.

    Raises:
        MtpError: naming file, object and key, where the key is not there or its value is of another kind.
    """

    file: Path
    name: str
    values: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value: Any = default if self.values.get(key) is None else self.values[key]
        if not _finite(value) or value != int(value) or not 1 <= value <= MOST_SIZE:
            raise self._wrong(key, f"a whole number from 1 to {MOST_SIZE}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """Any number."""
        value = default if self.values.get(key) is None else self.values[key]
        if not _finite(value):
            raise self._wrong(key, "a number")
        return float(value)

    def _wrong(self, key: str, wanted: str) -> MtpError:
        if key not in self.values:
            return MtpError(f"{self.file}: {self.name} has no {key}; download it again.")
        return MtpError(f"{self.file}: {self.name}.{key} is {quoted(self.values[key])}, wanted {wanted}.")


def _image_settings(folder: Path) -> dict[str, list[float]]:
    """Mean and standard deviation of the pixels, [3] each, of whichever file of the image processor has them."""
    found: dict[str, tuple[Path, Any]] = {}
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        settings = read_json(path) if path.exists() else {}
        inner = settings.get("image_processor")
        if inner is not None and not isinstance(inner, dict):
            raise MtpError(f"{path}: image_processor is {quoted(inner)}, wanted an object; download it again.")
        for each in (settings, inner or {}):
            found |= {key: (path, each[key]) for key in IMAGES if each.get(key) is not None}
    for key in IMAGES:
        if key not in found:
            raise MtpError(
                f"{folder}: neither preprocessor_config.json nor the image_processor of processor_config.json has "
                f"{key}; download them."
            )
        path, values = found[key]
        if not isinstance(values, list) or len(values) != 3 or not all(map(_finite, values)):
            raise MtpError(f"{path}: {key} is {quoted(values)}, wanted 3 numbers; download it again.")
        if key == "image_std" and 0 in values:
            raise MtpError(f"{path}: {key} is {quoted(values)}, and pixels are divided by it; download it again.")
    return {key: [float(value) for value in found[key][1]] for key in IMAGES}


def has_audio(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("audio_config"), dict)


def is_unified(config: Mapping[str, Any]) -> bool:
    return "mm_embed_dim" in config["vision_config"]


def parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `clip.*` says of the encoders, in upstream's order; bool, int, float, text or a list of floats each."""
    config, file = checkpoint.settings, checkpoint.folder / "config.json"
    unified, width = is_unified(config), checkpoint.config.n_embd
    vision = EncoderConfig(file, "vision_config", config["vision_config"])
    found: dict[str, Any] = {"has_vision_encoder": True, "vision.projection_dim": width}
    found["vision.image_size"] = 224  # mtmd wants the key and takes the size from the image
    found["vision.patch_size"] = vision.size("patch_size")
    if unified:
        found |= _sizes("vision", vision.size("mm_embed_dim"))
    else:
        found |= _sizes("vision", vision.size("hidden_size"), vision.size("intermediate_size"), vision)
    found |= {f"vision.{key}": values for key, values in _image_settings(checkpoint.folder).items()}
    audio = EncoderConfig(file, "audio_config", config["audio_config"]) if has_audio(config) else None
    if audio:
        found |= {"has_audio_encoder": True, "audio.projection_dim": width}
        if unified:
            found |= _sizes("audio", audio.size("audio_embed_dim"))
        else:
            found |= _sizes("audio", audio.size("hidden_size"), 4 * audio.size("hidden_size"), audio)
    found["vision.projector_type"] = "gemma4uv" if unified else "gemma4v"
    found["vision.attention.layer_norm_epsilon"] = vision.number("rms_norm_eps", 1e-6)
    if audio:
        found["audio.projector_type"] = "gemma4ua" if unified else "gemma4a"
        found["audio.num_mel_bins"] = audio.size("input_feat_size", 128)
        found["audio.attention.layer_norm_epsilon"] = audio.number("rms_norm_eps", 1e-6)
    return found


def _sizes(modality: str, width: int, feed_forward: int = 0, encoder: EncoderConfig | None = None) -> dict[str, int]:
    """The sizes of one encoder; a unified model has none, and projects straight into the text model."""
    return {
        f"{modality}.embedding_length": width,
        f"{modality}.feed_forward_length": feed_forward,
        f"{modality}.block_count": encoder.size("num_hidden_layers") if encoder else 0,
        f"{modality}.attention.head_count": encoder.size("num_attention_heads") if encoder else 0,
    }
