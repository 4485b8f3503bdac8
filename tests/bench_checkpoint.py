"""A random checkpoint of any size at E2B's proportions, with a drafter: what `make bench-convert` converts."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import NamedTuple

import shapes
import torch
from gemma_mtp.convert import sizes
from gemma_mtp.convert.checkpoint import Source
from tiny import PAIR


class Scale(NamedTuple):
    """Vocabulary, hidden size and layers; the rest follows E2B: MLP of 8 hidden sizes at most, PLE of 256 a layer."""

    vocab: int
    hidden: int
    layers: int


# Gigabytes of bf16 (about) to the shape that makes them; PLE is half of each, as in E2B.
SCALES = {0.5: Scale(32768, 512, 15), 1.5: Scale(67584, 768, 20), 5.0: Scale(131072, 1280, 25)}


def make(folder: Path, size: float) -> tuple[Path, Path]:
    """Folders of a target and its drafter, made only where they are not there yet."""
    scale = SCALES[size]
    vocab, hidden, layers = scale
    target = sizes.configs("E2B", layers)[0] | {"model_type": "gemma4"}
    target["text_config"] |= {
        "hidden_size": hidden, "intermediate_size": hidden * 5, "vocab_size": vocab,
        "vocab_size_per_layer_input": vocab, "num_kv_shared_layers": layers // 10 * 5,
    }  # fmt: skip
    drafter = shapes.drafter_json("E2B") | {"model_type": "gemma4_assistant", "backbone_hidden_size": hidden}
    drafter["text_config"] |= {"vocab_size": vocab, "vocab_size_per_layer_input": 0, "num_key_value_heads": 1}
    folders = folder / f"random-{size}GB", folder / f"random-{size}GB-assistant"
    for path, config, like in zip(folders, (target, drafter), ("demo", "demo-assistant"), strict=True):
        config["text_config"] |= {"model_type": "gemma4_text"}
        if not (path / "config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            _tokenizer(PAIR / f"gemma-4-{like}", path, vocab)
            _weights(path / "model.safetensors", shapes.index(shapes.parsed(config), shared=False))
            (path / "config.json").write_text(json.dumps(config))
    return folders


def _tokenizer(like: Path, folder: Path, size: int) -> None:
    """The bundled tokenizer, grown by tokens that each merge two others."""
    for part in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (like / part).exists():
            shutil.copy(like / part, folder / part)
    tokenizer = json.loads((like / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    used = set(vocab) | {added["content"] for added in tokenizer["added_tokens"]}
    plain = [token for token in vocab if not token.startswith("<")][-1500:]
    pairs = ((left, right) for left in plain for right in plain)
    while len(used) < size:
        left, right = next(pairs)
        if left + right not in used:
            vocab[left + right] = len(used)
            used.add(left + right)
            merges.append([left, right])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def _weights(path: Path, tensors: dict[str, Source]) -> None:
    """Normal values of E2B's spread, from one block that is read from another place each time."""
    block = (torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)) * 0.03).to(torch.bfloat16)
    with path.open("wb") as file:
        file.write(shapes.safetensors_header(tensors)[0])
        for place, source in enumerate(tensors.values()):
            left = prod(source.shape)
            if source.dtype == "I64":
                file.write(torch.randperm(left).numpy().tobytes())
                continue
            while left:
                start = place * 4099 % (len(block) // 2)
                piece = block[start : start + left].view(torch.uint8).numpy()
                file.write(piece.data)
                left -= piece.size // 2
