"""Which files of a Hugging Face folder hold its weights, and what a folder holds that has none."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from gemma_mtp.convert.errors import MtpError, listed, warn
from gemma_mtp.convert.files import reading
from gemma_mtp.convert.json_file import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
# What somebody may take for the weights of a folder.
LIKELY = re.compile(r"(?i)(?<!training_args)\.(safetensors|bin|pt|pth|gguf|part|incomplete|crdownload)$")
# What is to be done with it, by its end.
GET_WEIGHTS = "download the weights"
RESAVE = "load the folder with transformers and save_pretrained it, which writes safetensors"
INSTEAD = {
    ".safetensors": f"if all weights are in one file, rename it to {SINGLE}",
    ".gguf": "a GGUF file is converted already, pass the checkpoint that it was made from",
    ".part": "the download is not complete, go on with it",
    ".incomplete": "the download is not complete, go on with it",
    ".crdownload": "the download is not complete, go on with it",
    ".bin": RESAVE, ".pt": RESAVE, ".pth": RESAVE,
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Where a folder has no config.json: it is an adapter, or folders within it have one, as in the root of a cache
    entry, or of a training."""
    if os.path.lexists(folder / "config.json"):
        return
    _check_adapter(folder)
    with reading(folder):
        inside = [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")]
        current = folder / "refs" / "main"
        wanted = folder / "snapshots" / current.read_text().strip() if current.is_file() else None
    if not inside:
        return
    newest = wanted if wanted in inside else max(inside, key=_by_numbers)
    others = f" (or another of the {len(inside)} such folders there)" if len(inside) > 1 else ""
    raise MtpError(f"{folder} has no config.json, but folders within it have: pass {newest}{others}.")


def _check_adapter(folder: Path) -> None:
    """Refuse a folder that holds a LoRA adapter, and no model."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    try:
        base = read_json(path).get("base_model_name_or_path")
    except MtpError:
        base = None
    of = f" of {base}" if isinstance(base, str) and base.isprintable() and base else ""
    raise MtpError(
        f"{folder} holds an adapter{of}, not a model; merge it into its model (merge_and_unload of peft), save that "
        "with its tokenizer, and pass that folder."
    )


def _by_numbers(path: Path) -> list[int]:
    """checkpoint-1000 comes after checkpoint-200."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def weight_names(folder: Path, present: Collection[str] | None = None) -> list[str]:
    """Names of the safetensors files that a folder's weights are in, chosen as transformers does.

    A model.safetensors comes before an index, whatever that says, and an index before shards that go by their names.

    Args:
        folder: a Hugging Face folder.
        present: names of the files there are, where the folder does not hold the weights themselves.

    Raises:
        MtpError: there are no weights, not all of them, or the index is damaged.
    """
    index = folder / INDEX
    with reading(folder):
        there = {path.name for path in folder.iterdir()} if present is None else set(present)
    if ADAPTER in there:
        if not any(name.endswith(".safetensors") and not name.startswith("adapter") for name in there):
            _check_adapter(folder)
        warn(f"{folder}: the adapter that lies there is left out; merge it into the model first if it belongs to it.")
    shards = {name: found for name in there if (found := SHARD.fullmatch(name))}
    if SINGLE in there:
        aside = sorted([*shards, *([INDEX] if index.exists() else [])])
        if aside:
            warn(f"{folder}: {SINGLE} is converted, as transformers loads it; left aside: {listed(aside)}.")
        return [SINGLE]
    if index.exists():
        return _existing(folder, sorted({os.path.normpath(name) for name in _weight_map(index).values()}), there, index)
    counts = {found[1] for found in shards.values()}
    if len(counts) == 1:
        count = next(iter(counts))
        wanted = [f"model-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        return _existing(folder, wanted, there, index)
    if len(counts) > 1:
        raise MtpError(
            f"{folder} holds shards of several sets ({listed(sorted(shards))}) and no {INDEX}; keep those of one."
        )
    likely = sorted(name for name in there if LIKELY.search(name))
    ends = {Path(name).suffix.lower() for name in likely}
    advice = next((INSTEAD[end] for end in INSTEAD if end in ends), GET_WEIGHTS)
    if advice == INSTEAD[".safetensors"] and len(likely) > 1:
        advice = f"name them model-00001-of-{len(likely):05}.safetensors and so on, or bring their index"
    lies = f"; there lies {listed(likely)}" if likely else ""
    raise MtpError(f"{folder} has neither {SINGLE} nor {INDEX}{lies}: {advice}.")


def _existing(folder: Path, names: list[str], there: Collection[str], index: Path) -> list[str]:
    """The same names, if all are files of the folder."""
    outside = [name for name in names if Path(name).name != name or name in ("..", ".")]
    if outside:
        raise MtpError(f"{index} names {outside[0]!r}, which is not a file of its folder; download it again.")
    missing = [name for name in names if name not in there]
    if missing:
        raise MtpError(f"{folder}: {len(missing)} of {len(names)} shards missing: {listed(missing)}; download them.")
    return names


def _weight_map(index: Path) -> dict[str, str]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise MtpError(f"{index} has no weight_map; download it again.")
    return mapped
