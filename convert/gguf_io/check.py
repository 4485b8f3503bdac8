"""Whether the metadata of a Gemma 4 target or drafter makes sense, before llama.cpp takes it on trust.

llama.cpp ends the process on some of these (src/llama-model.cpp and llama-vocab.cpp: asserts on layer, expert and token
counts, divisions by head counts), so they are looked at here, in one table, with key, wanted and got.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.ordered import (
    KEY_CENTROIDS,
    KEY_N_CENTROIDS,
    KEY_ORDERING,
    KEY_TOP_K,
    broken_sizes,
    broken_tables,
    quoted,
)
from gemma_mtp.convert.gguf_io.read import Header, Strings
from gemma_mtp.convert.gguf_io.split import KEY_COUNT

TARGET_ARCH = "gemma4"
DRAFTER_ARCH = "gemma4-assistant"


class Bound(NamedTuple):
    """What a key may hold: numbers from `least` to `most`, one or, if `by_layer`, one for each layer."""

    least: float
    most: float
    by_layer: bool = False
    required: bool = True
    whole: bool = True


# Keys without the architecture's prefix.
BOUNDS = {
    "context_length": Bound(1, 1 << 26),
    "embedding_length": Bound(1, 1 << 20),
    "feed_forward_length": Bound(1, 1 << 24, by_layer=True),
    "attention.head_count": Bound(1, 1 << 12, by_layer=True),
    "attention.head_count_kv": Bound(1, 1 << 12, by_layer=True),
    "attention.key_length": Bound(2, 1 << 14),
    "attention.value_length": Bound(2, 1 << 14),
    "attention.key_length_swa": Bound(2, 1 << 14),
    "attention.value_length_swa": Bound(2, 1 << 14),
    "attention.sliding_window": Bound(1, 1 << 26),
    "attention.sliding_window_pattern": Bound(0, 1, by_layer=True),
    "attention.layer_norm_rms_epsilon": Bound(0, 1, whole=False),
    "rope.freq_base": Bound(1, 1e12, required=False, whole=False),
    "rope.freq_base_swa": Bound(1, 1e12, required=False, whole=False),
    "rope.dimension_count": Bound(2, 1 << 14, required=False),
    "rope.dimension_count_swa": Bound(2, 1 << 14, required=False),
    "embedding_length_per_layer_input": Bound(0, 1 << 16, required=False),
    "embedding_length_out": Bound(1, 1 << 20, required=False),
    "final_logit_softcapping": Bound(0, 1e6, required=False, whole=False),
    "expert_count": Bound(0, 512, required=False),
    "expert_used_count": Bound(0, 512, required=False),
    "expert_feed_forward_length": Bound(1, 1 << 24, by_layer=True, required=False),
}
SPECIAL = ("bos", "eos", "unknown", "padding", "mask", "eot", "eom", "seperator")


class _Wrong(Exception):
    """A key that does not hold what it should."""

    def __init__(self, key: str, got: Any, wanted: str) -> None:
        super().__init__(f"{key} is {quoted(got)}, wanted {wanted}")


def check_model(header: Header) -> None:
    """Check the metadata of a target or drafter; files of other architectures pass unseen.

    Raises:
        MtpError: naming the first key that is missing, of the wrong type, or out of bounds.
    """
    if header.arch not in (TARGET_ARCH, DRAFTER_ARCH):
        return
    try:
        _check_parameters(header)
        _check_vocabulary(header)
        if KEY_CENTROIDS in header.metadata:
            _check_ordered(header)
    except _Wrong as wrong:
        raise MtpError(f"{header.path}: {wrong}; convert the checkpoint again.") from None


def check_parameters(file: Path, arch: str, values: Mapping[str, Any]) -> None:
    """Check what a configuration becomes, before there is a file.

    Args:
        file: with the configuration.
        arch: of the file that it becomes.
        values: its metadata, keys without the architecture's prefix.

    Raises:
        MtpError: naming the first key that is out of bounds.
    """
    metadata = {f"{arch}.{key}": np.asarray(each) if isinstance(each, list) else each for key, each in values.items()}
    try:
        _check_parameters(Header(file, arch, metadata, {}))
    except _Wrong as wrong:
        raise MtpError(f"{file} is damaged, or of a model that llama.cpp cannot run: {wrong}.") from None


def _check_parameters(header: Header) -> None:
    layers = int(_number(header, "block_count", Bound(1, 512)))
    for key, bound in BOUNDS.items():
        value = header.of_arch(key)
        if value is None and not bound.required:
            continue
        if bound.by_layer and isinstance(value, np.ndarray):
            _row(header, key, value, bound, layers)
        elif key == "attention.sliding_window_pattern":
            raise _Wrong(key, value, f"{layers} booleans")
        else:
            _number(header, key, bound)
    if header.of_arch("nextn_predict_layers") is not None:
        _number(header, "nextn_predict_layers", Bound(0, layers))
    if header.of_arch("attention.shared_kv_layers") is not None:
        # a target keeps at least the last layer of each kind for the others to read
        _number(header, "attention.shared_kv_layers", Bound(0, layers if header.arch == DRAFTER_ARCH else layers - 2))
    _related(header, layers)


def _number(header: Header, key: str, bound: Bound) -> float:
    value = header.of_arch(key)
    kinds = (int,) if bound.whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not bound.least <= value <= bound.most:
        raise _Wrong(key, value, f"a number from {bound.least:g} to {bound.most:g}")
    return float(value)


def _row(header: Header, key: str, values: Any, bound: Bound, layers: int) -> None:
    numbers = values.dtype.kind in "iub" and len(values) == layers
    if not numbers or not bool(((values >= bound.least) & (values <= bound.most)).all()):
        raise _Wrong(key, values, f"{layers} numbers from {bound.least:g} to {bound.most:g}")


def _related(header: Header, layers: int) -> None:
    """Values that must agree with each other."""
    heads = np.broadcast_to(np.asarray(header.of_arch("attention.head_count")), layers).astype(np.int64)
    kv = np.broadcast_to(np.asarray(header.of_arch("attention.head_count_kv")), layers).astype(np.int64)
    if bool((heads % kv).any()):
        raise _Wrong("attention.head_count_kv", kv.tolist(), f"divisors of the head counts {heads.tolist()}")
    for kind in ("", "_swa"):
        key, value = header.of_arch(f"attention.key_length{kind}"), header.of_arch(f"attention.value_length{kind}")
        if key != value or key % 2:
            raise _Wrong(f"attention.value_length{kind}", value, f"key_length{kind} ({key}), and even")
        turned = header.of_arch(f"rope.dimension_count{kind}", key)
        if turned > key or turned % 2:
            raise _Wrong(f"rope.dimension_count{kind}", turned, f"an even number up to {key}")
    sliding = header.of_arch("attention.sliding_window_pattern")
    first_shared = layers - int(header.of_arch("attention.shared_kv_layers", 0))
    if not bool(sliding.any()):
        raise _Wrong("attention.sliding_window_pattern", sliding.tolist(), "at least one sliding layer")
    if header.arch == TARGET_ARCH and first_shared < layers and not ends_in_donors(sliding[:first_shared]):
        raise _Wrong("attention.sliding_window_pattern", sliding.tolist(),
                     f"a sliding layer and a full one before layer {first_shared}, which the others read")  # fmt: skip
    experts, used = header.of_arch("expert_count", 0), header.of_arch("expert_used_count", 0)
    if used > experts or (experts and not used):
        raise _Wrong("expert_used_count", used, f"1 to {experts}, the number of experts")


def ends_in_donors(sliding: Any) -> bool:
    """Whether layers end in a sliding and a full one: their KV is what llama.cpp lets others, and drafters, read."""
    return len(sliding) >= 2 and bool(sliding[-2]) and not bool(sliding[-1])


def _check_vocabulary(header: Header) -> None:
    """Tokens that differ, a score and a type for each, special tokens among them."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Strings) or not tokens:
        raise _Wrong("tokenizer.ggml.tokens", tokens, "an array of strings")
    count = len(tokens)
    if (distinct := tokens.distinct()) != count:
        raise _Wrong("tokenizer.ggml.tokens", f"{distinct} different strings", f"{count} different ones")
    for key, kinds in (("scores", "f"), ("token_type", "iu")):
        values = header.metadata.get(f"tokenizer.ggml.{key}")
        if values is not None and not (
            isinstance(values, np.ndarray) and values.dtype.kind in kinds and len(values) == count
        ):
            got = f"{type(values).__name__} of {len(values) if hasattr(values, '__len__') else 1}"
            raise _Wrong(f"tokenizer.ggml.{key}", got, f"{count} numbers")
    for name in SPECIAL:
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not (isinstance(value, int) and 0 <= value < count):
            raise _Wrong(f"tokenizer.ggml.{name}_token_id", value, f"a token id from 0 to {count - 1}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None and header.metadata.get(KEY_COUNT, 0) > 1:
        return  # it is in another file of the split
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != count:
        shape = None if embedding is None else list(embedding.shape)
        raise _Wrong("token_embd.weight", shape, f"a tensor of {count} rows, one for each token")


def _check_ordered(header: Header) -> None:
    """The tables of an ordered head: equal clusters, finite centroids, an ordering that names every token once.

    Tokens at the end of the vocabulary may be in none of the clusters; they are never drafted.
    """
    width, ordering = header.of_arch("embedding_length"), header.metadata.get(KEY_ORDERING)
    count = min(len(header.vocabulary), len(ordering) if isinstance(ordering, np.ndarray) else len(header.vocabulary))
    n_centroids, top_k = header.metadata.get(KEY_N_CENTROIDS), header.metadata.get(KEY_TOP_K)
    for broken in broken_sizes(count, n_centroids, top_k):
        raise _Wrong(*broken)
    assert isinstance(n_centroids, int)
    centroids = header.metadata[KEY_CENTROIDS]
    for broken in broken_tables(centroids, ordering, count, n_centroids, width):
        raise _Wrong(*broken)
