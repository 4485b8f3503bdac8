"""A plan and an open checkpoint to one GGUF file, streamed: a few rows in memory at a time, no intermediate file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gemma_mtp.convert import names, recipe
from gemma_mtp.convert.checkpoint import Checkpoint, DrafterConfig
from gemma_mtp.convert.link import KEY_CENTROIDS, KEY_HASHES, KEY_N_CENTROIDS, KEY_ORDERING, KEY_TOP_K, MtpError
from gemma_mtp.convert.plan import Plan, Planned, rope_freqs
from gemma_mtp.convert.quantize import quantize
from gemma_mtp.convert.verify import seal
from gemma_mtp.convert.vocab import Vocabulary
from gguf import GGUFValueType, GGUFWriter

ALIGNMENT = 32
# Values of one piece of work: 16 MiB as float32.
PIECE = 1 << 22
Progress = Callable[[int], None]


def write(plan: Plan, checkpoint: Checkpoint, path: Path, link: Mapping[str, Any], progress: Progress) -> None:
    """Write one GGUF file; the same input gives the same bytes.

    Args:
        plan: of this checkpoint.
        checkpoint: where the rows come from.
        path: file to write; the caller keeps it out of sight until it is whole.
        link: metadata of the pair, `mtp.*`: int or str values.
        progress: called with the number of bytes after each piece.

    Raises:
        MtpError: the vocabulary does not fit the model, or a tensor holds NaN or infinite values.
        OSError: the disk is full or cannot be written.
    """
    writer = GGUFWriter(path, plan.arch)
    try:
        for tensor in plan.tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
        _metadata(writer, plan, checkpoint, link)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        _pad(file)
        for blocks, last in _pieces(plan, checkpoint):
            file.write(blocks.data)
            if last:
                _pad(file)
            progress(blocks.nbytes)
    seal(path)


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _metadata(writer: GGUFWriter, plan: Plan, checkpoint: Checkpoint, link: Mapping[str, Any]) -> None:
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
    writer.add_file_type(recipe.QUANTS[plan.quant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary = Vocabulary(checkpoint.folder)
    if len(vocabulary.tokens) != checkpoint.config.vocab_size:
        raise MtpError(
            f"{checkpoint.folder}: tokenizer.json has {len(vocabulary.tokens)} tokens, config.json says "
            f"{checkpoint.config.vocab_size}; the two are of different models."
        )
    vocabulary.write(writer, checkpoint.generation)
    for key, value in link.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.add_array(KEY_HASHES, ["0" * 64] * len(plan.tensors))  # filled in by verify.seal
    if isinstance(checkpoint.config, DrafterConfig) and checkpoint.config.ordered:
        for key, value in ordered_head(checkpoint, checkpoint.config).items():
            writer.add_uint32(key, value) if isinstance(value, int) else writer.add_array(key, value.tolist())


def ordered_head(checkpoint: Checkpoint, config: DrafterConfig) -> dict[str, Any]:
    """The ordered head as metadata: centroids [n_centroids * n_embd] row by row, and token ids in cluster order.

    Raises:
        MtpError: a centroid holds NaN or infinite values, or the ordering does not name every token once.
    """
    centroids = checkpoint.rows(names.CENTROIDS, 0, config.n_centroids).to(torch.float32)
    ordering = checkpoint.rows(names.ORDERING, 0, config.vocab_size)
    if not bool(torch.isfinite(centroids).all()):
        raise MtpError(f"{checkpoint.folder}: {names.CENTROIDS!r} holds NaN or infinite values; download it again.")
    if not torch.equal(ordering.to(torch.int64).sort().values, torch.arange(config.vocab_size)):
        raise MtpError(f"{checkpoint.folder}: {names.ORDERING!r} does not name every token once; download it again.")
    return {
        KEY_N_CENTROIDS: config.n_centroids,
        KEY_TOP_K: config.top_k,
        KEY_CENTROIDS: centroids.flatten().numpy(),
        KEY_ORDERING: ordering.to(torch.int32).numpy(),
    }


def _pieces(plan: Plan, checkpoint: Checkpoint) -> Iterator[tuple[npt.NDArray[np.uint8], bool]]:
    """Quantized pieces in the order of the file, each with whether its tensor ends there.

    Reading and quantizing run in as many threads as there are cores; the next few pieces are under way while one is
    written, which bounds the memory.
    """
    workers = os.cpu_count() or 1
    waiting: deque[tuple[Future[npt.NDArray[np.uint8]], bool]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for tensor in plan.tensors:
            row = tensor.shape[-1] if len(tensor.shape) > 1 else 1
            step = max(1, PIECE // row)
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                waiting.append((pool.submit(_piece, tensor, checkpoint, start, stop), stop == tensor.shape[0]))
                if len(waiting) > 2 * workers:
                    done, last = waiting.popleft()
                    yield done.result(), last
        while waiting:
            done, last = waiting.popleft()
            yield done.result(), last
    finally:
        pool.shutdown(cancel_futures=True)


def _piece(tensor: Planned, checkpoint: Checkpoint, start: int, stop: int) -> npt.NDArray[np.uint8]:
    if tensor.source is None:
        rows = torch.tensor(rope_freqs(checkpoint.config))[start:stop]
    else:
        rows = checkpoint.rows(tensor.source, start, stop)
    try:
        return quantize(rows, tensor.type)
    except MtpError as problem:
        raise MtpError(f"{checkpoint.folder}: tensor {tensor.source!r}: {problem}.") from None
