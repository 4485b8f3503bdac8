"""Targets with encoders of pictures and sounds, and what llama.cpp's multimodal library makes of them."""

from __future__ import annotations

import base64
import ctypes
import io
import json
import shutil
import struct
import wave as wavemodule
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers
from llama_cpp import mtmd_cpp
from numpy.typing import NDArray
from tiny import PAIR, TEXT

VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 4, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64,
          "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}}  # fmt: skip
# Heads of 32: torch takes the softplus of shorter vectors with scalars, rounded otherwise, as no real model has them.
AUDIO = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 48,
         "subsampling_conv_channels": (128, 4)}  # fmt: skip
DENSE = {key: value for key, value in TEXT.items() if "per_layer" not in key and key not in ("use_double_wide_mlp",)}
SIDE = 96
SAMPLES = 16000


def make(kind: str, folder: Path) -> Path:
    """A tiny random target: with vision and audio (E2B, E4B), with vision alone (26B, 31B), or unified (12B)."""
    torch.manual_seed(0)
    model: Any
    if kind == "12B":
        vision: dict[str, Any] = {"mm_embed_dim": 64, "patch_size": 4, "pooling_kernel_size": 3, "mm_posemb_size": 32,
                                  "output_proj_dims": 64}  # fmt: skip
        # llama.cpp has the samples of a frame of sound built in.
        config = transformers.Gemma4UnifiedConfig(
            text_config=DENSE, vision_config=vision, audio_config={"audio_embed_dim": 640}
        )
        model = transformers.Gemma4UnifiedForConditionalGeneration(config)
    else:
        audio, clipped = (AUDIO, True) if kind == "E2B" else (None, False)
        vision = {**VISION, "use_clipped_linears": clipped, "standardize": clipped}
        config = transformers.Gemma4Config(text_config=TEXT, vision_config=vision, audio_config=audio)
        model = transformers.Gemma4ForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(("_min", "_max", "std_scale")):
            buffer.data.fill_(-1.5 if name.endswith("_min") else 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    for part in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(PAIR / "gemma-4-demo" / part, folder / part)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    return folder


@contextmanager
def multimodal(target: Path, projector: Path) -> Iterator[Any]:
    """A context of mtmd, on one thread; None if it loads no such file."""
    model = llama_cpp.llama_model_load_from_file(str(target).encode(), llama_cpp.llama_model_default_params())
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads, settings.print_timings, settings.warmup = False, 1, False, False
    context = mtmd_cpp.mtmd_init_from_file(str(projector).encode(), model, settings)
    yield context
    if context:
        mtmd_cpp.mtmd_free(context)
    llama_cpp.llama_model_free(model)


def picture() -> Any:
    """A picture, the same every time."""
    pixels = (ctypes.c_uint8 * (SIDE * SIDE * 3))(*(i % 251 for i in range(SIDE * SIDE * 3)))
    return mtmd_cpp.mtmd_bitmap_init(SIDE, SIDE, pixels)


def png(seed: int) -> str:
    """A picture in base64."""
    rows = b"".join(b"\0" + bytes((x * y * seed) % 251 for x in range(3 * SIDE)) for y in range(SIDE))
    return base64.b64encode(written(SIDE, 8, 2, rows)).decode()


def written(side: int, depth: int, color: int, rows: bytes) -> bytes:
    """A square PNG file of rows of samples of some bits, gray (color 0) or three to a pixel (2)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wav(seed: int = 1) -> str:
    """A second of sound in base64."""
    wave = np.sin(np.arange(SAMPLES) ** (1 + seed / 10)) * 20000
    file = io.BytesIO()
    with wavemodule.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(SAMPLES)
        made.writeframes(wave.astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def sound() -> Any:
    """A second of sound, the same every time."""
    wave = np.sin(np.arange(SAMPLES, dtype=np.float32) ** 1.1).astype(np.float32)
    return mtmd_cpp.mtmd_bitmap_init_from_audio(SAMPLES, wave.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))


def encoded(context: Any, medium: Any, n_embd: int) -> NDArray[np.float32]:
    """The rows of a picture or sound for the target, [tokens, n_embd]."""
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    text = mtmd_cpp.mtmd_input_text()
    marker = mtmd_cpp.mtmd_default_marker()
    text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), True, True
    media = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(medium)
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), media, 1) == 0
    found = []
    for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
            shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), n_embd
            found.append(np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), shape).copy())
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(medium)
    return np.concatenate(found)
