"""Two checkpoints -> plans -> files that appear together."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.convert import link
from gemma_mtp.convert.link import MtpError, PairError

if TYPE_CHECKING:
    from gemma_mtp.convert.checkpoint import Checkpoint
    from gemma_mtp.convert.imatrix import Imatrix
    from gemma_mtp.convert.plan import Plan
    from gemma_mtp.convert.tensor_types import Options


Progress = Callable[[int, int], None]
Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Pair:
    """What `convert_pair` wrote: the first of the targets and of the drafters, their Modelfile, and all GGUF files."""

    target: Path
    drafter: Path
    modelfile: Path
    files: tuple[Path, ...] = ()
    projector: Path | None = None


@dataclass(frozen=True)
class PairPlan:
    """What `convert_pair` would write: file name to plan, for each role, and the file name and bytes of the projector.

    `files` has them all, split ones by their parts.
    """

    targets: Mapping[str, Plan]
    drafters: Mapping[str, Plan]
    files: tuple[str, ...]
    projector: tuple[str, int] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        pair = sum(each.n_bytes for each in (*self.targets.values(), *self.drafters.values()))
        return pair + (self.projector[1] if self.projector else 0)


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
    mmproj: str | None = None,
    allow_unknown: Collection[str] = (),
) -> Pair:
    """Write OUT/<name>-<quant>.gguf, its drafter beside it, and a Modelfile for both.

    Everything is decided and checked before the first byte is written, and the files appear when all are complete.

    Args:
        target_dir: Hugging Face folder of the target, or org/name[@revision] to download.
        drafter_dir: the same of its drafter, or "auto" for the one published for an official target.
        out: folder to write into; made if it is not there.
        quant: format of the target, a key of `tensor_types.QUANTS`, or several; the source is read once for all.
        drafter_quant: format of the drafter, or several. The Modelfile names the first of each.
        name: start of the file names; the names of the two folders unless given.
        force: replace files of the same names.
        progress: called with bytes written and bytes in all.
        options: types of the target's tensors, otherwise than the format has them; whether the pair is one of QAT.
        imatrix: file with the importance matrix of the target.
        split_max_size: bytes of tensors that a file holds at most; larger models are split as llama.cpp splits them.
        mmproj: format of the projector, F16, BF16, F32 or Q8_0, if it is to be converted too.
        allow_unknown: keys of config.json that are let pass although they may change the model.

    Raises:
        PairError: the two folders do not hold a target and its drafter.
        MtpError: an input is missing, damaged or not supported, an output is there already, or the disk is full.
    """
    from gemma_mtp.convert.modelfile import modelfile
    from gemma_mtp.convert.staging import staging
    from gemma_mtp.convert.write import write

    folder = Path(out)
    with _open_pair(target_dir, drafter_dir, allowed=allow_unknown) as (target, drafter):
        weights = _imatrix(imatrix)
        plans = _plan(target, drafter, quant, drafter_quant, name, options, weights is not None, split_max_size, mmproj)
        first = plan_file(plans.files, plans.targets), plan_file(plans.files, plans.drafters)
        projector = plans.projector[0] if plans.projector else None
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

        with staging(folder, [*plans.files, "Modelfile"], plans.n_bytes, force) as hidden:
            roles = (target, plans.targets, links[0], weights), (drafter, plans.drafters, links[1], None)
            for checkpoint, each, tied, matrix in roles:
                written = _outputs(hidden, each, tied, matrix, split_max_size, options is not None and options.qat)
                write(written, checkpoint, count)
            link.check(link.read_header(hidden / first[0]), link.read_header(hidden / first[1]))
            if projector and mmproj:
                from gemma_mtp.convert.mmproj import write_mmproj

                write_mmproj(target.folder, hidden / projector, mmproj, count)
            text = modelfile(*first, target.generation, projector)
            (hidden / "Modelfile").write_text(text, encoding="utf-8")
    files = tuple(folder / file for file in plans.files)
    found = folder / projector if projector else None
    return Pair(folder / first[0], folder / first[1], folder / "Modelfile", files, found)


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
    mmproj: str | None = None,
    allow_unknown: Collection[str] = (),
) -> PairPlan:
    """What `convert_pair` with the same arguments would write; raises what it raises.

    Of weights only the headers are read, and of repositories that are not in the cache only those are downloaded.
    """
    with _open_pair(target_dir, drafter_dir, True, allow_unknown) as (target, drafter):
        weights = _imatrix(imatrix)
        return _plan(target, drafter, quant, drafter_quant, name, options, weights is not None, split_max_size, mmproj)


@contextmanager
def checked_pair(target_dir: Folder, drafter_dir: Folder) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints of a pair that could be converted; of weights that are not there only the headers are fetched.

    Raises what `plan_pair` raises.
    """
    with _open_pair(target_dir, drafter_dir, headers=True) as (target, drafter):
        _plan(target, drafter, "BF16", "BF16", None, None, False, None, None)
        yield target, drafter


def plan_file(files: Sequence[str], plans: Mapping[str, Plan]) -> str:
    """The file that a user names to load the first of some plans: its first part if it is split."""
    stem = next(iter(plans)).removesuffix(".gguf")
    return next(file for file in files if file == f"{stem}.gguf" or file.startswith(f"{stem}-00001-of-"))


@contextmanager
def _open_pair(
    target: Folder, drafter: Folder, headers: bool = False, allowed: Collection[str] = ()
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints, downloaded if they are not there; on request no more of their weights than the headers."""
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.hub import AUTO, official_drafter, resolve, resolve_headers

    source, other = os.fspath(target), os.fspath(drafter)
    sources = source, official_drafter(source) if other == AUTO else other
    with ExitStack() as files:
        first, second = [resolve_headers(each, files) if headers else resolve(each) for each in sources]
        opened = [files.enter_context(open_checkpoint(each, allowed)) for each in (first, second)]
        yield opened[0], opened[1]


def _imatrix(path: Folder | None) -> Imatrix | None:
    from gemma_mtp.convert.imatrix import read_imatrix

    return None if path is None else read_imatrix(Path(path))


def _plan(
    target: Checkpoint, drafter: Checkpoint, quant: str | Sequence[str], drafter_quant: str | Sequence[str],
    name: str | None, options: Options | None, imatrix: bool, split_max_size: int | None, mmproj: str | None,
) -> PairPlan:  # fmt: skip
    from gemma_mtp.convert import tensor_types
    from gemma_mtp.convert.plan import check_pair, parts, plan

    check_pair(target.config, drafter.config)
    _same_tokens(target.folder, drafter.folder)
    chosen = replace(options or tensor_types.DEFAULT, imatrix=imatrix)
    found: list[dict[str, Plan]] = []
    stems = _stems(target.folder, drafter.folder, name)
    for checkpoint, stem, quants, wanted in (
        (target, stems[0], quant, chosen),
        (drafter, stems[1], drafter_quant, tensor_types.DEFAULT),
    ):
        keys = [tensor_types.find_quant(each) for each in ([quants] if isinstance(quants, str) else quants)]
        found.append({f"{stem}-{key}.gguf": plan(checkpoint.config, checkpoint.index, key, wanted) for key in keys})
    files = [
        path.name
        for plans in found
        for file, each in plans.items()
        for path, _ in parts(each, Path(file), split_max_size)
    ]
    projector = None
    if mmproj:
        from gemma_mtp.convert.mmproj import plan_mmproj

        n_bytes = sum(tensor.n_bytes for tensor in plan_mmproj(target.folder, mmproj)[1])
        projector = f"mmproj-{stems[0]}-{mmproj}.gguf", n_bytes
        files.append(projector[0])
    return PairPlan(found[0], found[1], tuple(files), projector)


def _outputs(
    folder: Path, plans: Mapping[str, Plan], tied: Mapping[str, Any], imatrix: Imatrix | None, most: int | None,
    qat: bool,
) -> list[Any]:  # fmt: skip
    from gemma_mtp.convert.write import Output

    return [Output(each, folder / file, tied, imatrix, most, qat) for file, each in plans.items()]


def _stems(target: Path, drafter: Path, name: str | None) -> tuple[str, str]:
    from gemma_mtp.convert.hub import name_of

    if name is not None:
        if Path(name).name != name:
            raise MtpError(f"the name {name!r} is not a plain file name.")
        return name, f"{name}-assistant"
    first, second = name_of(target), name_of(drafter)
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
