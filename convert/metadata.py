"""Everything in a GGUF file before its weights: metadata in the order of upstream's converter, and the tensor table."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gemma_mtp.convert import names, tensor_types
from gemma_mtp.convert.checkpoint import Checkpoint
from gemma_mtp.convert.config import DrafterConfig, TargetConfig
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.imatrix import Imatrix
from gemma_mtp.convert.link import KEY_CENTROIDS, KEY_HASHES, KEY_N_CENTROIDS, KEY_ORDERING, KEY_TOP_K
from gemma_mtp.convert.plan import Part, Plan
from gemma_mtp.convert.vocab import Vocabulary
from gguf import GGUFValueType, GGUFWriter

ALIGNMENT = 32
# Arrays shorter than this are packed by the gguf package, value by value.
LONG = 64
_NUMBERS = {GGUFValueType.FLOAT32: "<f4", GGUFValueType.INT32: "<i4"}


class _Writer(GGUFWriter):  # type: ignore[misc]
    """The gguf package's writer, into memory, and quick with the hundred thousands of strings of a vocabulary."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype is not GGUFValueType.ARRAY or len(val) < LONG or isinstance(val, bytes):
            packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return packed
        kind = GGUFValueType.get_type(val[0])
        if kind is GGUFValueType.STRING:
            raw = [each if isinstance(each, bytes) else each.encode() for each in val]
            body = b"".join([part for each in raw for part in (len(each).to_bytes(8, "little"), each)])
        elif kind in _NUMBERS:
            body = np.asarray(val, _NUMBERS[kind]).tobytes()
        else:
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        start = struct.pack("<I", vtype) if add_vtype else b""
        return start + struct.pack("<IQ", kind, len(val)) + body


def padded(size: int) -> int:
    """A size in bytes, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def header(
    plan: Plan, part: Part, checkpoint: Checkpoint, link: Mapping[str, Any], imatrix: Imatrix | None = None
) -> bytes:
    """Header of a file, padded, so that the first tensor follows.

    Args:
        plan: of the whole model.
        part: which of its tensors this file holds; only the first part carries the model's metadata.
        checkpoint: where the vocabulary and the ordered head come from.
        link: metadata of the pair, `mtp.*`: int or str values.
        imatrix: named in the metadata of a file that was quantized with it.

    Raises:
        MtpError: the vocabulary does not fit the model, or the ordered head is damaged.
    """
    writer = _Writer(None, plan.arch)
    if part.index == 0:
        for tensor in plan.tensors:  # the package counts the parameters
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
        _metadata(writer, plan, checkpoint, link, imatrix)
    else:
        writer.kv_data[0].clear()
    if part.count > 1:
        writer.add_uint16("split.no", part.index)
        writer.add_uint16("split.count", part.count)
        writer.add_int32("split.tensors.count", len(plan.tensors))
    writer.add_array(KEY_HASHES, ["0" * 64] * len(part.tensors))  # filled in by verify.seal
    values = writer.kv_data[0]
    raw = bytearray(struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(part.tensors), len(values)))
    for key, value in values.items():
        raw += _string(key) + writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
    offset = 0
    for tensor in part.tensors:
        shape = tensor.shape[::-1]
        raw += _string(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, offset)
        offset += padded(tensor.n_bytes)
    return bytes(raw + b"\0" * (padded(len(raw)) - len(raw)))


def _string(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _metadata(
    writer: GGUFWriter, plan: Plan, checkpoint: Checkpoint, link: Mapping[str, Any], imatrix: Imatrix | None
) -> None:
    """All keys, in the order of upstream's converter (conversion/base.py, `prepare_metadata`), ours at the end."""
    writer.add_type(gguf.GGUFType.MODEL)
    described = gguf.Metadata.load(None, checkpoint.folder, None, total := writer.get_total_parameter_count()[0])
    described.name = described.name or checkpoint.folder.name
    described.size_label = described.size_label or gguf.size_label(total, *writer.get_total_parameter_count()[1:])
    described.set_gguf_meta_model(writer)
    for key, (kind, value) in plan.parameters.items():
        if kind is GGUFValueType.ARRAY:
            writer.add_array(f"{plan.arch}.{key}", value)
        else:
            writer.add_key_value(f"{plan.arch}.{key}", value, kind)
    writer.add_file_type(tensor_types.QUANTS[plan.quant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary = Vocabulary(checkpoint.folder)
    if len(vocabulary.tokens) != checkpoint.config.vocab_size:
        raise MtpError(
            f"{checkpoint.folder}: tokenizer.json has {len(vocabulary.tokens)} tokens, config.json says "
            f"{checkpoint.config.vocab_size}; the two are of different models."
        )
    vocabulary.write(writer, checkpoint.generation, isinstance(checkpoint.config, TargetConfig))
    for key, value in {**(imatrix.metadata() if imatrix else {}), **link}.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    if isinstance(checkpoint.config, DrafterConfig) and checkpoint.config.ordered:
        for key, value in ordered_head(checkpoint, checkpoint.config).items():
            writer.add_uint32(key, value) if isinstance(value, int) else writer.add_array(key, value.tolist())


def ordered_head(checkpoint: Checkpoint, config: DrafterConfig) -> dict[str, Any]:
    """The ordered head as metadata: centroids [n_centroids * n_embd] row by row, and token ids in cluster order.

    Raises:
        MtpError: a centroid holds NaN or infinite values, or the ordering does not name every token once.
    """
    centroids, order = checkpoint.values(names.CENTROIDS).reshape(-1), checkpoint.index[names.ORDERING]
    ordering = checkpoint.read(names.ORDERING, 0, order.size).view("<i8" if order.dtype == "I64" else "<i4")
    if not bool(np.isfinite(centroids).all()):
        raise MtpError(f"{checkpoint.folder}: {names.CENTROIDS!r} holds NaN or infinite values; download it again.")
    if not np.array_equal(np.sort(ordering), np.arange(config.vocab_size)):
        raise MtpError(f"{checkpoint.folder}: {names.ORDERING!r} does not name every token once; download it again.")
    return {
        KEY_N_CENTROIDS: config.n_centroids,
        KEY_TOP_K: config.top_k,
        KEY_CENTROIDS: centroids,
        KEY_ORDERING: ordering.astype(np.int32),
    }
