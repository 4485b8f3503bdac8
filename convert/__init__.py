"""Convert a Gemma 4 target and its MTP drafter from Hugging Face folders to two linked GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.link import MtpError, PairError

__all__ = ["MtpError", "Pair", "PairError", "convert_pair"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pair:
    """What `convert_pair` wrote."""

    target: Path
    drafter: Path
    modelfile: Path
    projector: Path | None = None


def convert_pair(
    target_dir: str | os.PathLike[str],
    drafter_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: str = "Q4_K_M",
    drafter_quant: str = "Q8_0",
    name: str | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    mmproj: str | None = None,
) -> Pair:
    """Write OUT/<name>-<quant>.gguf, its drafter beside it, and a Modelfile for both.

    Everything is decided and checked before the first byte is written, and the files appear when all are complete.

    Args:
        target_dir: Hugging Face folder of the target, or org/name[@revision] to download.
        drafter_dir: the same of its drafter, or "auto" for the one published for an official target.
        out: folder to write into; made if it is not there.
        quant: format of the target: F32, F16, BF16, Q8_0, Q4_0 or Q4_K_M.
        drafter_quant: format of the drafter.
        name: start of the file names; the names of the two folders unless given.
        force: replace files of the same names.
        progress: called with bytes written and bytes in all.
        mmproj: format of the projector, F16, BF16, F32 or Q8_0, if it is to be converted too.

    Raises:
        PairError: the two folders do not hold a target and its drafter.
        MtpError: an input is missing, damaged or not supported, an output is there already, or the disk is full.
    """
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.mmproj import plan_mmproj, write_mmproj
    from gemma_mtp.convert.modelfile import modelfile
    from gemma_mtp.convert.plan import check_pair, plan
    from gemma_mtp.convert.sources import AUTO, official_drafter, resolve
    from gemma_mtp.convert.staging import staging
    from gemma_mtp.convert.write import write

    folder = Path(out)
    source, other = os.fspath(target_dir), os.fspath(drafter_dir)
    folders = [resolve(source), resolve(official_drafter(source) if other == AUTO else other)]
    with open_checkpoint(folders[0]) as target, open_checkpoint(folders[1]) as drafter:
        check_pair(target.config, drafter.config)
        _same_tokens(target.folder, drafter.folder)
        plans = [plan(target.config, target.index, quant), plan(drafter.config, drafter.index, drafter_quant)]
        stem, drafter_stem = _stems(target.folder, drafter.folder, name)
        files = [f"{stem}-{quant}.gguf", f"{drafter_stem}-{drafter_quant}.gguf"]
        projector = f"mmproj-{stem}-{mmproj}.gguf" if mmproj else None
        encoders = plan_mmproj(target.folder, mmproj)[1] if mmproj else []
        total = sum(each.n_bytes for each in plans) + sum(each.n_bytes for each in encoders)
        source = target.fingerprint()
        common = {link.KEY_VERSION: link.VERSION}
        links: list[dict[str, Any]] = [
            {**common, link.KEY_ROLE: "target", link.KEY_SOURCE: source, link.KEY_PEER: files[1]},
            {**common, link.KEY_ROLE: "drafter", link.KEY_SOURCE: drafter.fingerprint(), link.KEY_PEER: files[0],
             link.KEY_TARGET: source},
        ]  # fmt: skip
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            progress(done, total)

        with staging(folder, [*files, *([projector] if projector else []), "Modelfile"], total, force) as hidden:
            for checkpoint, each, file, tied in zip((target, drafter), plans, files, links, strict=True):
                write(each, checkpoint, hidden / file, tied, count)
            link.check(link.read_header(hidden / files[0]), link.read_header(hidden / files[1]))
            if projector and mmproj:
                write_mmproj(target.folder, hidden / projector, mmproj, count)
            text = modelfile(files[0], files[1], target.generation, projector)
            (hidden / "Modelfile").write_text(text, encoding="utf-8")
    found = folder / projector if projector else None
    return Pair(folder / files[0], folder / files[1], folder / "Modelfile", found)


def _stems(target: Path, drafter: Path, name: str | None) -> tuple[str, str]:
    from gemma_mtp.convert.sources import name_of

    if name is not None:
        if Path(name).name != name:
            raise MtpError(f"the name {name!r} is not a plain file name.")
        return name, f"{name}-assistant"
    first, second = name_of(target), name_of(drafter)
    return first, f"{second}-assistant" if second == first else second


def _same_tokens(target: Path, drafter: Path) -> None:
    from gemma_mtp.convert.vocab import Vocabulary

    ours, theirs = Vocabulary(target).tokens, Vocabulary(drafter).tokens
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            raise PairError(
                f"the drafter is of another target: token {place} is {one!r} in {target}, {other!r} in {drafter}; "
                "pass the drafter published for this target."
            )
