"""Two checkpoints -> plans -> files that appear together."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError, MtpWarning
from gemma_mtp.convert.progress import Progress, counting

if TYPE_CHECKING:
    from gemma_mtp.convert.checkpoint import Checkpoint
    from gemma_mtp.convert.gguf_io.split import Part
    from gemma_mtp.convert.imatrix import Imatrix
    from gemma_mtp.convert.metadata import Headers
    from gemma_mtp.convert.mmproj import ProjectorPlan
    from gemma_mtp.convert.plan import Plan, Planned
    from gemma_mtp.convert.tensor_types import Options
    from gemma_mtp.convert.write import Output


Folder = str | os.PathLike[str]
# What a drafter does with tokens that its target has and it has not.
KEEP, EXTEND = "keep", "extend"


class Content(NamedTuple):
    """What a file holds: its role, "" if another part of it says so; ggml type to number of tensors, most first."""

    role: str
    types: Mapping[str, int]


@dataclass(frozen=True)
class Pair:
    """What `convert_pair` wrote: the first of the targets and of the drafters, their Modelfile, and all GGUF files.

    `contents` says of each of these what it holds.
    """

    target: Path
    drafter: Path
    modelfile: Path
    files: tuple[Path, ...] = ()
    projector: Path | None = None
    contents: Mapping[Path, Content] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class PairPlan:
    """What `convert_pair` would write: file name to plan, for each role, and the file name and plan of the projector.

    `parts` has for each of these names the files that it becomes, several if it is split; `headers` are what the files
    of the target and of the drafter begin with, `modelfile` is the text of the Modelfile.
    """

    targets: Mapping[str, Plan]
    drafters: Mapping[str, Plan]
    parts: Mapping[str, Sequence[Part[Planned]]]
    headers: tuple[Headers, Headers] = field(repr=False, compare=False)
    projector: tuple[str, ProjectorPlan] | None = None
    modelfile: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """All names of GGUF files, split ones by their parts."""
        pair = [part.file for parts in self.parts.values() for part in parts]
        return (*pair, *((self.projector[0],) if self.projector else ()))

    @property
    def first(self) -> tuple[str, str]:
        """The files that a user names to load the first target and the first drafter."""
        target, drafter = (self.parts[next(iter(plans))][0].file for plans in (self.targets, self.drafters))
        return target, drafter

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        pair = sum(each.n_bytes for each in (*self.targets.values(), *self.drafters.values()))
        return pair + (self.projector[1].n_bytes if self.projector else 0)


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
    drafter_vocab: str = KEEP,
) -> Pair:
    """Write OUT/<name>-<quant>.gguf, its drafter beside it, and a Modelfile for both.

    Everything is decided and checked before the first byte is written, and the files appear when all are complete.

    Args:
        target_dir: Hugging Face folder of the target, or org/name[@revision] to download.
        drafter_dir: the same of its drafter, or "auto" for the one published for an official target.
        out: folder to write into; made if it is not there.
        quant: format of the target, a key of `tensor_types.QUANTS`, or several; the source is read once for all.
        drafter_quant: format of the drafter, or several. The Modelfile names the first of each.
        name: start of the file names, and general.name; the names of the two folders unless given.
        force: replace files of the same names.
        progress: called with bytes written and bytes in all.
        options: types of the target's tensors, otherwise than the format has them; whether the pair is one of QAT.
        imatrix: file with the importance matrix of the target.
        split_max_size: bytes of tensors that a file holds at most; larger models are split as llama.cpp splits them.
        mmproj: format of the projector, F16, BF16, F32 or Q8_0, if it is to be converted too.
        allow_unknown: keys of config.json that are let pass although they may change the model, and of tokenizer.json.
        drafter_vocab: "extend" gives a drafter the tokens that were added to its target; "keep" refuses such a pair.

    Raises:
        PairError: the two folders do not hold a target and its drafter.
        MtpError: an input is missing, damaged or not supported, an output is there already, or the disk is full.
    """
    from gemma_mtp.convert.files import write_small
    from gemma_mtp.convert.mmproj import write_mmproj
    from gemma_mtp.convert.staging import staging
    from gemma_mtp.convert.write import write

    folder = Path(out)
    with _open_pair(target_dir, drafter_dir, allowed=allow_unknown) as (target, drafter):
        weights = _imatrix(imatrix)
        _agree(target, drafter, drafter_vocab)
        plans = _plan(target, drafter, quant, drafter_quant, name, options, weights is not None, split_max_size, mmproj)
        links = link.entries(plans.first, target.fingerprint(), drafter.fingerprint())
        qat = options is not None and options.qat
        more = counting(progress, plans.n_bytes)
        with staging(folder, [*plans.files, "Modelfile"], plans.n_bytes, force) as hidden:
            write(_outputs(plans, plans.targets, hidden, links[0], weights, qat), target, plans.headers[0], more)
            weighed = {link.KEY_WEIGHTS: link.weights_identity(link.read_header(hidden / plans.first[0]))}
            outputs = _outputs(plans, plans.drafters, hidden, links[1] | weighed, None, qat)
            write(outputs, drafter, plans.headers[1], more)
            link.check(*(link.read_header(hidden / file) for file in plans.first))
            if plans.projector:
                write_mmproj(plans.projector[1], target, hidden / plans.projector[0], more)
            write_small(hidden / "Modelfile", plans.modelfile)
    return _written_pair(folder, plans)


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
    drafter_vocab: str = KEEP,
) -> PairPlan:
    """What `convert_pair` with the same arguments would write; raises what it raises.

    Of weights only the headers, output matrices and ordered heads are read, and of repositories that are not in the
    cache only the headers are downloaded.
    """
    with _open_pair(target_dir, drafter_dir, True, allow_unknown) as (target, drafter):
        weights = _imatrix(imatrix)
        _agree(target, drafter, drafter_vocab)
        return _plan(target, drafter, quant, drafter_quant, name, options, weights is not None, split_max_size, mmproj)


@contextmanager
def checked_pair(target_dir: Folder, drafter_dir: Folder) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints of a pair that could be converted; of weights that are not there only the headers are fetched.

    Raises what `plan_pair` raises. What a conversion would leave out is not said: whoever loads the folders reads it.
    """
    with ExitStack() as files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MtpWarning)
            target, drafter = files.enter_context(_open_pair(target_dir, drafter_dir, headers=True))
            _agree(target, drafter, KEEP)
            _plan(target, drafter, "BF16", "BF16", None, None, False, None, None)
        yield target, drafter


def _written_pair(folder: Path, plans: PairPlan) -> Pair:
    """What stands in a folder after all of a plan was written."""
    target, drafter = (folder / file for file in plans.first)
    contents = {
        folder / part.file: Content("" if part.index else role, type_counts(part.tensors))
        for role, plan in (("target", plans.targets), ("drafter", plans.drafters))
        for file in plan
        for part in plans.parts[file]
    }
    projector = None
    if plans.projector:
        projector = folder / plans.projector[0]
        contents[projector] = Content("projector", type_counts(plans.projector[1].tensors))
    return Pair(target, drafter, folder / "Modelfile", tuple(contents), projector, contents)


def type_counts(tensors: Iterable[Any]) -> dict[str, int]:
    """Name of a ggml type to the number of tensors that are of it, most first."""
    return dict(Counter(tensor.type.name for tensor in tensors).most_common())


@contextmanager
def _open_pair(
    target: Folder, drafter: Folder, headers: bool = False, allowed: Collection[str] = ()
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints, downloaded if they are not there; on request no more of their weights than the headers."""
    from gemma_mtp.convert.checkpoint import open_checkpoint
    from gemma_mtp.convert.hub import AUTO_DRAFTER, fetch_checkpoint, fetch_headers, official_drafter

    source, other = os.fspath(target), os.fspath(drafter)
    sources = source, official_drafter(source) if other == AUTO_DRAFTER else other
    with ExitStack() as files:
        found = [fetch_headers(each, files) if headers else (fetch_checkpoint(each), True) for each in sources]
        opened = [files.enter_context(open_checkpoint(folder, allowed, whole)) for folder, whole in found]
        yield opened[0], opened[1]


def _imatrix(path: Folder | None) -> Imatrix | None:
    from gemma_mtp.convert.imatrix import read_imatrix

    return None if path is None else read_imatrix(Path(path))


def _plan(
    target: Checkpoint, drafter: Checkpoint, quant: str | Sequence[str], drafter_quant: str | Sequence[str],
    name: str | None, options: Options | None, imatrix: bool, split_max_size: int | None, mmproj: str | None,
) -> PairPlan:  # fmt: skip
    from gemma_mtp.convert import naming, tensor_types
    from gemma_mtp.convert.gguf_io.split import cut
    from gemma_mtp.convert.metadata import Headers
    from gemma_mtp.convert.modelfile import modelfile, renderer
    from gemma_mtp.convert.plan import plan

    chosen = replace(options or tensor_types.DEFAULT, imatrix=imatrix)
    found: list[dict[str, Plan]] = []
    stems = naming.stems(target.folder, drafter.folder, name)
    target.called, drafter.called = (None, None) if name is None else stems
    for checkpoint, stem, quants, wanted in (
        (target, stems[0], quant, chosen),
        (drafter, stems[1], drafter_quant, tensor_types.DEFAULT),
    ):
        keys = [tensor_types.find_quant(each) for each in ([quants] if isinstance(quants, str) else quants)]
        found.append({f"{stem}-{key}.gguf": plan(checkpoint.config, checkpoint.index, key, wanted) for key in keys})
    parts = {
        file: cut(file.removesuffix(".gguf"), each.tensors, split_max_size)
        for plans in found
        for file, each in plans.items()
    }
    projector = None
    if mmproj:
        from gemma_mtp.convert.mmproj import plan_mmproj

        projector = f"mmproj-{stems[0]}-{mmproj}.gguf", plan_mmproj(target, mmproj)
    headers = [Headers(each, next(iter(plans.values()))) for each, plans in zip((target, drafter), found, strict=True)]
    planned = PairPlan(found[0], found[1], parts, (headers[0], headers[1]), projector)
    naming.check_names(planned.files)
    targets, drafters = ([part.file for part in parts[next(iter(plans))]] for plans in found)
    per_layer = target.config.per_layer_input
    encoders = projector[0] if projector else None
    text = modelfile(targets, drafters, target.generation, renderer(per_layer), encoders)
    return replace(planned, modelfile=text)


def _outputs(
    plans: PairPlan, role: Mapping[str, Plan], folder: Path, tied: Mapping[str, Any], imatrix: Imatrix | None, qat: bool
) -> list[Output]:
    from gemma_mtp.convert.write import Output

    return [Output(each, folder, plans.parts[file], tied, imatrix, qat) for file, each in role.items()]


def _agree(target: Checkpoint, drafter: Checkpoint, vocab: str) -> None:
    """Check that two checkpoints are a pair, of one vocabulary; if wanted, the drafter takes its target's."""
    from gemma_mtp.convert.plan import check_pair, check_roles
    from gemma_mtp.convert.shared_vocab import agree

    if vocab not in (KEEP, EXTEND):
        raise MtpError(f"unknown drafter vocabulary {vocab!r}; choose {KEEP} or {EXTEND}.")
    check_roles(target.config, drafter.config)
    agree(target, drafter, vocab == EXTEND)
    check_pair(target.config, drafter.config)
