"""A Hugging Face folder, opened and checked: its configuration, its tensor index, and reads of a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
from gemma_mtp.convert import names
from gemma_mtp.convert.config import DrafterConfig, TargetConfig, parse_config
from gemma_mtp.convert.errors import MtpError, damaged, listed, warn
from gemma_mtp.convert.files import BINARY, read_into, reading
from gemma_mtp.convert.generation import read_generation
from gemma_mtp.convert.json_file import read_json
from gemma_mtp.convert.quantize import Bytes, Floats, widen
from gemma_mtp.convert.safetensors_file import Entry, read_entries
from gemma_mtp.convert.vocab import Tokenizer, read_tokenizer
from gemma_mtp.convert.weight_files import check_folder, weight_names

# The number of values taken from each of three places of every tensor for the fingerprint.
SAMPLE = 4096
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# Values compared at a time.
COMPARED = 1 << 22
# Keys of config.json that change without the model changing.
INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: file, shape as torch has it, safetensors' name of its type, bytes in the file.

    `parts`: what it is put together from, one after the other, where an export has it in pieces. `wide`: the file has
    it as F64, of twice the bytes, and it is read as F32. `made`: makes its bytes, which are in no file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    size: int = 0
    parts: tuple[Source, ...] = ()
    wide: bool = False
    made: Callable[[], Bytes] | None = None

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
        for path in [folder / name for name in weight_names(folder)]:
            for given, entry in sorted(read_entries(path).items()):
                bare = names.bare(given)
                name = bare if bare in (names.CENTROIDS, names.ORDERING) else given  # these are asked for by name
                if name in self.index:
                    raise MtpError(f"{path} holds {name!r}, and so does {self.index[name].file.name}; download again.")
                self.index[name] = _source(path, entry)
            with reading(path):
                self._files[path] = os.open(path, os.O_RDONLY | BINARY)
            files.callback(os.close, self._files[path])
        self._stack_experts()

    def _stack_experts(self) -> None:
        """Put experts that an export has one by one into one tensor for a layer."""
        found: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
        for name in self.index:
            if (expert := names.expert(name)) is not None:
                found[expert.name][expert.number, expert.part] = name
        for whole, places in found.items():
            parts = [self.index.pop(places[key]) for key in sorted(places)]
            count, each = 1 + max(places)[0], 1 + max(part for _, part in places)
            first = parts[0]
            if len(parts) != count * each or len({(part.shape, part.dtype) for part in parts}) > 1:
                raise MtpError(f"{first.file}: not every expert of {whole!r} is there, or not of one shape and type.")
            shape = (count, each * first.shape[0], *first.shape[1:])
            self.index[whole] = Source(
                first.file, shape, first.dtype, 0, sum(part.size for part in parts), tuple(parts)
            )

    def read(self, name: str, start: int, size: int) -> Bytes:
        """Bytes [start, start + size) of a tensor, read into memory of their own; threads may do so at once.

        Raises:
            MtpError: the file ends before the tensor does.
        """
        source = self.index[name]
        if not source.parts:
            return self._read(name, source, start, size)
        found, at = [], 0
        for part in source.parts:
            first, last = max(start, at), min(start + size, at + part.size)
            if first < last:
                found.append(self._read(name, part, first - at, last - first))
            at += part.size
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _read(self, name: str, source: Source, start: int, size: int) -> Bytes:
        if source.made:
            return source.made()[start : start + size]
        if source.wide:
            stored = self._read(name, replace(source, wide=False), 2 * start, 2 * size)
            return stored.view("<f8").astype("<f4").view(np.uint8)
        raw = np.empty(size, np.uint8)
        with reading(source.file):
            done = read_into(self._files[source.file], raw.data, source.offset + start)
        if done < size:
            raise MtpError(f"{source.file} ends within {name!r}; it was changed or cut off: download it again.")
        return raw

    def values(self, name: str) -> Floats:
        """A whole tensor as float32, in its own shape, of a type that `widen` takes; raises what `read` raises."""
        source = self.index[name]
        return widen(self.read(name, 0, source.size), source.dtype).reshape(source.shape)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, whatever their types; raises what `read` raises."""
        first, second = self.index[one], self.index[other]
        if first.shape != second.shape:
            return False
        length = prod(first.shape)
        sizes = first.size // max(length, 1), second.size // max(length, 1)
        for start in range(0, length, COMPARED):
            count = min(COMPARED, length - start)
            left = self.read(one, start * sizes[0], count * sizes[0])
            right = self.read(other, start * sizes[1], count * sizes[1])
            if first.dtype == second.dtype:
                same = np.array_equal(left, right)
            else:
                same = np.array_equal(widen(left, first.dtype), widen(right, second.dtype))
            if not same:
                return False
        return True


class Checkpoint(Weights):
    """An open checkpoint: its weights, `settings` (config.json), the same as `config`, `tokenizer`, and `generation`
    (of generation_config.json what can be used); `called` is the name that a user gives it. `hollow`: of the weights
    only the headers are there."""

    called: str | None = None
    hollow: bool = False
    _allowed: Collection[str] = ()

    def __init__(self, folder: Path, files: ExitStack, allowed: Collection[str] = (), whole: bool = True) -> None:
        if not folder.is_dir():
            raise MtpError(f"{folder} is not a folder; pass the folder of a Hugging Face checkpoint.")
        file = folder / "config.json"
        check_folder(folder)
        with damaged(file):
            self.settings = read_json(file)
            self.config = parse_config(self.settings, file, allowed)
        self._allowed, self.hollow = allowed, not whole
        self.generation = read_generation(folder)
        super().__init__(folder, files)
        self._check_quantized()
        self.config = self._with_its_head()
        self._fit_per_layer_rows()

    def _check_quantized(self) -> None:
        """Whether a quantization that the configuration tells of is one of the weights too."""
        text = self.settings.get("text_config")
        told = self.settings.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
        if not told:
            return
        method = told.get("quant_method", "?") if isinstance(told, dict) else told
        for name, source in self.index.items():
            if names.bare(name) != names.ORDERING and source.dtype not in FLOAT_TYPES:
                raise MtpError(f"{source.file}: the weights are quantized ({method}); {names.QUANTIZED}.")
        warn(f"{self.folder / 'config.json'}: quantization_config ({method}) is left out: the weights are floats.")

    def _with_its_head(self) -> TargetConfig | DrafterConfig:
        """The configuration, untied where the weights hold another output matrix than the token embedding.

        So does transformers, whatever tie_word_embeddings says (modeling_utils.py, `tie_weights`). A drafter whose two
        matrices are equal is a tied one.
        """
        at = {place.gguf: name for name in self.index if (place := names.place(name)) is not None}
        head, embedding = at.get(names.OUTPUT), at.get(names.EMBEDDING)
        drafter = isinstance(self.config, DrafterConfig)
        if head is None or embedding is None or not (self.config.tied or drafter):
            return self.config
        if self.hollow and self.index[head].shape == self.index[embedding].shape:
            warn(f"{self.folder}: {head!r} is taken for equal to {embedding!r}; only the weights show whether it is.")
            return replace(self.config, tied=True)
        if self.equal(head, embedding):
            return replace(self.config, tied=True)
        if drafter:
            raise MtpError(
                f"{self.folder}: {head!r} and {embedding!r} differ, and a drafter's output matrix is its embedding in "
                "llama.cpp; save the drafter with one of the two alone."
            )
        if self.index[head].shape == self.index[embedding].shape:  # else it is refused
            warn(f"{self.folder}: {head!r} differs from {embedding!r}: it is kept, whatever tie_word_embeddings says.")
        return replace(self.config, tied=False)

    def _fit_per_layer_rows(self) -> None:
        """Give the per-layer embeddings a row for each row of the embedding, as llama.cpp wants them.

        transformers counts them apart (vocab_size_per_layer_input): one was resized or padded without the other.
        """
        places = {place.gguf: name for name in self.index if (place := names.place(name)) is not None}
        name, rows = places.get(names.PER_LAYER, ""), self.config.vocab_size
        if not self.config.per_layer_input or name not in self.index or len(self.index[name].shape) != 2:
            return
        old = self.index[name]
        had, shape = old.shape[0], (rows, old.shape[1])
        if had >= rows:
            self.index[name] = replace(old, shape=shape, size=rows * old.row_size)
            return
        if lacking := [repr(token) for token in self.own_tokenizer.tokens[had:]]:
            raise MtpError(
                f"{old.file}: {name!r} has {had} rows, none for {listed(lacking)}; resize it as the embedding was "
                "(resize_token_embeddings does both)."
            )
        size = (rows - had) * old.row_size
        unused = Source(old.file, (rows - had, old.shape[1]), old.dtype, 0, size, made=lambda: np.zeros(size, np.uint8))
        self.index[name] = Source(old.file, shape, old.dtype, 0, old.size + size, (old, unused))

    @cached_property
    def own_tokenizer(self) -> Tokenizer:
        """Its tokenizer.json, read when it is asked for; raises what `read_tokenizer` raises."""
        return read_tokenizer(self.folder / "tokenizer.json", self._allowed)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with a token for each row of the embedding.

        Raises:
            MtpError: what `read_tokenizer` raises; or there are more tokens than rows.
        """
        found, rows = self.own_tokenizer, self.config.vocab_size
        if rows < len(found.tokens):
            raise MtpError(
                f"{found.path} has {len(found.tokens)} tokens, but config.json and the embedding have {rows} rows, "
                f"none for {listed([repr(token) for token in found.tokens[rows:]])}; take the tokenizer.json that the "
                "model was trained with, or resize its embedding (resize_token_embeddings)."
            )
        if rows > len(found.tokens):
            warn(f"{self.folder}: {rows - len(found.tokens)} rows of the embedding have no token; they are unused.")
        return found.padded(rows)

    def share_tokenizer(self, other: Checkpoint) -> None:
        """Take the tokenizer of a checkpoint that has the same tokens."""
        self.tokenizer = other.tokenizer

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
def open_checkpoint(folder: Path, allowed: Collection[str] = (), whole: bool = True) -> Iterator[Checkpoint]:
    """Open a Hugging Face folder for reading.

    Args:
        folder: where config.json and the weights lie.
        allowed: as for `parse_config`.
        whole: False if of the weights only the headers are there.

    Raises:
        MtpError: a file is missing, cut off or not what it should be.
    """
    with ExitStack() as files:
        yield Checkpoint(folder, files, allowed, whole)


def _source(path: Path, entry: Entry) -> Source:
    size = entry.stop - entry.start
    if entry.dtype == "F64":
        return Source(path, entry.shape, "F32", entry.start, size // 2, wide=True)
    return Source(path, entry.shape, entry.dtype, entry.start, size)
