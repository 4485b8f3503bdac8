"""The one reader of a folder's JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.files import read_small


def read_json(path: Path, advice: str = "a Hugging Face model folder is wanted.") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        advice: what to do if it is not there.

    Raises:
        MtpError: the file is missing, cannot be read, is not JSON, or holds something else than an object.
    """
    if not os.path.lexists(path):
        raise MtpError(f"{path}: No such file or directory; {advice}")
    try:
        parsed = json.loads(read_small(path).decode("utf-8-sig"))
    except MtpError:
        raise
    except (ValueError, RecursionError) as problem:
        raise MtpError(f"{path} is not JSON ({problem}); download it again.") from None
    if not isinstance(parsed, dict):
        raise MtpError(f"{path} does not hold a JSON object; download it again.")
    return parsed
