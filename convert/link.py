"""The pairing contract: which drafter belongs to which target, read from the two GGUF headers.

A target carries the fingerprint of the checkpoint it was converted from, a drafter the fingerprint of its target's
checkpoint, so one drafter serves every quantization of its target. Files of others carry none: there the drafter gets
the fingerprint of its target's weights, and the target stays as it is.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gemma_mtp.convert.errors import MtpError, PairError
from gemma_mtp.convert.gguf_io import split
from gemma_mtp.convert.gguf_io.blobs import StoredModel, find_model, owner_of, what_it_is_not
from gemma_mtp.convert.gguf_io.check import DRAFTER_ARCH, TARGET_ARCH, check_model, ends_in_donors
from gemma_mtp.convert.gguf_io.folder import beginning, contents, folders_around, gguf_files, is_regular
from gemma_mtp.convert.gguf_io.ordered import KEY_CENTROIDS, KEY_N_CENTROIDS, KEY_ORDERING, KEY_TOP_K
from gemma_mtp.convert.gguf_io.read import Header, Strings, Tensor, read
from gemma_mtp.convert.gguf_io.split import is_part
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.gguf_io.write import entry

__all__ = [
    "DRAFTER_ARCH", "KEY_CENTROIDS", "KEY_HASHES", "KEY_N_CENTROIDS", "KEY_ORDERING", "KEY_PEER", "KEY_ROLE",
    "KEY_SEED", "KEY_SOURCE", "KEY_SPLIT", "KEY_TARGET", "KEY_TOP_K", "KEY_VERSION", "KEY_WEIGHTS", "TARGET_ARCH",
    "VERSION", "Header", "MtpError", "PairError", "StoredModel", "Strings", "Tensor", "check", "check_model",
    "check_projector", "find_drafter", "find_model", "find_projector", "gguf_files", "is_part", "owner_of",
    "read_header", "read_parts", "weights_identity", "what_it_is_not", "why_no_drafter",
]  # fmt: skip

VERSION = 1

KEY_VERSION = "mtp.version"
KEY_ROLE = "mtp.role"
KEY_SOURCE = "mtp.source.fingerprint"
KEY_TARGET = "mtp.target.fingerprint"
KEY_WEIGHTS = "mtp.target.weights"
KEY_PEER = "mtp.peer.file"
# Says that weights are random, and with which seed.
KEY_SEED = "mtp.random.seed"
# Start of a target's fingerprint that was taken from its GGUF file, where nothing tells of the checkpoint.
WEIGHTS = "weights:"
# SHA-256 of every tensor's bytes, in the order of the tensors.
KEY_HASHES = "mtp.tensor.sha256"
# How names of the encoders of images and sound begin, which files of Ollama's library hold beside the target.
ENCODER_STARTS = ("v.", "a.", "mm.")
# Architecture of a projector, and where it says how wide the target's embeddings are that it makes.
PROJECTOR_ARCH = "clip"
KEYS_WIDTH = ("clip.vision.projection_dim", "clip.audio.projection_dim")
# What all parts of a split model share: one for each conversion, by its checkpoint, tensors and types.
KEY_SPLIT = "mtp.split.fingerprint"
# What each part of a split model says of the pair.
OF_EACH_PART = (KEY_VERSION, KEY_ROLE, KEY_SOURCE)
NAME_ONE = "or name one with drafter= (--drafter)"
# Bytes of a drafter in which its link is looked for; a header with the full vocabulary has 17 MB.
GLANCE = 1 << 25


def read_header(path: Path) -> Header:
    """Read metadata and tensor table of a GGUF file; the weights stay where they are.

    Raises:
        MtpError: there is no such file, it is not GGUF, its header is damaged, or, for a target or a drafter, its
            metadata makes no sense.
    """
    header = read(path)
    check_model(header)
    return header


def entries(files: tuple[str, str], source: str, drafter_source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata that makes a target and its drafter a pair.

    Args:
        files: their names.
        source: fingerprint of the target's checkpoint.
        drafter_source: of the drafter's.
    """
    return (
        {KEY_VERSION: VERSION, KEY_ROLE: "target", KEY_SOURCE: source, KEY_PEER: files[1]},
        {KEY_VERSION: VERSION, KEY_ROLE: "drafter", KEY_SOURCE: drafter_source, KEY_PEER: files[0], KEY_TARGET: source},
    )


def weights_identity(header: Header) -> str:
    """What all quantizations of one target share: its vocabulary and its float vectors, norms and scales.

    Quantizers leave vectors in float32, so files of any converter and format agree, and files of other weights differ.
    Encoders in the same file do not count. (A fine-tune that left every norm alone agrees with the model it came from;
    the drafter serves it too.)

    Raises:
        MtpError: a file of a split target is missing or damaged.
    """
    total = hashlib.sha256()
    tokens = header.vocabulary
    total.update(tokens.digest().encode() if isinstance(tokens, Strings) else b"")
    vectors = {}
    for part in read_parts(header):
        with part.path.open("rb") as file:
            for name, tensor in part.tensors.items():
                if name == "rope_freqs.weight" or name.startswith(ENCODER_STARTS):
                    continue
                if tensor.type is Type.F32 and len(tensor.shape) == 1:
                    file.seek(tensor.offset)
                    vectors[name] = file.read(tensor.size)
    for name in sorted(vectors):
        total.update(name.encode() + b"\0" + vectors[name])
    return WEIGHTS + total.hexdigest()


def read_parts(header: Header) -> list[Header]:
    """The header itself, or those of all files of a split.

    Raises:
        MtpError: this is not the first part; a part is missing, renamed, damaged, or of another conversion.
    """
    return split.read_parts(header, (KEY_ROLE, KEY_SOURCE, KEY_SPLIT))


def find_drafter(target: Path, header: Header | None = None) -> Path | None:
    """The linked drafter beside a target, or None.

    Beside it is the folder of the path as given, that of the real file if the path is a link, and in the Hugging Face
    cache every folder of the same repository. Of a folder, the file that the target names comes first, then all other
    GGUF files in the order of their names. A drafter is recognised by architecture and fingerprint, never by its name.

    Raises:
        MtpError: the target, or the drafter that it names, cannot be read.
    """
    header = header or read_header(target)
    if header.arch != TARGET_ARCH:
        return None
    by_weights = functools.cache(lambda: weights_identity(header))

    def belongs(told: Callable[[str], Any]) -> bool:
        wants, has = _fingerprints(told, header, by_weights)
        return isinstance(wants, str) and wants == has

    for folder in folders_around(target):
        named = _named(header, folder)
        if named is not None and belongs(_told(read_header(named))):
            return named
        for path in _drafters(folder):
            try:
                if belongs(_glance(path)) and belongs(_told(read_header(path))):
                    return path
            except (MtpError, OSError):
                continue  # a broken file that nobody named is none of this pair's business
    return None


def find_projector(target: Path, header: Header) -> Path | None:
    """The projector beside a target: itself if it holds encoders, else the first of its width by name, or None.

    Which checkpoint a projector comes from does not stand in it; that it makes embeddings of the target's width does.
    Ollama's store keeps the files of all models in one folder, and names those of each itself (`StoredModel`).
    """
    if any(name.startswith(ENCODER_STARTS) for name in header.tensors):
        return target
    if owner_of(target) is not None:
        return None
    for folder in folders_around(target):
        for path in contents(folder):
            if PROJECTOR_ARCH.encode() not in beginning(path):
                continue
            try:
                found = read_header(path)
            except (MtpError, OSError):
                continue
            if found.arch == PROJECTOR_ARCH and header.of_arch("embedding_length") in _widths(found):
                return path
    return None


def check_projector(target: Header, projector: Header) -> None:
    """Refuse a file that is no projector, or not of the target's width.

    Raises:
        MtpError: naming both.
    """
    if projector.arch not in (PROJECTOR_ARCH, TARGET_ARCH):
        raise MtpError(f"{projector.path} is no projector; pass the mmproj file of {target.path.name}.")
    width, theirs = target.of_arch("embedding_length"), _widths(projector)
    if theirs and width not in theirs:
        raise MtpError(
            f"{projector.path} makes embeddings of {theirs[0]} numbers, {target.path.name} reads {width}; pass the "
            "mmproj file of this model."
        )


def _widths(projector: Header) -> list[Any]:
    """Of the embeddings that a projector makes, as it says."""
    return [projector.metadata[key] for key in KEYS_WIDTH if key in projector.metadata]


def why_no_drafter(target: Path, header: Header) -> str:
    """Why `find_drafter` found none, with the next step, as a sentence without its stop."""
    if header.arch != TARGET_ARCH:
        return (
            f"{target} is a {header.arch!r} model, and drafters are for {TARGET_ARCH!r}; pass drafter=None (--no-mtp)"
        )
    model = owner_of(target)
    if model is not None:
        return f"Ollama's store has no linked drafter for {model}; run gemma-mtp ollama attach {model}, {NAME_ONE}"
    start, ours = f"no linked drafter beside {target}", header.metadata.get(KEY_SOURCE)
    drafter = next(_lying(target, header), None)
    if drafter is None:
        named = header.metadata.get(KEY_PEER)
        return f"{start}; {f'put {named!r} there' if named else 'link one with gemma-mtp link'}, {NAME_ONE}"
    wants, peer = drafter.metadata.get(KEY_TARGET), drafter.metadata.get(KEY_PEER)
    if wants is None:
        return f"{start}: {drafter.path} is linked to no target; run gemma-mtp link {target} {drafter.path}"
    whose = f"{peer!r}, fingerprint {_short(wants)}" + (f", here {_short(ours)}" if ours else "")
    return f"{start}: {drafter.path} lies there, but is of another target: {whose}; put its own there, {NAME_ONE}"


def _lying(target: Path, header: Header) -> Iterator[Header]:
    """The drafters beside a target, whose they may be; in each folder the one that it names first."""
    for folder in folders_around(target):
        named = _named(header, folder)
        for path in chain([] if named is None else [named], _drafters(folder)):
            try:
                drafter = read_header(path)
            except (MtpError, OSError):
                continue
            if drafter.arch == DRAFTER_ARCH:
                yield drafter


def _named(header: Header, folder: Path) -> Path | None:
    """The file of a folder under the name that a target gives for its drafter."""
    path = folder / Path(str(header.metadata.get(KEY_PEER, ""))).name
    return path if is_regular(path) else None


def _drafters(folder: Path) -> Iterator[Path]:
    """The GGUF files of a folder that say in their first bytes that they are drafters, by name."""
    return (path for path in contents(folder) if DRAFTER_ARCH.encode() in beginning(path))


def _told(drafter: Header) -> Callable[[str], Any]:
    """What a drafter says under a key; nothing of what is no drafter."""
    return drafter.metadata.get if drafter.arch == DRAFTER_ARCH else lambda key: None


def _glance(path: Path) -> Callable[[str], Any]:
    """What a drafter says under a key, picked out of its header: to read all of that takes half a second."""
    with path.open("rb") as file:
        data = file.read(GLANCE)

    def told(name: str) -> str | None:
        key, before_value = name.encode(), entry(name, "")[:-8]
        at = data.find(key)  # `before_value` has zeros at its ends, and is searched for thirty times as long
        while at >= 0 and not data.startswith(before_value, at - 8):
            at = data.find(key, at + 1)
        if at < 0:
            return None
        start = at + len(before_value)
        length = int.from_bytes(data[start - 8 : start], "little")
        return data[start : start + min(length, 128)].decode(errors="replace")

    return told


def _fingerprints(told: Callable[[str], Any], target: Header, by_weights: Callable[[], str]) -> tuple[Any, Any]:
    """The fingerprint that a drafter wants its target to have, and the one that it has; None where nothing tells.

    A target of another converter tells of no checkpoint, and is known by its weights.
    """
    wants, has = told(KEY_TARGET), target.metadata.get(KEY_SOURCE)
    if has is None and not str(wants).startswith(WEIGHTS):
        wants = told(KEY_WEIGHTS)
    return wants, by_weights() if str(wants).startswith(WEIGHTS) else has


class Interface(NamedTuple):
    """What a drafter reads of its target, as either of them says: sizes, and KV heads by type of layer."""

    n_embd: Any
    sliding_window: Any
    vocab_size: Any
    head_size: Any
    sliding_head_size: Any
    n_kv: Mapping[str, int]


def differences(target: Interface, drafter: Interface) -> Iterator[tuple[str, Any, Any]]:
    """What must agree for shared KV to mean anything and does not: its name, the target's value, the drafter's."""
    compared = {
        "hidden size": (target.n_embd, drafter.n_embd),
        "sliding window": (target.sliding_window, drafter.sliding_window),
        "vocabulary size": (target.vocab_size, drafter.vocab_size),
        "head size": (target.head_size, drafter.head_size),
        "sliding head size": (target.sliding_head_size, drafter.sliding_head_size),
        **{f"KV heads of {kind} layers": (target.n_kv.get(kind, 0), n_kv) for kind, n_kv in drafter.n_kv.items()},
    }
    return ((name, *values) for name, values in compared.items() if values[0] != values[1])


def _header_interface(header: Header, n_embd: str) -> Interface:
    """What a file says; `n_embd` is the key of the hidden size. A value that all layers share is stored once."""
    pattern = np.atleast_1d(header.of_arch("attention.sliding_window_pattern", []))
    heads = np.broadcast_to(np.asarray(header.of_arch("attention.head_count_kv", -1)), pattern.shape)
    return Interface(
        header.of_arch(n_embd),
        header.of_arch("attention.sliding_window"),
        len(header.vocabulary),
        header.of_arch("attention.key_length"),
        header.of_arch("attention.key_length_swa"),
        {("sliding" if sliding else "full"): int(n) for sliding, n in zip(pattern, heads, strict=True)},
    )


def _short(fingerprint: str) -> str:
    return str(fingerprint).removeprefix(WEIGHTS)[:12]


def check(target: Header, drafter: Header) -> None:
    """Check that a drafter can read the target's hidden states and KV cache and was trained to.

    Raises:
        PairError: naming the first property that differs, with both values.
    """
    if target.arch != TARGET_ARCH:
        raise PairError(f"{target.path} is a {target.arch!r} model; a target must be {TARGET_ARCH!r}.")
    if drafter.arch != DRAFTER_ARCH:
        raise PairError(
            f"{drafter.path} is a {drafter.arch!r} model, not a drafter ({DRAFTER_ARCH!r}); "
            "pass the drafter's GGUF file, or drafter=None."
        )
    advice = "use the drafter converted together with this target."
    wants, has = _fingerprints(drafter.metadata.get, target, lambda: weights_identity(target))
    if wants and has and wants != has:
        raise PairError(
            f"{drafter.path.name} was made for the target with fingerprint {_short(wants)}, but {target.path.name} has "
            f"{_short(has)}; {advice}"
        )
    pattern = target.of_arch("attention.sliding_window_pattern", [])
    own = pattern[: len(pattern) - int(target.of_arch("attention.shared_kv_layers", 0))]
    if not ends_in_donors(own):
        raise PairError(f"{target.path.name}: its last layers with KV of their own are not a sliding and a full one, "
                        "which a drafter reads; run it without MTP.")  # fmt: skip
    sides = _header_interface(target, "embedding_length"), _header_interface(drafter, "embedding_length_out")
    for name, has_it, wants_it in chain(differences(*sides), _other_token(target.vocabulary, drafter.vocabulary)):
        raise PairError(
            f"{drafter.path.name} does not fit {target.path.name}: {name} is {has_it} in the target, {wants_it} in the "
            f"drafter; {advice}"
        )


def _other_token(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The first token that differs between two vocabularies of one size: its place, and both in quotes."""
    if isinstance(ours, Strings) and isinstance(theirs, Strings) and ours.digest() != theirs.digest():
        place = next(i for i in range(len(ours)) if ours[i] != theirs[i])
        yield f"token {place}", repr(ours[place]), repr(theirs[place])
