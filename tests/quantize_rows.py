"""Rows as Q8_K, which K-quants are multiplied with, by a given libggml, for tests/patches/test_kernels.py.

    python tests/quantize_rows.py LIBRARIES ROWS.npy

ROWS are float32, of whole blocks of 256 values. Prints the number of bytes that differ from those of the reference.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from mul_mat import Ggml

LENGTH, SIZE = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_K]


def main() -> None:
    ggml, rows = Ggml(Path(sys.argv[1])), np.load(sys.argv[2])
    made = []
    for name in ("quantize_row_q8_K", "quantize_row_q8_K_ref"):
        blocks = np.zeros(rows.size // LENGTH * SIZE, np.uint8)  # the reference leaves sums of zeros as they were
        places = [ctypes.c_void_p(array.ctypes.data) for array in (rows, blocks)]
        ggml(name, None, *places, ctypes.c_int64(rows.size))
        made.append(blocks)
    assert made[1].any()
    print(int((made[0] != made[1]).sum()))


if __name__ == "__main__":
    main()
