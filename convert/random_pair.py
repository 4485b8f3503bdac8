"""Pairs with random weights at the published shapes: what a speed depends on, without the weights.

Every tensor has the type and size that convert would give it. The values are random blocks drawn from a pool that
libggml quantized, by every core at once, so that gigabytes are written at the speed of the disk.

Sizes: config.json of the published checkpoints, as collected in ollama's x/models/gemma4/gemma4_test.go and in the
drafters' model cards.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import link, names
from gemma_mtp.convert.checkpoint import Checkpoint, Source
from gemma_mtp.convert.config import DrafterConfig, TargetConfig, parse_config
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.split import cut
from gemma_mtp.convert.gguf_io.types import BLOCKS, Type, padded
from gemma_mtp.convert.integrity import put_hashes
from gemma_mtp.convert.metadata import Headers
from gemma_mtp.convert.plan import Plan, Planned, plan, rope_freqs, shapes
from gemma_mtp.convert.quantize import quantize
from gemma_mtp.convert.staging import clean_up, staging
from gemma_mtp.convert.tensor_types import Options, find_quant, parse_type

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
Config = TargetConfig | DrafterConfig

# Says that weights are random, and with which seed.
KEY_SEED = "mtp.random.seed"
GENERATOR = 4  # counts changes of what is generated

VOCAB, DRAFTER_LAYERS = 262144, 4
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": ROPE,
}
SMALL = {"sliding_window": 512, "max_position_embeddings": 131072, "num_global_key_value_heads": None}
SMALL_DRAFTER = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
LARGE = {"sliding_window": 1024, "max_position_embeddings": 262144, "attention_k_eq_v": True}
LARGE_TARGET = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
LARGE_DRAFTER = {"hidden_size": 1024, "intermediate_size": 8192}


@dataclass(frozen=True)
class Shape:
    """One published pair. A group of `period` layers ends in one of full attention."""

    period: int
    target: Mapping[str, Any]
    drafter: Mapping[str, Any]
    ordered: bool
    shared: Mapping[str, Any]  # what both text configurations hold


SHAPES = {
    "E2B": Shape(
        5,
        {"hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "use_double_wide_mlp": True,
         "num_attention_heads": 8, "num_kv_shared_layers": 20, "hidden_size_per_layer_input": 256},
        SMALL_DRAFTER, True, SMALL | {"num_key_value_heads": 1},
    ),
    "E4B": Shape(
        6,
        {"hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240, "use_double_wide_mlp": False,
         "num_attention_heads": 8, "num_kv_shared_layers": 18, "hidden_size_per_layer_input": 256},
        SMALL_DRAFTER, True, SMALL | {"num_key_value_heads": 2},
    ),
    "12B": Shape(
        6,
        LARGE_TARGET | {"hidden_size": 3840, "num_hidden_layers": 48, "intermediate_size": 15360},
        LARGE_DRAFTER, False,
        LARGE | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1},
    ),
    "26B-A4B": Shape(
        6,
        LARGE_TARGET | {"hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
                        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        LARGE_DRAFTER, False,
        LARGE | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2},
    ),
    "31B": Shape(
        6,
        LARGE_TARGET | {"hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504},
        LARGE_DRAFTER, False,
        LARGE | {"num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4},
    ),
}  # fmt: skip


def generate(
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
        shape: a key of `SHAPES`.
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
    if shape not in SHAPES:
        raise MtpError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}.")
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
    common = {link.KEY_VERSION: link.VERSION, KEY_SEED: seed}
    links = [common | each for each in link.entries((files[0].name, files[1].name), source, source)]
    formats = (quant, Options()), (drafter_quant, head)
    clean_up(folder)
    wanted = [job for job in zip(files, (target_config, drafter_config), formats, links, strict=True)
              if not job[0].exists()]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gemma-mtp-") as made:
        checkpoints = [Synthetic(Path(made) / job[0].stem, job[1], seed) for job in wanted]
        plans = [plan(each.config, each.index, *job[2]) for each, job in zip(checkpoints, wanted, strict=True)]
        total, done = sum(each.n_bytes for each in plans), 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            progress(done, total)

        with staging(folder, [job[0].name for job in wanted], total, force=False) as hidden:
            for checkpoint, planned, (path, _, _, tied) in zip(checkpoints, plans, wanted, strict=True):
                write(planned, checkpoint, hidden / path.name, tied, count)
    return files


def configs(shape: str, layers: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a shape's target and drafter, the target cut to fewer layers if asked.

    The share of layers that read another layer's KV cache is kept; the layers that lend theirs are always there.

    Raises:
        MtpError: the number of layers is no multiple of the period, or more than the shape has.
    """
    spec = SHAPES[shape]
    text = {**COMMON, **spec.shared, **spec.target}
    all_layers, period = text["num_hidden_layers"], spec.period
    count = all_layers if layers is None else layers
    if count % period or not 0 < count <= all_layers:
        raise MtpError(f"{shape} with {layers} layers: give a multiple of {period}, at most {all_layers}.")
    if count < all_layers and text["num_kv_shared_layers"]:
        own = round((all_layers - text["num_kv_shared_layers"]) / all_layers * count / period) * period
        text["num_kv_shared_layers"] = count - max(own, period)
    text["num_hidden_layers"] = count
    text["layer_types"] = ([SLIDING] * (period - 1) + [FULL]) * (count // period)
    text["final_logit_softcapping"] = 30.0
    drafter = {
        **COMMON, **spec.shared, **spec.drafter, "num_hidden_layers": DRAFTER_LAYERS, "use_double_wide_mlp": False,
        "num_kv_shared_layers": DRAFTER_LAYERS, "layer_types": [SLIDING] * (DRAFTER_LAYERS - 1) + [FULL],
        "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    unified = "Unified" if shape == "12B" else ""
    return (
        {"architectures": [f"Gemma4{unified}ForConditionalGeneration"], "text_config": text},
        {"architectures": [f"Gemma4{unified}AssistantForCausalLM"], "text_config": drafter,
         "backbone_hidden_size": text["hidden_size"], "use_ordered_embeddings": spec.ordered,
         "num_centroids": 2048, "centroid_intermediate_top_k": 32},
    )  # fmt: skip


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
    return json.dumps({"model": model, "added_tokens": added}, ensure_ascii=False), json.dumps(config)


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
CHUNK = 1 << 24  # bytes written at once


def write(
    planned: Plan, checkpoint: Synthetic, path: Path, tied: Mapping[str, Any], count: Callable[[int], None]
) -> None:
    """Write one GGUF file with the metadata that convert would write and random blocks, on all cores."""
    head = Headers(checkpoint, planned).head(planned, cut(path.stem, planned.tensors)[0], tied)
    begins = list(accumulate((padded(tensor.n_bytes) for tensor in planned.tensors), initial=len(head.raw)))
    with path.open("xb") as file:
        file.write(head.raw)
        file.truncate(begins[-1])
    kinds = dict.fromkeys(tensor.type for tensor in planned.tensors if len(tensor.shape) > 1)
    rng = np.random.default_rng(checkpoint.seed)
    pools = {kind: _pool(kind, rng) for kind in kinds}

    def fill(place: int) -> str:
        """Write one tensor; returns its hash."""
        digest = hashlib.sha256()
        own = np.random.default_rng([checkpoint.seed, place])  # so that no tensor waits for another
        with path.open("r+b") as file:
            file.seek(begins[place])
            for piece in _pieces(planned.tensors[place], checkpoint.config, pools, own):
                file.write(piece.data)
                digest.update(piece.data)
        return digest.hexdigest()

    hashes: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for tensor, made in zip(planned.tensors, executor.map(fill, range(len(planned.tensors))), strict=True):
            hashes.append(made)
            count(tensor.n_bytes)
    with path.open("r+b") as whole:
        put_hashes(whole.fileno(), head.hashes, hashes)


def _pieces(tensor: Planned, config: Config, pools: Mapping[Type, Bytes], rng: np.random.Generator) -> Iterator[Bytes]:
    """The blocks of one tensor, in pieces of at most CHUNK bytes."""
    if len(tensor.shape) == 1:
        yield quantize(_vector(tensor, config, rng), tensor.type)
        return
    pool = pools[tensor.type]
    left = tensor.n_bytes // pool.shape[1]
    while left:
        take = min(left, CHUNK // pool.shape[1])
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
