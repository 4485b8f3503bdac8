"""Files as Ollama's library has them: text model and encoders in one, under other keys and names.

How Ollama's converter writes a checkpoint (convert/convert_gemma4.go of v0.33.0-rc2), made here of our own files.
`make check-ollama` compares with what a real one makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf_files import copy_tensors, finish

# Keys of ours that such a file has under no name, or that are written below.
LEFT_OUT = ("general.", "mtp.", "tokenizer.", "split.")
TOKENIZER = ("tokens", "merges", "bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id",
             "add_bos_token")  # fmt: skip
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
           '<|"|>')  # fmt: skip
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
# A projector's name of a tensor to the library's.
WHOLE = {"a.input_projection.weight": "a.pre_encode.out.weight", "a.pre_encode.out.weight": "mm.a.fc.weight",
         "a.pre_encode.out.bias": "mm.a.fc.bias"}  # fmt: skip
OF_LAYER = {"attn_pre_norm": "ln1", "attn_post_norm": "ln2", "ln2": "layer_pre_norm", "attn_k_rel": "linear_pos"}


def write_library_file(
    path: Path, target: Path, projector: Path | None = None, leaving: str = "", ends: Sequence[int] = (1, 106, 50)
) -> Path:
    """Write a target and its projector as one file; `leaving` names a key that is missing in it."""
    reader, writer = GGUFReader(target), GGUFWriter(path, "gemma4")
    text = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    add = _Adding(writer, leaving)
    for name, field in text.items():
        short = name.removeprefix("tokenizer.ggml.")
        if not name.startswith(LEFT_OUT) or (name != short and short in TOKENIZER):
            add.field(name, field)
    add.value("general.file_type", 1, GGUFValueType.UINT32)
    add.value("tokenizer.ggml.model", "llama", GGUFValueType.STRING)
    add.value("tokenizer.ggml.pre", "gemma4", GGUFValueType.STRING)
    tokens, types = (text[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    add.array("tokenizer.ggml.token_type", [_type(*each) for each in zip(tokens, types, strict=True)])
    add.array("tokenizer.ggml.eos_token_ids", ends)
    scores = [float(number) for number in range(len(tokens))]
    add.value("tokenizer.ggml.scores", scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    copy_tensors(reader, writer)
    if projector is not None:
        _add_encoders(GGUFReader(projector), writer, add)
    finish(writer)
    return path


def library_checkpoint(folder: Path, out: Path) -> Path:
    """A checkpoint with the keys that Ollama's converter wants, of what newer versions of transformers write."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    text = config["text_config"]
    layers: Mapping[str, Mapping[str, Any]] = text.get("per_layer_config") or {}
    for key, wanted in (("head_dim", "global_head_dim"), ("num_key_value_heads", "num_global_key_value_heads")):
        text[wanted] = next((layer[key] for layer in layers.values() if key in layer), text[key])
    (out / "config.json").write_text(json.dumps(config))
    return out


class _Adding:
    """Adds keys to a file, all but one."""

    def __init__(self, writer: GGUFWriter, leaving: str) -> None:
        self.writer, self.leaving = writer, leaving

    def value(self, key: str, value: Any, kind: GGUFValueType, part: GGUFValueType | None = None) -> None:
        if key != self.leaving:
            self.writer.add_key_value(key, value, kind, sub_type=part)

    def array(self, key: str, values: Sequence[int]) -> None:
        self.value(key, list(values), GGUFValueType.ARRAY, GGUFValueType.INT32)

    def field(self, key: str, field: Any) -> None:
        part = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        self.value(key, field.contents(), field.types[0], part)


def _type(token: str, kind: int) -> int:
    """A token's type there: bytes are normal tokens, and those that a parser of answers sees are control tokens."""
    if kind == BYTE:
        return NORMAL
    return CONTROL if token in VISIBLE and kind == USER_DEFINED else kind


def _add_encoders(reader: GGUFReader, writer: GGUFWriter, add: _Adding) -> None:
    for kind in ("vision", "audio"):
        if f"clip.{kind}.block_count" in reader.fields:
            for key in SIZES:
                value = reader.fields[f"clip.{kind}.{key}"].contents()
                add.value(f"gemma4.{kind}.{key}", value, GGUFValueType.UINT32)
            add.value(f"gemma4.{kind}.attention.layer_norm_epsilon", 1e-6, GGUFValueType.FLOAT32)
    if "clip.vision.patch_size" in reader.fields:
        patch = reader.fields["clip.vision.patch_size"].contents()
        add.value("gemma4.vision.patch_size", patch, GGUFValueType.UINT32)
        add.value("gemma4.vision.projector.scale_factor", 3, GGUFValueType.UINT32)
    for tensor in reader.tensors:
        writer.add_tensor(_name(tensor.name), tensor.data, raw_dtype=tensor.tensor_type)


def _name(name: str) -> str:
    start, layer, rest = name.partition("a.blk.")
    if layer and not start:
        number, inner, end = rest.split(".", 2)
        return f"a.blk.{number}.{OF_LAYER.get(inner, inner)}.{end}"
    return WHOLE.get(name, name)
