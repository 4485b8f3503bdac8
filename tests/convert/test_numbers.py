"""Numbers of a checkpoint as float32, and the one function that a projector's are put through, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gemma_mtp.convert.mmproj import softplus
from gemma_mtp.convert.quantize import STORED_AS, Floats, widen

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def same(ours: Floats, theirs: torch.Tensor) -> bool:
    """Equal to the last bit, or NaN in the same places."""
    wanted: Floats = theirs.numpy()
    return ours.dtype == wanted.dtype and bool(
        np.all((ours.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(ours) & np.isnan(wanted)))
    )


def test_every_type_that_torch_knows_is_widened() -> None:
    assert TORCH.keys() == STORED_AS.keys()


@pytest.mark.parametrize("kind", TORCH)
def test_widen(kind: str) -> None:
    """Every value of 8 and 16 bits, and random bits for longer ones."""
    if (size := TORCH[kind].itemsize) <= 2:
        raw = np.arange(2 if kind == "BOOL" else 1 << 8 * size, dtype=f"<u{size}").view(np.uint8)
    else:
        raw = np.random.default_rng(0).integers(0, 256, size << 16, np.uint8)
    assert same(widen(raw, kind), torch.from_numpy(raw.copy()).view(TORCH[kind]).float())


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_softplus_is_torchs_to_the_last_bit(kind: str) -> None:
    every = widen(np.arange(1 << 16, dtype=np.uint16).view(np.uint8), kind)
    values = every[np.isfinite(every) & (every > -86)]
    values = values[: len(values) // 128 * 128].reshape(-1, 128)  # the vectors of the models' audio encoder
    assert same(softplus(values), torch.nn.functional.softplus(torch.from_numpy(values)))


def test_softplus_of_small_large_and_no_numbers() -> None:
    values = np.array([-np.inf, -3e38, -200, -104, -90, 0, 20, 20.5, 3e38, np.inf, np.nan], np.float32)
    theirs = torch.nn.functional.softplus(torch.from_numpy(values)).numpy()
    assert np.allclose(softplus(values), theirs, rtol=1e-6, atol=1e-40, equal_nan=True)
