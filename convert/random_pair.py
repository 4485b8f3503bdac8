"""Pairs with random weights at the published sizes: what a speed depends on, without the weights.

Every tensor has the type and size that convert would give it. The values are random blocks drawn from a pool that
libggml quantized, by every core at once, so that gigabytes are written at the speed of the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import link, names
from gemma_mtp.convert.checkpoint import Checkpoint, Source
from gemma_mtp.convert.config import DrafterConfig, TargetConfig, parse_config
from gemma_mtp.convert.errors import MtpError, MtpWarning
from gemma_mtp.convert.files import writing
from gemma_mtp.convert.gguf_io.split import cut
from gemma_mtp.convert.gguf_io.types import BLOCKS, Type, padded
from gemma_mtp.convert.integrity import put_hashes
from gemma_mtp.convert.metadata import Headers
from gemma_mtp.convert.plan import Config, Plan, Planned, plan, rope_freqs, shapes
from gemma_mtp.convert.progress import More, Progress, counting
from gemma_mtp.convert.quantize import Bytes, quantize
from gemma_mtp.convert.sizes import SIZES, configs
from gemma_mtp.convert.staging import clean_up, staging
from gemma_mtp.convert.tensor_types import Options, find_quant, parse_type
from gemma_mtp.convert.vocab import NORMALIZER, SPLIT

GENERATOR = 5  # counts changes of what is generated


def write_pair(
    shape: str,
    root: Path,
    quant: str = "Q4_0",
    drafter_quant: str = "Q4_0",
    drafter_head: str | None = None,
    layers: int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> tuple[Path, Path]:
    """Write a linked pair of a shape with random weights; files that are there already are taken as they are.

    What a killed process left in the folder is removed.

    Args:
        shape: a key of `sizes.SIZES`.
        root: folder in which each shape, number of layers and seed has a folder of its own for its GGUF files.
        quant: format of the target, a key of `tensor_types.QUANTS`.
        drafter_quant: format of the drafter.
        drafter_head: type of the drafter's token embedding, its output matrix; that of its format unless given.
        layers: of the target, a multiple of the shape's period; all unless given.
        seed: of the weights; the same seed gives the same bytes.
        progress: called with bytes written and bytes in all.

    Returns:
        Target and drafter.

    Raises:
        MtpError: the shape or the number of layers is unknown or unsupported, or the disk is full.
    """
    if shape not in SIZES:
        raise MtpError(f"unknown shape {shape!r}; choose one of {', '.join(SIZES)}.")
    quant, drafter_quant = find_quant(quant), find_quant(drafter_quant)
    target_config, drafter_config = configs(shape, layers)
    source = hashlib.sha256(json.dumps([target_config, seed, GENERATOR]).encode()).hexdigest()
    head = Options(token_embedding=parse_type(drafter_head)) if drafter_head else Options()
    drafter_name = f"{drafter_quant}-head-{head.token_embedding.name}" if head.token_embedding else drafter_quant
    size = shape if layers is None else f"{shape}-{layers}-layers"
    folder = root / f"{size}-seed-{seed}-v{GENERATOR}"
    files = (
        folder / f"gemma-4-{size}-random-{quant}.gguf",
        folder / f"gemma-4-{size}-random-assistant-{drafter_name}.gguf",
    )
    links = [{link.KEY_SEED: seed} | each for each in link.entries((files[0].name, files[1].name), source, source)]
    formats = (quant, Options()), (drafter_quant, head)
    clean_up(folder)
    wanted = [job for job in zip(files, (target_config, drafter_config), formats, links, strict=True)
              if not job[0].exists()]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gemma-mtp-") as made:
        checkpoints = [Synthetic(Path(made) / job[0].stem, job[1], seed) for job in wanted]
        plans = [plan(each.config, each.index, *job[2]) for each, job in zip(checkpoints, wanted, strict=True)]
        total = sum(each.n_bytes for each in plans)
        more = counting(progress, total)
        with staging(folder, [job[0].name for job in wanted], total, force=False) as hidden:
            for checkpoint, planned, (path, _, _, tied) in zip(checkpoints, plans, wanted, strict=True):
                write_random(planned, checkpoint, hidden / path.name, tied, more)
    return files


SPECIALS = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48,
    "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98,
    "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106,
}  # fmt: skip
FIRST_BYTE = 238
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@cache
def tokenizer(vocab_size: int) -> tuple[str, str]:
    """tokenizer.json and tokenizer_config.json: special tokens, bytes, characters, then words of one letter more each.

    A word is merged from the word without its last letter and that letter, so that the tokenizer is a true BPE.
    """
    held = dict(SPECIALS)
    tokens = [name for name, _ in sorted(held.items(), key=lambda item: item[1])]
    fill = [f"<unused{place}>" for place in range(FIRST_BYTE)]
    for name in tokens:
        fill[held[name]] = name
    fill += [f"<0x{byte:02X}>" for byte in range(256)]
    fill += ["\u2581", "\n", *(chr(code) for code in range(33, 127))]
    merges: list[list[str]] = []
    words = ["\u2581", *LETTERS]
    while len(fill) < vocab_size:
        longer = [(word, letter) for word in words for letter in LETTERS][: vocab_size - len(fill)]
        merges += [[word, letter] for word, letter in longer]
        words = [word + letter for word, letter in longer]
        fill += words
    added = [{"id": place, "content": name, "special": True} for name, place in held.items()]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": merges,
             "vocab": {token: place for place, token in enumerate(fill)}}  # fmt: skip
    config = {f"{part}_token": f"<{part}>" for part in ("pad", "eos", "bos", "unk", "mask")}
    config |= {"tokenizer_class": "GemmaTokenizer", "eot_token": "<turn|>"}
    whole = {"model": model, "added_tokens": added, "normalizer": NORMALIZER, "pre_tokenizer": SPLIT}
    return json.dumps(whole, ensure_ascii=False), json.dumps(config)


class Synthetic(Checkpoint):
    """A checkpoint of which only configuration and tokenizer exist as files; `read` serves the ordered head alone."""

    def __init__(self, folder: Path, config: Mapping[str, Any], seed: int) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        model, settings = tokenizer(config["text_config"]["vocab_size"])
        (folder / "tokenizer.json").write_text(model, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(settings)
        self.folder, self.generation, self.seed = folder, {"eos_token_id": [1, 106, 50]}, seed
        self.settings = dict(config)
        self.config = parse_config(self.settings, folder / "config.json")
        self.index = {
            name: Source(folder, shape, "BF16") for name, shape in _hugging_face(shapes(self.config), self.config)
        }
        if isinstance(self.config, DrafterConfig) and self.config.ordered:
            shape = self.config.n_centroids, self.config.n_embd
            self.index[names.CENTROIDS] = Source(folder, shape, "F32", size=4 * shape[0] * shape[1])
            size = 8 * self.config.vocab_size
            self.index[names.ORDERING] = Source(folder, (self.config.vocab_size,), "I64", size=size)

    def read(self, name: str, start: int, size: int) -> Bytes:
        rng = np.random.default_rng([self.seed, name == names.ORDERING])
        shape = self.index[name].shape
        values = rng.permutation(*shape) if name == names.ORDERING else rng.standard_normal(shape, np.float32) * SCALE
        wanted = np.int64 if name == names.ORDERING else np.float32
        return values.astype(wanted).reshape(-1).view(np.uint8)[start : start + size]


def _hugging_face(wanted: Mapping[str, tuple[int, ...]], config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face names for GGUF names, without keys and values of layers that read another layer's cache."""
    model = {gguf: name for name, gguf in names.MODEL.items()}
    layer = {gguf: name for name, gguf in names.LAYER.items()}
    for gguf, shape in wanted.items():
        if gguf in model:
            yield f"model.{model[gguf]}", shape
            continue
        _, place, inner = gguf.split(".", 2)
        reads = isinstance(config, TargetConfig) and int(place) >= config.n_layer - config.n_kv_shared
        if not (reads and inner in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")):
            yield f"model.layers.{place}.{layer[inner]}", shape


SCALE = 0.02  # standard deviation of weights
# Small norms of queries and keys keep attention scores near one. Small ones after attention and MLP keep a layer from
# overruling its input: rounding would otherwise grow from layer to layer and turn over many a close choice of a token.
# Only the last MLP speaks loudly, so that a token is not followed by the one that it follows.
NORMS = {
    "attn_q_norm": 0.25, "attn_k_norm": 0.25, "post_attention_norm": 0.15, "post_ffw_norm": 0.15, "post_norm": 0.15,
}  # fmt: skip
LAST_MLP_NORM = 2.0
POOL = 1 << 22  # values of a pool, which blocks are drawn from
UNIT = 32  # values drawn together where a type has no blocks
AT_ONCE = 1 << 24  # bytes written at once


def write_random(planned: Plan, checkpoint: Synthetic, path: Path, tied: Mapping[str, Any], more: More) -> None:
    """Write one GGUF file with the metadata that convert would write and random blocks, on all cores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MtpWarning)  # that there is no chat template
        headers = Headers(checkpoint, planned)
    head = headers.head(planned, cut(path.stem, planned.tensors)[0], tied)
    begins = list(accumulate((padded(tensor.n_bytes) for tensor in planned.tensors), initial=len(head.raw)))
    with writing(path), path.open("xb") as file:
        file.write(head.raw)
        file.truncate(begins[-1])
    kinds = dict.fromkeys(tensor.type for tensor in planned.tensors if len(tensor.shape) > 1)
    rng = np.random.default_rng(checkpoint.seed)
    pools = {kind: _pool(kind, rng) for kind in kinds}

    def fill(place: int) -> str:
        """Write one tensor; returns its hash."""
        digest = hashlib.sha256()
        own = np.random.default_rng([checkpoint.seed, place])  # so that no tensor waits for another
        with writing(path), path.open("r+b") as file:
            file.seek(begins[place])
            for piece in _random_pieces(planned.tensors[place], checkpoint.config, pools, own):
                file.write(piece.data)
                digest.update(piece.data)
        return digest.hexdigest()

    hashes: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for tensor, made in zip(planned.tensors, executor.map(fill, range(len(planned.tensors))), strict=True):
            hashes.append(made)
            more(tensor.n_bytes)
    with writing(path), path.open("r+b") as whole:
        put_hashes(whole.fileno(), head.hashes, hashes)


def _random_pieces(
    tensor: Planned, config: Config, pools: Mapping[Type, Bytes], rng: np.random.Generator
) -> Iterator[Bytes]:
    """The blocks of one tensor, in pieces of at most AT_ONCE bytes."""
    if len(tensor.shape) == 1:
        yield quantize(_vector(tensor, config, rng), tensor.type)
        return
    pool = pools[tensor.type]
    left = tensor.n_bytes // pool.shape[1]
    while left:
        take = min(left, AT_ONCE // pool.shape[1])
        yield pool.take(rng.integers(len(pool), size=take), axis=0).reshape(-1)
        left -= take


def _vector(tensor: Planned, config: Config, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Norms, scales and rotary frequencies."""
    if tensor.source is None:
        return np.array(rope_freqs(config), np.float32)
    if tensor.name == "output_norm.weight" and isinstance(config, TargetConfig):
        # With tied embeddings every token would be the likeliest to follow itself; random signs end that.
        return rng.choice(np.array([-1, 1], np.float32), tensor.shape)
    if tensor.name == f"blk.{config.n_layer - 1}.post_ffw_norm.weight":
        return np.full(tensor.shape, LAST_MLP_NORM, np.float32)
    return np.full(tensor.shape, NORMS.get(tensor.name.split(".")[-2], 1.0), np.float32)


def _pool(kind: Type, rng: np.random.Generator) -> Bytes:
    """Quantized random blocks, [count, bytes]."""
    length, size, _ = BLOCKS[kind]
    values = rng.standard_normal((POOL // 256, 256), np.float32) * np.float32(SCALE)
    return quantize(values, kind).reshape(-1, size * max(1, UNIT // length))
