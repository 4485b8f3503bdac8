"""The values of a GGUF file's keys, in the order of upstream's converter, ours at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
from gemma_mtp.convert import names, tensor_types
from gemma_mtp.convert.checkpoint import Checkpoint
from gemma_mtp.convert.config import DrafterConfig, TargetConfig
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io import ordered, split, write
from gemma_mtp.convert.gguf_io.write import Array, entry
from gemma_mtp.convert.imatrix import Imatrix
from gemma_mtp.convert.link import KEY_HASHES, KEY_SPLIT, OF_EACH_PART
from gemma_mtp.convert.model_card import described
from gemma_mtp.convert.naming import name_of
from gemma_mtp.convert.plan import Plan, Planned
from gemma_mtp.convert.vocab import add_tokenizer
from gguf import GGUFWriter

FILE_TYPE = gguf.Keys.General.FILE_TYPE


class Head(NamedTuple):
    """All of a file before its weights, and where in it the hash of the first tensor has its place."""

    raw: bytes
    hashes: int


class Headers:
    """Makes the headers of a checkpoint's files; what all of them say is read and packed once.

    Args:
        checkpoint: where the tokenizer, the model card and the ordered head come from.
        plan: of one of the files; the others differ in format alone.

    Raises:
        MtpError: the vocabulary does not fit the model, a small file is damaged, or the ordered head.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._model = packed(_model_entries(checkpoint, plan))
        self._ordered: dict[str, bytes] = {}
        ordered_too = isinstance(checkpoint.config, DrafterConfig) and checkpoint.config.ordered
        if ordered_too and not checkpoint.hollow:  # it comes from the weights
            self._ordered = {key: entry(key, value) for key, value in ordered_head(checkpoint).items()}

    def head(
        self, plan: Plan, part: split.Part[Planned], link: Mapping[str, Any], imatrix: Imatrix | None = None
    ) -> Head:
        """Header of a file, padded, so that the first tensor follows.

        Args:
            plan: of the whole model.
            part: which of its tensors this file holds; only the first part carries the model's metadata, every one
                says whose it is.
            link: metadata of the pair, `mtp.*`: int or str values.
            imatrix: named in the metadata of a file that was quantized with it.
        """
        entries: dict[str, bytes] = {}
        if part.index == 0:
            file_type = entry(FILE_TYPE, tensor_types.QUANTS[plan.quant].file_type)
            added = {**(imatrix.metadata() if imatrix else {}), **link}
            entries = self._model | {FILE_TYPE: file_type} | {key: entry(key, value) for key, value in added.items()}
            entries |= self._ordered
        else:
            entries = {key: entry(key, link[key]) for key in OF_EACH_PART if key in link}
        if part.count > 1:
            entries[KEY_SPLIT] = entry(KEY_SPLIT, _conversion(plan, link, imatrix))
            entries |= packed(_split(plan, part))
        # Filled in when the weights are there. No hash is told before its tensor is whole.
        entries[KEY_HASHES] = entry(KEY_HASHES, ["0" * 64] * len(part.tensors))
        end = write.METADATA + sum(map(len, entries.values()))
        return Head(write.header(list(entries.values()), part.tensors), end - len(part.tensors) * write.HASH)


def packed(writer: GGUFWriter) -> dict[str, bytes]:
    """The entries that a writer of the gguf package has collected, by key."""
    return {key: entry(key, each.value, each.type) for key, each in writer.kv_data[0].items()}


def collector(arch: str, plan: Any) -> GGUFWriter:
    """A writer of the gguf package, which is to collect metadata alone; it counts the parameters of some tensors."""
    writer = GGUFWriter(None, arch)
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    return writer


def add_card(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Name, licence, base models and the like, from the model card and the name of the repository or folder."""
    total, *counts = writer.get_total_parameter_count()
    card = described(checkpoint.folder, name_of(checkpoint.folder), checkpoint.settings, checkpoint.generation, total)
    card.name = checkpoint.called or card.name
    card.size_label = card.size_label or gguf.size_label(total, *counts)
    card.set_gguf_meta_model(writer)


def _model_entries(checkpoint: Checkpoint, plan: Plan) -> GGUFWriter:
    """What all files of a model say (conversion/base.py, `prepare_metadata`)."""
    writer = collector(plan.arch, plan.tensors)
    writer.add_type(gguf.GGUFType.MODEL)
    add_card(writer, checkpoint)
    for key, (kind, value) in plan.parameters.items():
        writer.add_key_value(f"{plan.arch}.{key}", value, kind)
    writer.add_file_type(tensor_types.QUANTS[plan.quant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    target = isinstance(checkpoint.config, TargetConfig)
    add_tokenizer(writer, checkpoint.folder, checkpoint.tokenizer, checkpoint.generation, checkpoint.settings, target)
    return writer


def _split(plan: Plan, part: split.Part[Planned]) -> GGUFWriter:
    """The place of a file among several; the parts after the first say nothing else of the model."""
    writer = GGUFWriter(None, plan.arch)
    writer.kv_data[0].clear()
    writer.add_uint16(split.KEY_PLACE, part.index)
    writer.add_uint16(split.KEY_COUNT, part.count)
    writer.add_int32(split.KEY_TENSORS, len(plan.tensors))
    return writer


def _conversion(plan: Plan, link: Mapping[str, Any], imatrix: Imatrix | None) -> str:
    """What tells a split model from others, of the same checkpoint in another format too: SHA-256 in hex digits."""
    tensors = [(tensor.name, tensor.shape, tensor.type.name) for tensor in plan.tensors]
    whose = [link.get(key) for key in OF_EACH_PART]
    return hashlib.sha256(json.dumps([whose, tensors, imatrix.metadata() if imatrix else {}]).encode()).hexdigest()


def ordered_head(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ordered head as metadata: centroids [n_centroids * n_embd] row by row, and token ids in cluster order.

    Raises:
        MtpError: a centroid holds NaN or infinite values, or the ordering does not name every token once.
    """
    config = checkpoint.config
    assert isinstance(config, DrafterConfig)
    centroids, order = checkpoint.values(names.CENTROIDS).reshape(-1), checkpoint.index[names.ORDERING]
    ordering = checkpoint.read(names.ORDERING, 0, order.size).view("<i8" if order.dtype == "I64" else "<i4")
    sizes = config.n_ordered, config.n_centroids, config.n_embd
    for key, _, _ in ordered.broken_tables(centroids, ordering, *sizes, wide=True):
        what = {
            ordered.KEY_CENTROIDS: f"{names.CENTROIDS!r} holds NaN or infinite values",
            ordered.KEY_ORDERING: f"{names.ORDERING!r} does not name every token once",
        }
        raise MtpError(f"{checkpoint.folder}: {what[key]}; download it again.")
    return {
        ordered.KEY_N_CENTROIDS: config.n_centroids,
        ordered.KEY_TOP_K: config.top_k,
        ordered.KEY_CENTROIDS: Array.of(centroids),
        ordered.KEY_ORDERING: Array.of(ordering.astype(np.int32)),
    }
