"""Every format of llama-quantize on every size, with and without an importance matrix: same types, same blocks.

`make check-formats` runs the whole table and prints it; `make test` runs the part that is quick.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gemma_mtp.convert import MtpError, convert_pair, link, plan
from gemma_mtp.convert.checkpoint import open_checkpoint
from gemma_mtp.convert.imatrix import read_imatrix
from gemma_mtp.convert.tensor_types import DEFAULT, QUANTS, Options, needs_imatrix, parse_tensor_type, parse_type
from gguf import GGUFWriter
from gguf_files import finish
from tiny import SIZES
from upstream import Upstream, assert_same

QUANTIZED = [name for name, quant in QUANTS.items() if quant.quantized]
QUICK = {"E2B": ["Q2_K", "Q3_K_M", "Q5_K_S", "IQ4_XS", "TQ2_0", "Q2_0"], "26B-A4B": ["MXFP4_MOE", "Q4_K_M", "IQ2_S"]}
TABLE: dict[tuple[str, bool], dict[str, str]] = {}

Sizes = dict[str, tuple[Path, Path]]


def weights(target: Path) -> dict[str, np.ndarray]:
    """Random importance for every matrix of a converted file, [experts, row length]."""
    random = np.random.default_rng(5)
    found = {}
    for name, tensor in link.read_header(target).tensors.items():
        if len(tensor.shape) > 1 and not name.startswith(("token_embd", "per_layer_token_embd")):
            experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
            found[name] = random.gamma(2.0, size=(experts, tensor.shape[0])).astype(np.float32)
    return found


def write_gguf(path: Path, found: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["random.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in found.items():
        counts = np.arange(len(values), dtype=np.float32)[:, None] * 7 + (len(values) == 1)
        writer.add_tensor(f"{name}.in_sum2", values * np.maximum(counts, 1))
        writer.add_tensor(f"{name}.counts", counts)
    finish(writer)
    return path


def write_legacy(path: Path, found: dict[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(found)))
        for name, values in found.items():
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, values.size))
            file.write((values * 3).tobytes())
        file.write(struct.pack("<ii", 3, 10) + b"random.txt")
    return path


@pytest.fixture(scope="session")
def matrices(sizes: Sizes, converted: Upstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imatrix")
    return {size: write_gguf(root / f"{size}.gguf", weights(converted(sizes[size][0], "BF16"))) for size in SIZES}


def compare(size: str, quants: list[str], matrix: Path | None, sizes: Sizes, converted: Upstream, out: Path) -> None:
    """All formats in one pass of ours, each against a run of llama-quantize."""
    cells = TABLE.setdefault((size, matrix is not None), {})
    possible = []
    options = Options(imatrix=matrix is not None)
    with open_checkpoint(sizes[size][0]) as checkpoint:
        for quant in quants:
            try:
                plan.plan(checkpoint.config, checkpoint.index, quant, options)
                possible.append(quant)
            except MtpError as problem:
                cells[quant] = "refused"
                # Rows of 32 fit no block of Q1_0, for which llama.cpp has no substitute.
                assert ("importance matrix" in str(problem)) is (quant != "Q1_0"), problem
                refused: list[str | Path] = [
                    converted.quantizer,
                    converted(sizes[size][0], "BF16"),
                    out / "refused.gguf",
                    quant,
                ]
                refused[1:1] = ["--imatrix", matrix] if matrix else []
                assert subprocess.run(refused, capture_output=True, check=False).returncode != 0
    command = ("--imatrix", matrix) if matrix else ()
    # An importance matrix is of a target: llama-imatrix cannot run a drafter.
    drafted = ["Q8_0"] if matrix else possible
    pair = convert_pair(*sizes[size], out / size, possible, drafted, imatrix=matrix)
    for quant, path in zip(possible, pair.files, strict=False):
        assert_same(path, converted(sizes[size][0], quant, *command))
        cells[quant] = "equal"
    for quant, path in zip(drafted, pair.files[len(possible) :], strict=True):
        assert_same(path, converted(sizes[size][1], quant))


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("size", QUICK)
def test_some_formats(
    size: str, imatrix: bool, sizes: Sizes, matrices: dict[str, Path], converted: Upstream, tmp_path: Path
) -> None:
    quants = [q for q in QUICK[size] if imatrix or q != "IQ2_S"]
    compare(size, quants, matrices[size] if imatrix else None, sizes, converted, tmp_path)


@pytest.mark.formats
@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("size", SIZES)
def test_every_format(
    size: str, imatrix: bool, sizes: Sizes, matrices: dict[str, Path], converted: Upstream, tmp_path: Path
) -> None:
    compare(size, QUANTIZED, matrices[size] if imatrix else None, sizes, converted, tmp_path)
    for (each, matrix), cells in TABLE.items():
        if (each, matrix) == (size, imatrix):
            print(f"{size:8} {'imatrix' if matrix else 'plain':8} " + " ".join(f"{q}:{v}" for q, v in cells.items()))


def test_legacy_and_gguf_matrices_are_the_same(
    sizes: Sizes, converted: Upstream, matrices: dict[str, Path], tmp_path: Path
) -> None:
    found = weights(converted(sizes["E2B"][0], "BF16"))
    legacy = read_imatrix(write_legacy(tmp_path / "old.dat", found))
    new = read_imatrix(matrices["E2B"])
    assert (legacy.dataset, legacy.n_chunks) == (new.dataset, new.n_chunks) == ("random.txt", 3)
    assert all(np.allclose(values, new.weights[name]) for name, values in legacy.weights.items())
    pair = convert_pair(*sizes["E2B"], tmp_path / "out", "IQ3_XXS", imatrix=tmp_path / "old.dat")
    assert_same(pair.target, converted(sizes["E2B"][0], "IQ3_XXS", "--imatrix", tmp_path / "old.dat"))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--pure",), Options(pure=True)),
        (
            ("--token-embedding-type", "q5_1", "--tensor-type", "PER_LAYER_TOKEN_EMBD=q4_1"),
            Options((parse_tensor_type("PER_LAYER_TOKEN_EMBD=q4_1"),), parse_type("q5_1")),
        ),
        (("--output-tensor-type", "q8_0"), Options(output_tensor=parse_type("q8_0"))),
        (
            ("--tensor-type", r"blk\.[01]\.ffn_down=q8_0", "--tensor-type", "ffn_(up|down)=iq4_nl"),
            Options((parse_tensor_type(r"blk\.[01]\.ffn_down=q8_0"), parse_tensor_type("ffn_(up|down)=iq4_nl"))),
        ),
    ],
    ids=["pure", "embedding", "output", "patterns"],
)
def test_options_mean_what_llama_quantize_means(
    arguments: tuple[str, ...], options: Options, sizes: Sizes, converted: Upstream, tmp_path: Path
) -> None:
    pair = convert_pair(*sizes["E2B"], tmp_path / "out", "Q4_K_M", options=options)
    theirs = tmp_path / "theirs.gguf"
    converted.quantize(converted(sizes["E2B"][0], "BF16"), theirs, "Q4_K_M", *arguments)
    assert_same(pair.target, theirs)


def test_low_formats_ask_for_a_matrix(sizes: Sizes) -> None:
    assert needs_imatrix("blk.0.attn_q.weight", QUANTS["IQ2_XXS"].base, "IQ2_XXS")
    with open_checkpoint(sizes["E2B"][0]) as checkpoint, pytest.raises(MtpError, match="--imatrix"):
        plan.plan(checkpoint.config, checkpoint.index, "IQ2_XXS", DEFAULT)
