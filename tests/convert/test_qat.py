"""`--recipe qat`: the Q4_0 grid that weights lie on is found again, and weights without one are left alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from gemma_mtp.convert import link
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.qat import regrid
from gemma_mtp.convert.quantize import quantize
from gemma_mtp.runtime.cli.main import main
from gguf import GGMLQuantizationType, dequantize
from safetensors.torch import load_file, save_file
from tiny import make_drafter, make_target

Array = npt.NDArray[np.float32]
N = 4096
# What the integers of a block reach at most, as a training may leave them: without -8 libggml takes another scale.
REACH = {"-8": (-8, 7), "7": (-7, 7), "-5 to 3": (-5, 3), "1": (-1, 1)}


def bf16(values: Array) -> Array:
    import torch

    rounded: Array = torch.from_numpy(values).bfloat16().float().numpy()
    return rounded


def value(blocks: npt.NDArray[np.uint8]) -> Array:
    """What blocks stand for, [n, 32], by the gguf package."""
    values: Array = dequantize(blocks.reshape(-1, 18), GGMLQuantizationType.Q4_0).reshape(-1, 32)
    return values


def on_grid(reach: tuple[int, int], scales: Array) -> Array:
    """Blocks of integers that go to both ends of their reach, times a scale each: [N, 32]."""
    steps = np.rint(np.random.default_rng(0).standard_normal((N, 32)) * 3).clip(*reach)
    steps[:, 3], steps[:, 20] = reach
    return scales * steps.astype(np.float32)


def scales(seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    made: Array = (rng.uniform(0.001, 0.006, (N, 1)) * rng.choice([-1, 1], (N, 1))).astype(np.float32)
    return made


@pytest.mark.parametrize("reach", REACH)
def test_weights_come_back_exactly(reach: str) -> None:
    """Scales of four bits, so that bf16 holds every product: error 0. Scales of bf16: equal once rounded to bf16.

    What reaches from -1 to 1 fits finer grids too, to the precision of bf16.
    """
    short = (scales().view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32)
    for scale in (short, bf16(scales())):
        weights = bf16(on_grid(REACH[reach], scale))
        blocks = quantize(weights, Type.Q4_0)
        plain = value(blocks)
        regrid(weights, blocks)
        assert np.array_equal(bf16(value(blocks)), weights)
        assert scale is not short or reach == "1" or np.array_equal(value(blocks), weights)
        assert np.array_equal(bf16(plain), weights) == (reach == "-8")


def test_scales_that_float16_does_not_hold() -> None:
    """Then not all weights can be exact: the error is that of rounding, and never larger than libggml's."""
    weights = bf16(on_grid(REACH["7"], scales()))
    blocks = quantize(weights, Type.Q4_0)
    before = np.square(value(blocks) - weights).sum(1)
    regrid(weights, blocks)
    after = np.square(value(blocks) - weights).sum(1)
    assert (after <= before).all()
    assert np.sqrt(after.sum() / np.square(weights).sum()) < 2**-9
    assert np.sqrt(before.sum() / np.square(weights).sum()) > 0.05
    assert (bf16(value(blocks)) == weights).mean() > 0.98


def test_weights_on_no_grid_keep_their_blocks() -> None:
    rng = np.random.default_rng(2)
    weights = bf16(rng.standard_normal((N, 32)).astype(np.float32) * 0.02)
    weights[0], weights[1], weights[2, 1:], weights[3] = 0, 1e-41, 0, bf16(weights[3] * 1e-6)
    weights[4] = bf16(weights[4] * 3e5)
    weights[5] = 65504
    blocks = quantize(weights, Type.Q4_0)
    before = blocks.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrid(weights, blocks)
    assert (np.square(value(blocks) - weights).sum(1) <= np.square(value(before) - weights).sum(1)).all()
    assert np.array_equal(blocks.reshape(-1, 18)[6:], before.reshape(-1, 18)[6:])


def put_on_grid(folder: Path) -> dict[str, Any]:
    """Matrices of a checkpoint, moved to a grid whose blocks end at 7 or -7."""
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            blocks = tensor.float().reshape(-1, 32)
            scale = (blocks.abs().amax(1, keepdim=True) / 7).clamp(min=1e-4).bfloat16().float()
            weights[name] = ((blocks / scale).round().clamp(-7, 7) * scale).bfloat16().reshape(tensor.shape)
    save_file(weights, folder / "model.safetensors")
    return weights


def test_a_conversion_keeps_the_grid(tmp_path: Path) -> None:
    name = "gemma-4-E2B-it-qat-q4_0-unquantized"  # the recipe is taken by the name
    folders = make_target(tmp_path / name), make_drafter(tmp_path / f"{name}-assistant", ordered=True)
    sources = [put_on_grid(folder) for folder in folders]
    for recipe in ((), ("--recipe", "cpu")):
        out = tmp_path / f"out{len(recipe)}"
        done = CliRunner().invoke(main, ["convert", *map(str, folders), "-o", str(out), *recipe])
        assert done.exit_code == 0, done.output
        target, drafter = out / f"{name}-Q4_0.gguf", out / f"{name}-assistant-Q4_0.gguf"
        for path, source, of in (
            (target, sources[0], "model.language_model.layers.0.self_attn.q_proj.weight"),
            (drafter, sources[1], "model.layers.0.self_attn.q_proj.weight"),
        ):
            tensor = link.read_header(path).tensors["blk.0.attn_q.weight"]
            assert tensor.type is Type.Q4_0
            blocks = np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)
            weights = source[of].float().numpy().reshape(-1, 32)
            assert np.array_equal(bf16(value(blocks)), weights) == (recipe == ())
            assert np.array_equal(blocks, quantize(weights, Type.Q4_0)) == (recipe != ())
        assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0
