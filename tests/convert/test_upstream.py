"""Converted files against upstream's own converter and quantizer, run on the same folders."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import shapes
from gemma_mtp.convert import convert_pair, link, plan
from gemma_mtp.convert.tensor_types import QUANTS
from tiny import PAIR, SIZES
from upstream import Upstream, assert_same

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M"]


@pytest.mark.parametrize("quant", FORMATS)
def test_the_demo_pair_is_upstreams_byte_for_byte(quant: str, converted: Upstream, tmp_path: Path) -> None:
    folders = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
    pair = convert_pair(*folders, tmp_path, quant, quant)
    assert_same(pair.target, converted(folders[0], quant))
    assert_same(pair.drafter, converted(folders[1], quant))


@pytest.mark.parametrize("quant", ["F32", "Q4_0", "Q4_K_M"])
def test_rows_that_fit_no_block_fall_back_as_upstreams(
    quant: str, tiny: dict[str, Path], converted: Upstream, tmp_path: Path
) -> None:
    pair = convert_pair(tiny["narrow"], tiny["narrow drafter"], tmp_path, quant, quant)
    assert_same(pair.target, converted(tiny["narrow"], quant))
    assert_same(pair.drafter, converted(tiny["narrow drafter"], quant))


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_upstreams(
    size: str, quant: str, sizes: dict[str, tuple[Path, Path]], converted: Upstream, tmp_path: Path
) -> None:
    pair = convert_pair(*sizes[size], tmp_path, quant, quant)
    assert_same(pair.target, converted(sizes[size][0], quant))
    assert_same(pair.drafter, converted(sizes[size][1], quant))


def test_a_dense_drafter_is_upstreams(tiny: dict[str, Path], converted: Upstream, tmp_path: Path) -> None:
    pair = convert_pair(tiny["target"], tiny["dense"], tmp_path, "F32", "Q8_0")
    assert_same(pair.target, converted(tiny["target"], "F32"))
    assert_same(pair.drafter, converted(tiny["dense"], "Q8_0"))
    assert link.KEY_CENTROIDS not in link.read_header(pair.drafter).metadata


@pytest.mark.skipif(os.name != "posix", reason="needs sparse files")
@pytest.mark.parametrize("role", ["target", "drafter"])
@pytest.mark.parametrize("size", SIZES)
def test_types_of_the_real_shapes_are_the_quantizers(
    size: str, role: str, llama_quantize: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse files of the true shapes, which llama-quantize --dry-run plans without reading a weight.

    It plans formats that want an importance matrix without one too.
    """
    monkeypatch.setattr(plan, "_check_imatrix", lambda types, quant: None)
    config = shapes.parsed(shapes.target_json(size) if role == "target" else shapes.drafter_json(size))
    index = shapes.index(config)
    path = tmp_path / "sparse.gguf"
    shapes.sparse_gguf(path, plan.plan(config, index, "BF16"))
    for quant in QUANTS:
        if (size, role, quant) == ("26B-A4B", "target", "Q1_0"):
            with pytest.raises(link.MtpError, match="choose another format"):  # llama-quantize refuses it as well
                plan.plan(config, index, quant)
        elif quant not in ("F32", "F16", "BF16"):
            wanted = dry_run(llama_quantize, path, quant)
            planned = plan.plan(config, index, quant)
            assert wanted == {tensor.name: tensor.type.name.lower() for tensor in planned.tensors}, quant


def dry_run(llama_quantize: Path, path: Path, quant: str) -> dict[str, str]:
    """Tensor to type as llama-quantize plans them."""
    done = subprocess.run([llama_quantize, "--dry-run", path, quant], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    found = {}
    for line in said.splitlines():
        if "] " in line and "type =" in line:
            name = line.split("]", 1)[1].split(" - [")[0].strip()
            source = line.split("type =")[1].split(",")[0].strip()
            found[name] = (line.rsplit("(", 1)[1].split(")")[0] if "->" in line else source).lower()
    return found
