"""generation_config.json: what of it goes into the files. What stands there in another form means the default."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError, warn
from gemma_mtp.convert.gguf_io.types import F32_MAX
from gemma_mtp.convert.json_file import read_json

# Keys of numbers, with the smallest and the largest value that makes sense.
INTEGERS = {"top_k": (0, 2**31 - 1), "penalty_last_n": (-1, 2**31 - 1), "mirostat": (0, 2)}
FLOATS = {
    "temperature": (0.0, F32_MAX), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0), "penalty_repeat": (0.0, F32_MAX), "mirostat_tau": (0.0, F32_MAX),
    "mirostat_eta": (0.0, F32_MAX),
}  # fmt: skip
TOKENS = ("eos_token_id", "suppress_tokens")


def read_generation(folder: Path) -> dict[str, Any]:
    """What can be used of a folder's generation_config.json: numbers for sampling, text, and lists of token ids.

    A file that is missing or damaged, and a value of another kind, mean the default; what is left out is said.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    try:
        parsed = read_json(path)
    except MtpError as problem:
        warn(f"{str(problem).rstrip('.')}; the defaults of Gemma 4 are taken instead.")
        return {}
    kept = {key: value for key in (*INTEGERS, *FLOATS, "sequence") if (value := _usable(key, parsed)) is not None}
    lost = [key for key in (*INTEGERS, *FLOATS, "sequence") if key in parsed and key not in kept]
    for key in TOKENS:
        if key in parsed:
            kept[key], whole = _ids(parsed[key])
            lost += [] if whole else [key]
    if lost:
        said = ", ".join(f"{key} {json.dumps(parsed[key])[:60]}" for key in lost)
        warn(f"{path}: not usable, the default is taken: {said}.")
    return kept


def _usable(key: str, parsed: Mapping[str, Any]) -> Any:
    """A value if it is of the kind that its key wants, and makes sense; else None."""
    value = parsed.get(key)
    if key == "sequence":
        return value if isinstance(value, str) and value.isascii() else None
    if isinstance(value, bool) or not isinstance(value, int if key in INTEGERS else (int, float)):
        return None
    low, high = INTEGERS.get(key) or FLOATS[key]
    return value if low <= value <= high else None


def _ids(value: Any) -> tuple[list[int], bool]:
    """Distinct token ids, and whether that is all that was there; a whole number may be written as a float."""
    given = value if isinstance(value, list) else [value]
    ids = [int(each) for each in given if not isinstance(each, bool) and isinstance(each, (int, float)) and each >= 0
           and each < 2**31 and each == int(each)]  # fmt: skip
    return list(dict.fromkeys(ids)), len(ids) == len(given)
