"""Files as they reach the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from faulty import Folders
from gemma_mtp.convert import convert_pair
from gemma_mtp.convert.integrity import verify_files


def test_a_system_that_writes_a_little_at_a_time(
    pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and hashes alike."""
    whole = convert_pair(*pair, tmp_path / "whole", "Q8_0", "Q8_0")
    real = os.pwrite

    def short(file: int, data: Any, offset: int) -> int:
        return real(file, memoryview(data)[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", short)
    made = convert_pair(*pair, tmp_path / "made", "Q8_0", "Q8_0")
    assert [path.read_bytes() for path in made.files] == [path.read_bytes() for path in whole.files]
    assert all(file["hashed"] == file["tensors"] for file in verify_files(tmp_path / "made")["files"])
