"""The one reader of a folder's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError


def read_json(path: Path, advice: str = "a Hugging Face model folder is wanted.") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        advice: what to do if it is not there.

    Raises:
        MtpError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise MtpError(f"{path}: {problem.strerror}; {advice}") from None
    except (ValueError, RecursionError) as problem:
        raise MtpError(f"{path} is not JSON ({problem}); download it again.") from None
    if not isinstance(parsed, dict):
        raise MtpError(f"{path} does not hold a JSON object; download it again.")
    return parsed
