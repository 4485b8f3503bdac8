"""Which drafter and which projector belong to a target, decided before llama.cpp sees the files."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from gemma_mtp.convert import link

Wanted = str | PathLike[str] | Literal["auto"] | None


def named(target: str | PathLike[str], drafter: Wanted) -> tuple[str | PathLike[str], Wanted]:
    """A target's file, and the drafter wanted with it; of a model of Ollama's store its files.

    Args:
        target: a GGUF file, a folder with one target such as a conversion writes, or the name of a model of Ollama. A
            file or folder that exists comes first.
        drafter: as for `drafter_of`; of a model "auto" is the drafter that it has, if it has one.

    Raises:
        gemma_mtp.convert.link.MtpError: it is none of these, or its files cannot be read.
    """
    if Path(target).is_dir():
        return target_in(Path(target)), drafter
    if Path(target).exists():
        return target, drafter
    model = link.find_model(str(target))
    if model is None:
        raise link.MtpError(link.what_it_is_not(str(target)))
    return model.target, model.drafter or drafter if drafter == "auto" else drafter


def target_in(folder: Path) -> Path:
    """The target in a folder; of a split, its first part.

    Raises:
        gemma_mtp.convert.link.MtpError: there is none, or more than one, or a file is damaged.
    """
    headers = [link.read_header(path) for path in link.gguf_files(folder)]
    targets = [each.path for each in headers if each.arch == link.TARGET_ARCH and not each.metadata.get("split.no")]
    if len(targets) != 1:
        listed = ", ".join(path.name for path in targets) or "none"
        raise link.MtpError(f"{folder} must hold one target, it holds: {listed}; name the file.")
    return targets[0]


def drafter_of(target: str | PathLike[str], drafter: Wanted) -> Path | None:
    """The drafter to load with a target, its link checked.

    Args:
        target: GGUF file of the target.
        drafter: "auto" for the linked drafter beside the target, if there is one (`link.find_drafter` says where that
            is); a path for that file; None for none.

    Raises:
        gemma_mtp.convert.link.MtpError: the file named does not exist, is not a GGUF file, or is not the target's.
    """
    return searched(target, drafter)[0]


def searched(target: str | PathLike[str], drafter: Wanted) -> tuple[Path | None, str | None]:
    """As `drafter_of`, and why there is none, if one was to be found: a sentence without its stop.

    Raises:
        gemma_mtp.convert.link.MtpError: also where the target is no first part of a split, or a part of it is missing
            or of another conversion.
    """
    path = Path(target)
    if not path.exists():
        return None, None  # a missing target is for llama_cpp.Llama to report, in its own words
    if drafter is None:
        if link.is_part(path):
            link.read_parts(link.read_header(path))
        return None, None
    header = link.read_header(path)
    link.read_parts(header)
    if header.arch == link.DRAFTER_ARCH:
        raise link.PairError(
            f"{target} is a drafter; it cannot run alone. Pass its target's GGUF file: the drafter is found by itself."
        )
    found = link.find_drafter(path, header) if drafter == "auto" else Path(drafter)
    if found is None:
        return None, link.why_no_drafter(path, header)
    theirs = link.read_header(found)
    link.check(header, theirs)
    link.read_parts(theirs)
    return found, None


def projector_of(target: str | PathLike[str], header: link.Header, projector: Wanted) -> Path | None:
    """The projector that reads images and sound for a target, if there is one.

    Args:
        target: what the target was asked for by, as for `named`.
        header: of its file.
        projector: "auto" for the one of Ollama's model, or beside the target (`link.find_projector`); a path for that
            file; None for none.

    Raises:
        gemma_mtp.convert.link.MtpError: the file named does not exist, is no projector, or not of the target's width.
    """
    if projector == "auto":
        model = None if Path(target).exists() else link.find_model(str(target))
        theirs = next(iter(model.projectors), None) if model else None
        return theirs or link.find_projector(header.path, header)
    if projector is None:
        return None
    link.check_projector(header, link.read_header(Path(projector)))
    return Path(projector)


def fetch_drafter(target: Path, given: Mapping[str, Any]) -> None:
    """Download the drafter that a target names, from the target's repository into the target's folder.

    Args:
        target: file of the target.
        given: arguments of llama_cpp.Llama.from_pretrained that it came with.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    header = link.read_header(target)
    peer = Path(str(header.metadata.get(link.KEY_PEER, ""))).name
    if not peer or header.arch != link.TARGET_ARCH or (target.parent / peer).exists():
        return
    # In the Hub's cache a file lies at snapshots/REVISION/its path in the repository.
    parts = target.parent.parts
    inside = parts[parts.index("snapshots") + 2 :] if given["local_dir"] is None and "snapshots" in parts else ()
    try:
        hf_hub_download(
            repo_id=given["repo_id"],
            filename=peer,
            subfolder="/".join(inside) or None,
            local_dir=given["local_dir"],
            cache_dir=given["cache_dir"],
        )
    except EntryNotFoundError:
        return  # a repository without it: the target runs alone
