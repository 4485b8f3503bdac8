"""Converted files against upstream's own converter and quantizer, run on the same folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gemma_mtp.convert import convert_pair, link, names, plan
from gemma_mtp.convert.checkpoint import Source, TargetConfig
from gguf import GGUFValueType, GGUFWriter
from tiny import PAIR

# Keys that upstream writes otherwise, with the reason. There is none; ours of the pair contract come on top.
INTENDED: dict[str, str] = {}

Upstream = Callable[[Path, str], Path]


@pytest.fixture(scope="session")
def converted(upstream: Path, llama_quantize: Path, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """Upstream's file of a folder in a format: its converter, and for quantized formats its quantizer after that."""
    root = tmp_path_factory.mktemp("upstream")

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def make(folder: Path, quant: str) -> Path:
        path = root / f"{folder.name}-{quant}.gguf"
        if path.exists():
            return path
        if quant in ("F32", "F16", "BF16"):
            script = upstream / "convert_hf_to_gguf.py"
            run(sys.executable, script, folder, "--outtype", quant.lower(), "--outfile", path)
        else:
            run(llama_quantize, make(folder, "BF16"), path, quant, "2")
        return path

    return make


def data(header: link.Header, name: str) -> bytes:
    tensor = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.size)


def plain(value: object) -> object:
    if isinstance(value, link.Strings):
        return value.digest()
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_same(ours: Path, theirs: Path) -> None:
    """Every tensor byte-equal, every key equal but `mtp.*`."""
    one, other = link.read_header(ours), link.read_header(theirs)
    assert sorted(one.tensors) == sorted(other.tensors)
    for name, tensor in one.tensors.items():
        wanted = other.tensors[name]
        assert (tensor.type, tensor.shape) == (wanted.type, wanted.shape), name
        assert data(one, name) == data(other, name), name
    metadata = {key: plain(value) for key, value in one.metadata.items() if not key.startswith("mtp.")}
    wanted_metadata = {key: plain(value) for key, value in other.metadata.items()}
    assert {k: v for k, v in metadata.items() if k not in INTENDED} == {
        k: v for k, v in wanted_metadata.items() if k not in INTENDED
    }


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


def test_a_dense_drafter_is_upstreams(tiny: dict[str, Path], converted: Upstream, tmp_path: Path) -> None:
    pair = convert_pair(tiny["target"], tiny["dense"], tmp_path, "F32", "Q8_0")
    assert_same(pair.target, converted(tiny["target"], "F32"))
    assert_same(pair.drafter, converted(tiny["dense"], "Q8_0"))
    assert link.KEY_CENTROIDS not in link.read_header(pair.drafter).metadata


@pytest.mark.skipif(os.name != "posix", reason="needs sparse files")
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_ff", "n_kv", "period", "shared", "wide"),
    [(35, 1536, 6144, 1, 5, 20, True), (42, 2560, 10240, 2, 6, 18, False)],
    ids=["E2B", "E4B"],
)
def test_types_of_the_real_shapes_are_the_quantizers(
    n_layer: int, n_embd: int, n_ff: int, n_kv: int, period: int, shared: int, wide: bool, quant: str,
    llama_quantize: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """A sparse file of E2B's and E4B's shapes, which llama-quantize --dry-run plans without reading a weight."""
    full = tuple("full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n_layer))
    config = TargetConfig(
        n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=8, n_kv=n_kv, n_kv_full=None, head_dim=256, head_dim_full=512,
        layer_types=full, sliding_window=512, n_kv_shared=shared, per_layer_input=256, double_wide_mlp=wide,
        context_length=131072, rms_eps=1e-6, softcap=30.0, rope_theta=1e6, rope_theta_sliding=1e4, partial_rotary=0.25,
        partial_rotary_sliding=1.0, vocab_size=262144,
    )  # fmt: skip
    hf = {gguf: name for name, gguf in hugging_face_names(n_layer).items()}
    index = {hf[name]: Source(tmp_path, shape, "BF16") for name, shape in plan.shapes(config).items()}
    planned = plan.plan(config, index, quant)

    path = tmp_path / "sparse.gguf"
    writer = GGUFWriter(path, "gemma4")
    for key, (kind, value) in planned.parameters.items():
        if kind is GGUFValueType.ARRAY:
            writer.add_array(f"gemma4.{key}", value)
        else:
            writer.add_key_value(f"gemma4.{key}", value, kind)
    tensors = plan.plan(config, index, "BF16").tensors
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + sum(tensor.n_bytes + 32 for tensor in tensors))

    done = subprocess.run([llama_quantize, "--dry-run", path, quant], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    theirs = {}
    for line in said.splitlines():
        if "] " in line and "type =" in line:
            name = line.split("]", 1)[1].split(" - [")[0].strip()
            source = line.split("type =")[1].split(",")[0].strip()
            theirs[name] = (line.rsplit("(", 1)[1].split(")")[0] if "->" in line else source).lower()
    assert theirs == {tensor.name: tensor.type.name.lower() for tensor in planned.tensors}


def hugging_face_names(n_layer: int) -> dict[str, str]:
    """Hugging Face name to GGUF name of everything a target may hold."""
    found = {f"model.language_model.{left}": right for left, right in names.MODEL.items()}
    for layer in range(n_layer):
        for left, right in names.LAYER.items():
            found[f"model.language_model.layers.{layer}.{left}"] = f"blk.{layer}.{right}"
    return found
