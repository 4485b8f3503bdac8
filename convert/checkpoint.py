"""A Hugging Face folder, opened and checked: its configuration, its tensor index, and reads of a few rows at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gemma_mtp.convert.config import read_config, read_json
from gemma_mtp.convert.link import MtpError
from safetensors import SafetensorError, safe_open

# The number of values taken from each of three places of every tensor for the fingerprint.
SAMPLE = 4096
# Keys of config.json that change without the model changing.
INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: file, shape as torch has it, and safetensors' name of its type."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """An open checkpoint: `config`, `generation` (generation_config.json or {}), `index`, and rows on demand."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        if not folder.is_dir():
            raise MtpError(f"{folder} is not a folder; pass the folder of a Hugging Face checkpoint.")
        self.folder = folder
        self.config = read_config(folder)
        generation = folder / "generation_config.json"
        self.generation = read_json(generation) if generation.exists() else {}
        self._open = {path: _open(path, files) for path in _weight_files(folder)}
        self.index: dict[str, Source] = {}
        for path, file in self._open.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name in self.index:
                    raise MtpError(f"{path} holds {name!r}, and so does {self.index[name].file.name}; download again.")
                piece = file.get_slice(name)
                self.index[name] = Source(path, tuple(piece.get_shape()), piece.get_dtype())
        _check_index(folder, self.index)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first dimension of a tensor, in the type it is stored in."""
        source = self.index[name]
        try:
            rows: torch.Tensor = self._open[source.file].get_slice(name)[start:stop]
        except SafetensorError as problem:
            raise MtpError(f"{source.file}: cannot read {name!r} ({problem}); download it again.") from None
        return rows

    def fingerprint(self) -> str:
        """SHA-256 over configuration, tensor names, types and shapes, and a sample of every tensor's values.

        It does not depend on how the tensors are spread over files, nor on the version that saved them.
        """
        config = {key: value for key, value in read_json(self.folder / "config.json").items() if key not in INCIDENTAL}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {key: value for key, value in text.items() if key not in INCIDENTAL}
        total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, source in sorted(self.index.items()):
            total.update(f"{name} {source.dtype} {source.shape}\n".encode())
            count = source.shape[0] if source.shape else 0
            # A vector is sampled in one piece: its rows are single values.
            pieces = [(row, row + 1) for row in sorted({0, count // 2, count - 1})] if count else []
            for start, stop in [(0, min(count, SAMPLE))] if len(source.shape) == 1 else pieces:
                sample = self.rows(name, start, stop).flatten()[:SAMPLE].contiguous()
                total.update(sample.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Open a Hugging Face folder for reading.

    Raises:
        MtpError: a file is missing, cut off or not what it should be.
    """
    with ExitStack() as files:
        yield Checkpoint(folder, files)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all present."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise MtpError(f"{folder} has neither {single.name} nor {index.name}; download the weights.")
        return [single]
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise MtpError(f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing)}; download them.")
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise MtpError(f"{index} has no weight_map; download it again.")
    return mapped


def _check_index(folder: Path, found: Mapping[str, Source]) -> None:
    """Compare what the index file promises with what the shards hold."""
    index = folder / "model.safetensors.index.json"
    for name, file in (_weight_map(index) if index.exists() else {}).items():
        if name not in found:
            raise MtpError(f"{folder / file} does not hold {name!r}, which {index.name} promises; download it again.")


def _open(path: Path, files: ExitStack) -> Any:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise MtpError(f"{path} is a Git LFS pointer, not weights; run git lfs pull in {path.parent}.")
    try:
        return files.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as problem:
        raise MtpError(f"{path} is damaged or only partly downloaded ({problem}); download it again.") from None
