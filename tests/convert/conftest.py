"""What the tests of converting share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faulty import Folders


@pytest.fixture
def pair(tiny: dict[str, Path], tmp_path: Path) -> Folders:
    """Copies of a good target and its ordered drafter, to be spoilt."""
    copies = tmp_path / "target", tmp_path / "drafter"
    for name, copy in zip(("target", "ordered"), copies, strict=True):
        shutil.copytree(tiny[name], copy)
    return copies
