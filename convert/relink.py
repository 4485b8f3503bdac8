"""Link a drafter to a target that somebody else converted: the drafter's header is written anew, its weights copied."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError, PairError
from gemma_mtp.convert.files import reading, writing
from gemma_mtp.convert.gguf_io.blobs import is_store, owner_of
from gemma_mtp.convert.gguf_io.read import Header
from gemma_mtp.convert.gguf_io.split import KEY_COUNT
from gemma_mtp.convert.gguf_io.write import entry
from gemma_mtp.convert.hub import fetch_checkpoint
from gemma_mtp.convert.integrity import check_tensors, seal
from gemma_mtp.convert.progress import Progress, counting
from gemma_mtp.convert.staging import staging

COPIED_AT_ONCE = 1 << 24


def link_files(
    target: Path,
    drafter: Path,
    out: Path | None = None,
    in_place: bool = False,
    ordered_from: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write a drafter that carries the fingerprint of its target; the target is only read.

    Whatever happens, the file that is there stays whole: the new one is written beside it, checked, and renamed.

    Args:
        target: GGUF file of the target, from any converter; of a split, its first file.
        drafter: GGUF file of the drafter.
        out: file to write; <drafter>-linked.gguf in the target's folder unless given.
        in_place: replace the drafter instead.
        ordered_from: Hugging Face folder or org/name[@revision] of the drafter, from which the ordered head is added.
        force: replace `out`, and a link to another target.
        progress: called with bytes written and bytes in all.

    Returns:
        The file written.

    Raises:
        PairError: the drafter does not fit the target, or is another target's.
        MtpError: a file is damaged, there already, or cannot be replaced safely.
    """
    ours, theirs = link.read_header(target), link.read_header(drafter)
    link.read_parts(ours)
    if theirs.metadata.get(KEY_COUNT, 0) > 1:
        raise MtpError(f"{drafter} is one of several files; join them with llama-gguf-split --merge first.")
    if force:
        kept = {key: theirs.metadata[key] for key in theirs.metadata.keys() - {link.KEY_TARGET, link.KEY_WEIGHTS}}
        link.check(ours, Header(theirs.path, theirs.arch, kept, theirs.tensors))
    else:
        link.check(ours, theirs)
    values: dict[str, Any] = {
        link.KEY_VERSION: link.VERSION,
        link.KEY_ROLE: "drafter",
        **dict.fromkeys((link.KEY_TARGET, link.KEY_WEIGHTS), link.weights_identity(ours)),
        link.KEY_PEER: target.name,
        link.KEY_HASHES: ["0" * 64] * len(theirs.tensors),
    }
    if ordered_from is not None:
        values |= _ordered_head(theirs, fetch_checkpoint(str(ordered_from)))
    wanted = drafter if in_place else out or target.parent / f"{drafter.stem}-linked.gguf"
    refuse_in_store(wanted.parent, target, drafter)
    if in_place and drafter.is_symlink():
        raise MtpError(f"{drafter} is a link to {drafter.resolve()}; name that file, or write another one with -o.")
    if not in_place and wanted.resolve() in (drafter.resolve(), target.resolve()):
        raise MtpError(f"{wanted} is one of the two files; pass --in-place to replace the drafter, or another -o.")
    for _ in check_tensors(theirs):
        pass  # nothing damaged gets hashes that call it sound
    size = drafter.stat().st_size + sum(len(entry(key, value)) for key, value in values.items())
    with staging(wanted.parent, [wanted.name], size, force or in_place) as hidden:
        rewrite(theirs, values, hidden / wanted.name, progress)
        with writing(hidden / wanted.name):  # nothing else is read
            link.check(ours, seal(hidden / wanted.name))
            shutil.copymode(drafter, hidden / wanted.name)
    return wanted


def refuse_in_store(folder: Path, target: Path, drafter: Path) -> None:
    """Keep Ollama's store as it is: a file's name there is its hash, and what else lies there is removed.

    Raises:
        MtpError: the folder is a store's.
    """
    if is_store(folder):
        model = owner_of(target)
        command = f"gemma-mtp ollama attach {model or 'NAME'} --drafter {drafter}"
        raise MtpError(
            f"{folder} belongs to Ollama, and files there must stay as they are; run {command}, or write elsewhere: -o."
        )


def rewrite(header: Header, values: Mapping[str, Any], path: Path, progress: Progress) -> None:
    """Copy a GGUF file with more, or other, metadata; all the rest stays as it is, byte for byte.

    Args:
        header: of the file to copy.
        values: metadata to add or to replace, as `entry` takes it.
        path: file to write.
        progress: called with bytes written and bytes in all.
    """
    kept = [span for key, span in header.spans.items() if key not in values]
    more = counting(progress, header.path.stat().st_size - header.data_start)
    with reading(header.path), header.path.open("rb") as source, writing(path), path.open("xb") as file:

        def read(start: int, size: int) -> bytes:
            with reading(header.path):
                source.seek(start)
                return source.read(size)

        def copy(start: int, stop: int) -> None:
            file.write(read(start, stop - start))

        copy(0, 8)  # magic and version
        file.write(struct.pack("<QQ", len(header.tensors), len(kept) + len(values)))
        for start, stop in kept:
            copy(start, stop)
        for key, value in values.items():
            file.write(entry(key, value))
        copy(*header.tensor_table)
        file.write(b"\0" * (-file.tell() % header.alignment))
        done = header.data_start
        while piece := read(done, COPIED_AT_ONCE):
            file.write(piece)
            done += len(piece)
            more(len(piece))


def _ordered_head(drafter: Header, folder: Path) -> dict[str, Any]:
    """The ordered head of a Hugging Face folder as metadata, if that folder holds the weights of this drafter."""
    from gemma_mtp.convert import names
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.config import DrafterConfig
    from gemma_mtp.convert.metadata import ordered_head
    from gemma_mtp.convert.plan import plan

    with open_checkpoint(folder) as checkpoint:
        if not isinstance(checkpoint.config, DrafterConfig) or not checkpoint.config.ordered:
            raise PairError(f"{folder} is not a drafter with ordered embeddings; leave --ordered-from out.")
        plan(checkpoint.config, checkpoint.index, "F32")  # checks every tensor
        with drafter.path.open("rb") as file:
            for name, source in checkpoint.index.items():
                place = names.place(name)
                if place is None or len(source.shape) != 1:
                    continue
                tensor = drafter.tensors.get(place.gguf)
                file.seek(tensor.offset if tensor else 0)
                if tensor is None or file.read(tensor.size) != checkpoint.values(name).tobytes():
                    raise PairError(f"{folder} holds another drafter than {drafter.path}: {place.gguf} differs.")
        if len(drafter.vocabulary) != checkpoint.config.vocab_size:
            raise PairError(f"{folder} holds another drafter than {drafter.path}: the vocabulary differs in size.")
        return ordered_head(checkpoint)
