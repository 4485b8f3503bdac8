"""Which drafter belongs to a target, decided before llama.cpp sees either file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_mtp.convert import link

if TYPE_CHECKING:
    from gemma_mtp.runtime.llama import Llama

Wanted = str | PathLike[str] | Literal["auto"] | None


def resolve(target: str | PathLike[str], drafter: Wanted) -> Path | None:
    """The drafter to load with a target, its link checked.

    Args:
        target: GGUF file of the target.
        drafter: "auto" for the linked drafter in the target's folder, if there is one; a path for that file; None for
            none.

    Raises:
        gemma_mtp.convert.link.MtpError: the file named does not exist, is not a GGUF file, or is not the target's.
    """
    if drafter is None or not Path(target).exists():
        return None  # a missing target is for llama_cpp.Llama to report, in its own words
    header = link.read_header(Path(target))
    if header.arch == link.DRAFTER_ARCH:
        raise link.PairError(
            f"{target} is a drafter; it cannot run alone. Pass its target's GGUF file: the drafter is found by itself."
        )
    path = link.find_drafter(Path(target), header) if drafter == "auto" else Path(drafter)
    if path is not None:
        link.check(header, link.read_header(path))
    return path


@contextmanager
def open_pair(target: str | PathLike[str], drafter: Wanted = "auto", **options: Any) -> Iterator[Llama]:
    """Open a target with its drafter, and close both at the end; a missing drafter is an error here.

    Args:
        target: GGUF file of the target.
        drafter: as for `resolve`.
        options: arguments of `Llama`.

    Raises:
        gemma_mtp.convert.link.MtpError: there is no drafter, or not of this target.
    """
    from gemma_mtp.runtime.llama import Llama  # llama.py needs this module

    path = resolve(target, drafter)
    if path is None and drafter is not None and Path(target).exists():
        raise link.PairError(f"no linked drafter beside {target}; name one with drafter=, or convert the pair again.")
    with closing(Llama(str(target), drafter=path, **options)) as llm:
        yield llm
