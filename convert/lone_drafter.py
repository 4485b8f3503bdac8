"""A drafter converted alone, for a target that is there as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_mtp.convert import link, naming
from gemma_mtp.convert.checkpoint import Checkpoint, open_checkpoint
from gemma_mtp.convert.config import DrafterConfig
from gemma_mtp.convert.errors import PairError
from gemma_mtp.convert.gguf_io.split import cut
from gemma_mtp.convert.hub import fetch_checkpoint
from gemma_mtp.convert.metadata import Headers
from gemma_mtp.convert.plan import plan
from gemma_mtp.convert.progress import Progress, counting
from gemma_mtp.convert.staging import staging
from gemma_mtp.convert.tensor_types import DEFAULT, find_quant
from gemma_mtp.convert.write import Output, write


def convert_drafter(
    source: str, target: link.Header, out: Path, quant: str, progress: Progress = lambda done, total: None
) -> Path:
    """Write a drafter that is linked to a target's file.

    Args:
        source: Hugging Face folder of the drafter, or org/name[@revision] to download.
        target: header of the target's file, of the first if it is split.
        out: folder to write into.
        quant: format of the drafter.
        progress: called with bytes written and bytes in all.

    Returns:
        The file.

    Raises:
        PairError: the source holds no drafter, or one that does not fit the target.
        MtpError: the source is missing, damaged or not supported, or the disk is full.
    """
    with open_checkpoint(fetch_checkpoint(source)) as drafter:
        if not isinstance(drafter.config, DrafterConfig):
            raise PairError(f"{source} is not a drafter; pass one of those called -assistant.")
        key = find_quant(quant)
        planned = plan(drafter.config, drafter.index, key, DEFAULT)
        name = f"{naming.name_of(source)}-{key}.gguf"
        headers = Headers(drafter, planned)
        parts = cut(name.removesuffix(".gguf"), planned.tensors)
        with staging(out, [name], planned.n_bytes, force=False) as hidden:
            output = Output(planned, hidden, parts, _entries(drafter, target))
            write([output], drafter, headers, counting(progress, planned.n_bytes))
            link.check(target, link.read_header(hidden / name))
    return out / name


def _entries(drafter: Checkpoint, target: link.Header) -> dict[str, Any]:
    """What links the drafter: the fingerprint that the target carries, or that of its weights."""
    weights = link.weights_identity(target)
    source = target.metadata.get(link.KEY_SOURCE) or weights
    return link.entries((target.path.name, ""), source, drafter.fingerprint())[1] | {link.KEY_WEIGHTS: weights}
