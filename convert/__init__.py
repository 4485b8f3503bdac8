"""Convert a Gemma 4 target and its MTP drafter from Hugging Face folders to two linked GGUF files."""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.convert import link
from gemma_mtp.convert.link import MtpError, PairError

if TYPE_CHECKING:
    from gemma_mtp.convert.checkpoint import Checkpoint
    from gemma_mtp.convert.imatrix import Imatrix
    from gemma_mtp.convert.plan import Plan
    from gemma_mtp.convert.recipe import Options

__all__ = ["MtpError", "Pair", "PairError", "PairPlan", "convert_pair", "plan_pair"]

Progress = Callable[[int, int], None]
Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Pair:
    """What `convert_pair` wrote: the first of the targets and of the drafters, the Modelfile of both, and all files."""

    target: Path
    drafter: Path
    modelfile: Path
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PairPlan:
    """What `convert_pair` would write: file name to plan, for each role; `files` with the parts of split ones."""

    targets: Mapping[str, Plan]
    drafters: Mapping[str, Plan]
    files: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.n_bytes for each in (*self.targets.values(), *self.drafters.values()))


def convert_pair(
    target_dir: Folder,
    drafter_dir: Folder,
    out: Folder,
    quant: str | Sequence[str] = "Q4_K_M",
    drafter_quant: str | Sequence[str] = "Q8_0",
    name: str | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    *,
    options: Options | None = None,
    imatrix: Folder | None = None,
    split_max_size: int | None = None,
) -> Pair:
    """Write OUT/<name>-<quant>.gguf, its drafter beside it, and a Modelfile for both.

    Everything is decided and checked before the first byte is written, and the files appear when all are complete.

    Args:
        target_dir: Hugging Face folder of the target.
        drafter_dir: Hugging Face folder of its drafter.
        out: folder to write into; made if it is not there.
        quant: format of the target, a key of `recipe.QUANTS`, or several; the source is read once for all.
        drafter_quant: format of the drafter, or several. The Modelfile names the first of each.
        name: start of the file names; the names of the two folders unless given.
        force: replace files of the same names.
        progress: called with bytes written and bytes in all.
        options: types of the target's tensors, otherwise than the format has them.
        imatrix: file with the importance matrix of the target.
        split_max_size: bytes of tensors that a file holds at most; larger models are split as llama.cpp splits them.

    Raises:
        PairError: the two folders do not hold a target and its drafter.
        MtpError: an input is missing, damaged or not supported, an output is there already, or the disk is full.
    """
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.modelfile import modelfile
    from gemma_mtp.convert.write import write

    folder = Path(out)
    with open_checkpoint(Path(target_dir)) as target, open_checkpoint(Path(drafter_dir)) as drafter:
        weights = _imatrix(imatrix)
        plans = _plan(target, drafter, quant, drafter_quant, name, options, weights is not None, split_max_size)
        first = plan_file(plans.files, plans.targets), plan_file(plans.files, plans.drafters)
        source = target.fingerprint()
        common = {link.KEY_VERSION: link.VERSION}
        links: list[dict[str, Any]] = [
            {**common, link.KEY_ROLE: "target", link.KEY_SOURCE: source, link.KEY_PEER: first[1]},
            {**common, link.KEY_ROLE: "drafter", link.KEY_SOURCE: drafter.fingerprint(), link.KEY_PEER: first[0],
             link.KEY_TARGET: source},
        ]  # fmt: skip
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            progress(done, plans.n_bytes)

        with _all_or_nothing(folder, [*plans.files, "Modelfile"], plans.n_bytes, force) as hidden:
            roles = (target, plans.targets, links[0], weights), (drafter, plans.drafters, links[1], None)
            for checkpoint, each, tied, matrix in roles:
                write(_outputs(hidden, each, tied, matrix, split_max_size), checkpoint, count)
            link.check(link.read_header(hidden / first[0]), link.read_header(hidden / first[1]))
            (hidden / "Modelfile").write_text(modelfile(*first, target.generation), encoding="utf-8")
    files = tuple(folder / file for file in plans.files)
    return Pair(folder / first[0], folder / first[1], folder / "Modelfile", files)


def plan_pair(
    target_dir: Folder,
    drafter_dir: Folder,
    quant: str | Sequence[str] = "Q4_K_M",
    drafter_quant: str | Sequence[str] = "Q8_0",
    name: str | None = None,
    *,
    options: Options | None = None,
    imatrix: Folder | None = None,
    split_max_size: int | None = None,
) -> PairPlan:
    """What `convert_pair` with the same arguments would write, from headers alone; raises what it raises."""
    from gemma_mtp.convert.checkpoint import open_checkpoint

    with open_checkpoint(Path(target_dir)) as target, open_checkpoint(Path(drafter_dir)) as drafter:
        weights = _imatrix(imatrix)
        return _plan(target, drafter, quant, drafter_quant, name, options, weights is not None, split_max_size)


def plan_file(files: Sequence[str], plans: Mapping[str, Plan]) -> str:
    """The file that a user names to load the first of some plans: its first part if it is split."""
    stem = next(iter(plans)).removesuffix(".gguf")
    return next(file for file in files if file == f"{stem}.gguf" or file.startswith(f"{stem}-00001-of-"))


def _imatrix(path: Folder | None) -> Imatrix | None:
    from gemma_mtp.convert.imatrix import read_imatrix

    return None if path is None else read_imatrix(Path(path))


def _plan(
    target: Checkpoint, drafter: Checkpoint, quant: str | Sequence[str], drafter_quant: str | Sequence[str],
    name: str | None, options: Options | None, imatrix: bool, split_max_size: int | None,
) -> PairPlan:  # fmt: skip
    from gemma_mtp.convert import recipe
    from gemma_mtp.convert.plan import check_pair, parts, plan

    check_pair(target.config, drafter.config)
    _same_tokens(target.folder, drafter.folder)
    chosen = replace(options or recipe.DEFAULT, imatrix=imatrix)
    found: list[dict[str, Plan]] = []
    stems = _stems(target.folder, drafter.folder, name)
    for checkpoint, stem, quants, wanted in (
        (target, stems[0], quant, chosen),
        (drafter, stems[1], drafter_quant, recipe.DEFAULT),
    ):
        keys = [recipe.find_quant(each) for each in ([quants] if isinstance(quants, str) else quants)]
        found.append({f"{stem}-{key}.gguf": plan(checkpoint.config, checkpoint.index, key, wanted) for key in keys})
    files = [
        path.name
        for plans in found
        for file, each in plans.items()
        for path, _ in parts(each, Path(file), split_max_size)
    ]
    return PairPlan(found[0], found[1], tuple(files))


def _outputs(
    folder: Path, plans: Mapping[str, Plan], tied: Mapping[str, Any], imatrix: Imatrix | None, most: int | None
) -> list[Any]:
    from gemma_mtp.convert.write import Output

    return [Output(each, folder / file, tied, imatrix, most) for file, each in plans.items()]


def _stems(target: Path, drafter: Path, name: str | None) -> tuple[str, str]:
    if name is not None:
        if Path(name).name != name:
            raise MtpError(f"the name {name!r} is not a plain file name.")
        return name, f"{name}-assistant"
    first, second = target.resolve().name, drafter.resolve().name
    return first, f"{second}-assistant" if second == first else second


def _same_tokens(target: Path, drafter: Path) -> None:
    from gemma_mtp.convert.vocab import Vocabulary

    one, other = (folder / "tokenizer.json" for folder in (target, drafter))
    if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
        return
    ours, theirs = Vocabulary(target).tokens, Vocabulary(drafter).tokens
    for place, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            raise PairError(
                f"the drafter is of another target: token {place} is {left!r} in {target}, {right!r} in {drafter}; "
                "pass the drafter published for this target."
            )


@contextmanager
def _all_or_nothing(folder: Path, names: list[str], n_bytes: int, force: bool) -> Iterator[Path]:
    """A hidden folder whose files move to `folder` at the end, or are gone again if anything goes wrong."""
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise MtpError(f"{folder} already holds {', '.join(there)}; choose another folder, or pass --force to replace.")
    made = not folder.exists()
    hidden: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            raise MtpError(f"{folder}: {n_bytes / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free; make room.")
        hidden = Path(tempfile.mkdtemp(prefix=".gemma-mtp-", dir=folder))
        yield hidden
        for name in names:
            (hidden / name).replace(folder / name)
        made = False
    except OSError as problem:
        raise MtpError(f"cannot write into {folder}: {problem.strerror}; make room or choose another folder.") from None
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
