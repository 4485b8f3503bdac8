"""Gemma 4's own vocabulary, 262,144 tokens, as the pinned llama.cpp has it, in Hugging Face's form with no weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from gemma_mtp.convert.gguf_io.read import read
from gemma_mtp.convert.vocab import NORMALIZER, SPLIT
from gemma_mtp.patches import source
from tiny import NO_PER_LAYER, make_drafter, make_target

VOCABULARY = f"{source.VENDORED}/models/ggml-vocab-gemma-4.gguf"
WIDTH = 64  # of the hidden states
NORMAL, BYTE, CONTROL = 1, 6, 3  # llama.h, `llama_token_type`: all but the first two are added tokens


def vocabulary() -> dict[str, Any]:
    """The metadata of llama.cpp's file."""
    with tempfile.TemporaryDirectory() as work:
        return dict(read(source.unpack(Path(work), VOCABULARY) / VOCABULARY).metadata)


def tokenizer() -> str:
    """tokenizer.json with its tokens and merges."""
    metadata = vocabulary()
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].tolist()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": place, "content": token, "special": kind == CONTROL, **flags}
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind not in (NORMAL, BYTE)
    ]
    merges = [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]]
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "merges": merges,
             "vocab": {token: place for place, token in enumerate(tokens)}}  # fmt: skip
    parts = {"normalizer": NORMALIZER, "pre_tokenizer": SPLIT, "post_processor": None, "decoder": None}
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model, **parts}, ensure_ascii=False)


def make_folders(folder: Path) -> tuple[Path, Path]:
    """Folders of a target and its drafter, random and as small as can be; made only where they are not there yet."""
    folders = folder / "target", folder / "drafter"
    if not (folders[1] / "tokenizer.json").exists():
        text = tokenizer()
        size: dict[str, Any] = {"vocab_size": len(json.loads(text)["model"]["vocab"])}
        make_target(folders[0], **NO_PER_LAYER, **size, hidden_size=WIDTH)
        make_drafter(folders[1], ordered=False, backbone=WIDTH, **size, hidden_size=WIDTH // 2)
        for each in folders:
            (each / "tokenizer.json").write_text(text, encoding="utf-8")
    return folders
