"""A Hugging Face folder, opened and checked: its configuration, its tensor index, and reads of a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
from gemma_mtp.convert.config import parse_config
from gemma_mtp.convert.errors import MtpError, damaged
from gemma_mtp.convert.json_file import read_json
from gemma_mtp.convert.quantize import Bytes, Floats, widen
from gemma_mtp.convert.safetensors_file import Entry, read_entries
from gemma_mtp.convert.vocab import Tokenizer, read_tokenizer

# The number of values taken from each of three places of every tensor for the fingerprint.
SAMPLE = 4096
# Keys of config.json that change without the model changing.
INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: file, shape as torch has it, safetensors' name of its type, bytes in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    size: int = 0

    @property
    def row_size(self) -> int:
        """Bytes of one row along the first dimension."""
        return self.size // self.shape[0] if self.shape and self.shape[0] else self.size


class Weights:
    """The open safetensors files of a folder: `index`, and bytes or values on demand.

    Args:
        folder: a Hugging Face folder.
        files: keeps the files open until it is closed.

    Raises:
        MtpError: a file is missing, cut off or not what it should be.
    """

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self._files: dict[Path, int] = {}
        self.index: dict[str, Source] = {}
        for path in _weight_files(folder):
            for name, entry in sorted(read_entries(path).items()):
                if name in self.index:
                    raise MtpError(f"{path} holds {name!r}, and so does {self.index[name].file.name}; download again.")
                self.index[name] = _source(path, entry)
            self._files[path] = os.open(path, os.O_RDONLY)
            files.callback(os.close, self._files[path])
        _check_index(folder, self.index)

    def read(self, name: str, start: int, size: int) -> Bytes:
        """Bytes [start, start + size) of a tensor, read into memory of their own; threads may do so at once.

        Raises:
            MtpError: the file ends before the tensor does.
        """
        source = self.index[name]
        raw = np.empty(size, np.uint8)
        done = 0
        while done < size:
            more = os.preadv(self._files[source.file], [raw[done:].data], source.offset + start + done)
            if not more:
                raise MtpError(f"{source.file} ends within {name!r}; it was changed or cut off: download it again.")
            done += more
        return raw

    def values(self, name: str) -> Floats:
        """A whole tensor as float32, in its own shape, of a type that `widen` takes; raises what `read` raises."""
        source = self.index[name]
        return widen(self.read(name, 0, source.size), source.dtype).reshape(source.shape)


class Checkpoint(Weights):
    """An open checkpoint: its weights, `settings` (config.json), the same as `config`, `tokenizer`, and `generation`
    (generation_config.json or {})."""

    _twin: Checkpoint | None = None

    def __init__(self, folder: Path, files: ExitStack) -> None:
        if not folder.is_dir():
            raise MtpError(f"{folder} is not a folder; pass the folder of a Hugging Face checkpoint.")
        with damaged(folder / "config.json"):
            self.settings = read_json(folder / "config.json")
            self.config = parse_config(self.settings, folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation = read_json(generation) if generation.exists() else {}
        super().__init__(folder, files)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """tokenizer.json, read when it is asked for; raises what `read_tokenizer` raises."""
        return self._twin.tokenizer if self._twin else read_tokenizer(self.folder / "tokenizer.json")

    def share_tokenizer(self, other: Checkpoint) -> None:
        """Take the tokenizer of a checkpoint that has the same tokenizer.json."""
        self._twin = other

    def fingerprint(self) -> str:
        """SHA-256 over configuration, tensor names, types and shapes, and a sample of every tensor's values.

        It does not depend on how the tensors are spread over files, nor on the version that saved them.
        """
        config = {key: value for key, value in self.settings.items() if key not in INCIDENTAL}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {key: value for key, value in text.items() if key not in INCIDENTAL}
        total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, source in sorted(self.index.items()):
            total.update(f"{name} {source.dtype} {source.shape}\n".encode())
            count = source.shape[0] if source.shape else 0
            # A vector is sampled in one piece: its rows are single values.
            matrix = len(source.shape) > 1
            starts = sorted({0, count // 2, count - 1}) if matrix else [0]
            length = min(source.row_size if matrix else source.size, SAMPLE * source.size // max(1, prod(source.shape)))
            for start in starts if count else []:
                total.update(self.read(name, start * source.row_size, length).tobytes())
        return total.hexdigest()


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Open a Hugging Face folder for reading.

    Raises:
        MtpError: a file is missing, cut off or not what it should be.
    """
    with ExitStack() as files:
        yield Checkpoint(folder, files)


def weight_names(folder: Path) -> list[str]:
    """Names of the safetensors files that a folder should hold.

    Raises:
        MtpError: the index is damaged, or names what is not a file of its folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    names = sorted(set(_weight_map(index).values()))
    outside = [name for name in names if Path(name).name != name or name == ".."]
    if outside:
        raise MtpError(f"{index} names {outside[0]!r}, which is not a file of its folder; download it again.")
    return names


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all present."""
    names = weight_names(folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing == ["model.safetensors"]:
        raise MtpError(f"{folder} has neither {missing[0]} nor {missing[0]}.index.json; download the weights.")
    if missing:
        raise MtpError(f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing)}; download them.")
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise MtpError(f"{index} has no weight_map; download it again.")
    return mapped


def _check_index(folder: Path, found: Mapping[str, Source]) -> None:
    """Compare what the index file promises with what the shards hold."""
    index = folder / "model.safetensors.index.json"
    for name, file in (_weight_map(index) if index.exists() else {}).items():
        if name not in found:
            raise MtpError(f"{folder / file} does not hold {name!r}, which {index.name} promises; download it again.")


def _source(path: Path, entry: Entry) -> Source:
    return Source(path, entry.shape, entry.dtype, entry.start, entry.stop - entry.start)
