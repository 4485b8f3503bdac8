"""What several test files need: upstream's converter and quantizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from demo import QUANT
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.patches import source, wheel
from gemma_mtp.runtime.draft import costs
from tiny import PAIR, SIZES, make_drafter, make_pair, make_target
from upstream import Upstream


@pytest.fixture(scope="session", autouse=True)
def costs_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs measured while testing stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("costs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "costs_dir", lambda: folder)
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of Ollama, and a folder without files to stand in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="session")
def upstream() -> Path:
    """The pinned llama.cpp's converter (convert_hf_to_gguf.py, conversion/, gguf-py/), unpacked once into the cache."""
    kept = source.cache_dir() / "upstream" / source.upstream().sha256[:16]
    with source.building("upstream"):  # or wait for other tests that do
        if not kept.exists():
            work = kept.with_suffix(".part")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            parts = (f"{source.VENDORED}/{part}" for part in ("conversion/", "gguf-py/", "convert_hf_to_gguf.py"))
            (source.unpack(work, *parts) / source.VENDORED).rename(kept)
            shutil.rmtree(work)
    return kept


@pytest.fixture(scope="session")
def llama_quantize() -> Path:
    """llama-quantize of the installed build."""
    return Path(llama_cpp.__file__).parent / "lib" / "llama-quantize"


@pytest.fixture(scope="session")
def converted(upstream: Path, llama_quantize: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """Upstream's file of a folder in a format."""
    running = Upstream(upstream / "convert_hf_to_gguf.py", llama_quantize, tmp_path_factory.mktemp("upstream"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def portable() -> Path:
    """The portable wheel, unpacked; skips where it was not built."""
    flags = wheel.cmake_args(portable=True)
    if wheel.kept_wheel(flags) is None:
        pytest.skip("no portable wheel here; make wheel builds it")
    return wheel.unpacked(flags)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The bundled pair, converted as `make demo` converts it."""
    folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
    return convert_pair(*folders, tmp_path_factory.mktemp("demo"), QUANT)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of a random target, an ordered and a dense drafter for it, and a target and drafter whose
    rows fit no block."""
    root = tmp_path_factory.mktemp("tiny")
    narrow: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 96}
    return {
        "target": make_target(root / "tiny-target"),
        "ordered": make_drafter(root / "tiny-ordered", ordered=True),
        "dense": make_drafter(root / "tiny-dense", ordered=False),
        "narrow": make_target(root / "narrow-target", **narrow),
        "narrow drafter": make_drafter(root / "narrow-drafter", ordered=True, backbone=80),
    }


@pytest.fixture(scope="session")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face folders of a random target of each of the five sizes' shapes, and of its drafter."""
    root = tmp_path_factory.mktemp("sizes")
    return {size: make_pair(size, root) for size in SIZES}


@pytest.fixture(scope="session")
def tiny_f32(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The random target and its ordered drafter, converted to F32."""
    return convert_pair(tiny["target"], tiny["ordered"], tmp_path_factory.mktemp("tiny-f32"), "F32", "F32")
