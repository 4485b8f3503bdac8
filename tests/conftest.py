"""What several test files need: upstream's converter and quantizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import llama_cpp
import pytest
from gemma_mtp.patches import build


@pytest.fixture(scope="session")
def upstream() -> Path:
    """The pinned llama.cpp's converter (convert_hf_to_gguf.py, conversion/, gguf-py/), unpacked once into the cache."""
    kept = build.cache_dir() / "upstream" / build.upstream().sha256[:16]
    if not kept.exists():
        work = kept.with_suffix(".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        parts = (f"{build.VENDORED}/{part}" for part in ("conversion/", "gguf-py/", "convert_hf_to_gguf.py"))
        (build.unpack(work, *parts) / build.VENDORED).rename(kept)
        shutil.rmtree(work)
    return kept


@pytest.fixture(scope="session")
def llama_quantize() -> Path:
    """llama-quantize of the installed build."""
    return Path(llama_cpp.__file__).parent / "lib" / "llama-quantize"
