"""What a folder says of itself, for the keys `general.*`: names, authors, licenses, origins, and how to sample.

The gguf package makes these keys as upstream's converter has them, of a model card as it should be. People write cards
by hand: whatever is not text, or a list of texts, is left out here, and a card never stops a conversion.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import yaml
from gemma_mtp.convert.errors import warn
from gemma_mtp.convert.files import is_file

# Bytes of a card that are looked at; its front matter stands at the start.
CARD_BYTES = 1 << 18
# Keys of a card that hold lists, and those that name other models or datasets by their ids or by maps of texts.
LISTS = {"tags", "pipeline_tag", "languages", "language"}
ORIGINS = {"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"}
_PARTS = (
    "name", "author", "version", "organization", "description", "finetune", "basename", "size_label", "url", "doi",
    "uuid", "repo_url",
)  # fmt: skip
# Keys of a card that hold one text.
TEXTS = {
    *_PARTS, *(f"model_{part}" for part in _PARTS), "model_creator", "model_type", "license", "license_name",
    "license_link",
}  # fmt: skip
# What generation_config.json may say of sampling, by the gguf package's name for it.
SAMPLING_FIELDS = {
    "sequence": "sequence", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold", "temperature": "temp", "penalty_last_n": "penalty_last_n",
    "penalty_repeat": "penalty_repeat", "mirostat": "mirostat", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}  # fmt: skip


def described(
    folder: Path, name: str, config: Mapping[str, Any], generation: Mapping[str, Any], n_parameters: int
) -> gguf.Metadata:
    """The metadata of a model, as the gguf package's `Metadata.load` finds it.

    Args:
        folder: where README.md may lie.
        name: of the model, where nothing else tells one.
        config: config.json, for `_name_or_path`.
        generation: what `read_generation` made of generation_config.json.
        n_parameters: how many the model has.
    """
    origin = _text(config.get("_name_or_path"))
    named = {"_name_or_path": origin} if origin and _public(origin) else {}
    card = read_card(folder / "README.md")
    found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, named, Path(name), n_parameters)
    found.name = found.name or name
    for key, part in SAMPLING_FIELDS.items():
        setattr(found, f"sampling_{part}", generation.get(key))
    return found


def read_card(path: Path) -> dict[str, Any]:
    """The front matter of a model card, as far as it can be used; {} where there is none, or none that is YAML.

    What is left out is said in one warning.
    """
    try:
        if not is_file(path):
            return {}
        with path.open("rb") as file:
            raw = file.read(CARD_BYTES)
    except OSError:
        return {}
    front = _front_matter(raw)
    if not front:
        return {}
    try:
        # As upstream does: a language that YAML takes for a "no", and tabs, which YAML does not take.
        parsed = yaml.safe_load(front.replace("- no\n", '- "no"\n').replace("\t", "  "))
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        warn(f"{path}: its front matter is not YAML; it is left out.")
        return {}
    if not isinstance(parsed, dict):
        return {}
    kept, lost = {}, []
    for key, value in parsed.items():
        cleaned = _cleaned(key, value)
        if cleaned is not None:
            kept[key] = cleaned
        if cleaned is None and value not in (None, "", [], {}) and key in LISTS | ORIGINS | TEXTS:
            lost.append(str(key))
    if lost:
        names = ", ".join(lost)
        warn(f"{path}: left out what is neither text nor a list of texts, or names a folder of a disk: {names}.")
    return kept


def _front_matter(raw: bytes) -> str:
    """The lines between the first two that are ---, where the text begins with one; "" where there are none."""
    if not raw.startswith(b"---"):
        return ""
    lines = raw.decode("utf-8", errors="replace").splitlines()
    if lines[0] != "---":
        return ""
    end = next((place for place, line in enumerate(lines[1:], 1) if line == "---"), None)
    if end is None and len(raw) == CARD_BYTES:
        return ""
    return "".join(f"{line}\n" for line in lines[1:end])


def _cleaned(key: Any, value: Any) -> Any:
    """A value as text, or a list of texts or of maps of texts, by what its key may hold; None for none of them."""
    if not isinstance(key, str):
        return None
    several = key in LISTS or key in ORIGINS or key == "license"
    if not isinstance(value, list):
        return _entry(key, value)
    made = [entry for each in value if several and (entry := _entry(key, each)) is not None]
    return made or None


def _entry(key: str, value: Any) -> Any:
    if isinstance(value, bool) and key in ("language", "languages"):
        return "yes" if value else "no"  # YAML's reading of Norwegian
    if isinstance(value, dict):
        texts = {str(name): text for name, each in value.items() if (text := _text(each)) is not None}
        return texts if key in ORIGINS and texts else None
    text = _text(value)
    if text is None or (key in ORIGINS and not _public(text)):
        return None
    return text


def _public(origin: str) -> bool:
    """Whether an origin is an address or an id of a repository, and not a path of somebody's disk."""
    return "://" in origin or not (origin.count("/") > 1 or re.match(r"[./~\\]|[A-Za-z]:", origin) or "\\" in origin)


def _text(value: Any) -> str | None:
    """Text, or a number or date as such; None for what cannot be written."""
    if isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value
