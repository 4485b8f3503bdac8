"""The pairing contract: which drafter belongs to which target, read from the two GGUF headers.

A target carries the fingerprint of the checkpoint it was converted from, a drafter the fingerprint of its target's
checkpoint, so one drafter serves every quantization of its target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gemma_mtp.convert.errors import MtpError, PairError
from gemma_mtp.convert.gguf_file import Header, Strings, Tensor, read
from gemma_mtp.convert.gguf_model import (
    DRAFTER_ARCH,
    KEY_CENTROIDS,
    KEY_N_CENTROIDS,
    KEY_ORDERING,
    KEY_TOP_K,
    TARGET_ARCH,
    check_model,
)

__all__ = [
    "DRAFTER_ARCH", "KEY_CENTROIDS", "KEY_HASHES", "KEY_N_CENTROIDS", "KEY_ORDERING", "KEY_PEER", "KEY_ROLE",
    "KEY_SOURCE", "KEY_TARGET", "KEY_TOP_K", "KEY_VERSION", "TARGET_ARCH", "VERSION", "Header", "MtpError", "PairError",
    "Strings", "Tensor", "check", "check_model", "find_drafter", "read_header",
]  # fmt: skip

VERSION = 1

KEY_VERSION = "mtp.version"
KEY_ROLE = "mtp.role"
KEY_SOURCE = "mtp.source.fingerprint"
KEY_TARGET = "mtp.target.fingerprint"
KEY_PEER = "mtp.peer.file"
# SHA-256 of every tensor's bytes, in the order of the tensors.
KEY_HASHES = "mtp.tensor.sha256"


def read_header(path: Path) -> Header:
    """Read metadata and tensor table of a GGUF file; the weights stay where they are.

    Raises:
        MtpError: there is no such file, it is not GGUF, its header is damaged, or, for a target or a drafter, its
            metadata makes no sense.
    """
    header = read(path)
    check_model(header)
    return header


def _belongs(target: Header, drafter: Header) -> bool:
    wanted = target.metadata.get(KEY_SOURCE)
    return drafter.arch == DRAFTER_ARCH and wanted is not None and drafter.metadata.get(KEY_TARGET) == wanted


def find_drafter(target: Path, header: Header | None = None) -> Path | None:
    """The linked drafter in a target's folder, or None.

    The file that the target names comes first, then every other GGUF file of the folder in the order of their names. A
    drafter is recognised by architecture and fingerprint, never by its name.

    Raises:
        MtpError: the target, or the drafter that it names, cannot be read.
    """
    header = header or read_header(target)
    if KEY_SOURCE not in header.metadata:
        return None
    named = target.parent / Path(str(header.metadata.get(KEY_PEER, ""))).name
    if named.is_file() and _belongs(header, read_header(named)):
        return named
    for path in sorted(target.parent.glob("*.gguf")):
        try:
            if path != target and _belongs(header, read_header(path)):
                return path
        except MtpError:
            continue  # a broken file that nobody named is none of this pair's business
    return None


def _by_type(header: Header, key: str) -> dict[str, Any]:
    """A per-layer value, which GGUF stores as a scalar when all layers share it, by type of layer."""
    pattern = np.atleast_1d(header.of_arch("attention.sliding_window_pattern", []))
    values = np.broadcast_to(np.asarray(header.of_arch(key, -1)), pattern.shape)
    return {("sliding" if sliding else "full"): int(value) for sliding, value in zip(pattern, values, strict=True)}


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
    wants, has = drafter.metadata.get(KEY_TARGET), target.metadata.get(KEY_SOURCE)
    if wants and has and wants != has:
        raise PairError(
            f"{drafter.path.name} was converted for the target with fingerprint {wants[:12]}, but {target.path.name} "
            f"has {has[:12]}; {advice}"
        )
    compared = {
        "hidden size": (target.of_arch("embedding_length"), drafter.of_arch("embedding_length_out")),
        "sliding window": tuple(h.of_arch("attention.sliding_window") for h in (target, drafter)),
        "vocabulary size": (len(target.vocabulary), len(drafter.vocabulary)),
    }
    for name, key in (("head size", "key_length"), ("sliding head size", "key_length_swa")):
        compared[name] = tuple(h.of_arch(f"attention.{key}") for h in (target, drafter))
    donors, readers = (_by_type(h, "attention.head_count_kv") for h in (target, drafter))
    for kind in readers:
        compared[f"KV heads of {kind} layers"] = (donors.get(kind, 0), readers[kind])
    for name, (ours, theirs) in compared.items():
        if ours != theirs:
            raise PairError(
                f"{drafter.path.name} does not fit {target.path.name}: {name} is {ours} in the target, {theirs} in the "
                f"drafter; {advice}"
            )
    ours, theirs = target.vocabulary, drafter.vocabulary
    if isinstance(ours, Strings) and isinstance(theirs, Strings) and ours.digest() != theirs.digest():
        place = next(i for i in range(len(ours)) if ours[i] != theirs[i])
        raise PairError(
            f"{drafter.path.name} does not fit {target.path.name}: token {place} is {ours[place]!r} in the target, "
            f"{theirs[place]!r} in the drafter; {advice}"
        )
