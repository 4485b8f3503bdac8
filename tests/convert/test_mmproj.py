"""Projectors against upstream's `--mmproj`, byte for byte, and in llama.cpp's mtmd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from encoders import encoded, make, multimodal, picture
from faulty import edit_weights
from gemma_mtp.convert import MtpError, convert_pair
from gemma_mtp.convert.checkpoint import open_checkpoint
from gemma_mtp.convert.gguf_io.read import read
from gemma_mtp.convert.mmproj import plan_mmproj, write_mmproj
from gemma_mtp.convert.tensor_types import PROJECTOR_QUANTS
from gemma_mtp.runtime.cli.main import main
from hub import run_against, serving
from tiny import TEXT
from upstream import data

KINDS = ["E2B", "31B", "12B"]


def project(folder: Path, path: Path, quant: str = "F16") -> None:
    """Write the projector of a folder, and nothing else."""
    with open_checkpoint(folder) as checkpoint:
        write_mmproj(plan_mmproj(checkpoint, quant), checkpoint, path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("encoders")
    return lambda kind: root / kind if (root / kind).exists() else make(kind, root / kind)


@pytest.fixture(scope="module")
def theirs(made: Callable[[str], Path], upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with upstream's projectors, <kind>-<format>.gguf, all made by one process: it takes seconds to start."""
    root = tmp_path_factory.mktemp("theirs")
    script = upstream / "convert_hf_to_gguf.py"
    runs = [
        [
            str(script),
            str(made(kind)),
            "--mmproj",
            "--outtype",
            quant.lower(),
            "--outfile",
            str(root / f"{kind}-{quant}.gguf"),
        ]
        for kind in KINDS
        for quant in PROJECTOR_QUANTS
    ]
    code = (
        "import json, runpy, sys\n"
        "for sys.argv in json.loads(sys.argv[1]): runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, json.dumps(runs)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(upstream)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("quant", PROJECTOR_QUANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_upstreams_byte_for_byte(
    kind: str, quant: str, made: Callable[[str], Path], theirs: Path, tmp_path: Path
) -> None:
    project(made(kind), tmp_path / "ours.gguf", quant)
    assert (tmp_path / "ours.gguf").read_bytes() == (theirs / f"{kind}-{quant}.gguf").read_bytes()


def test_a_pair_with_its_projector(made: Callable[[str], Path], tiny: dict[str, Path], tmp_path: Path) -> None:
    command = ["convert", str(made("E2B")), str(tiny["ordered"]), "-o", str(tmp_path / "out"), "--mmproj", "-q", "Q8_0"]
    dry = CliRunner().invoke(main, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "mmproj-E2B-F16.gguf" in dry.stdout
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    projector = tmp_path / "out" / "mmproj-E2B-F16.gguf"
    assert projector.name in done.stdout
    project(made("E2B"), tmp_path / "alone.gguf", "F16")
    assert projector.read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:3] == [
        "FROM ./E2B-Q8_0.gguf",
        f"FROM ./{projector.name}",
        f"DRAFT ./{tiny['ordered'].name}-Q8_0.gguf",
    ]
    found = json.loads(CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--json"]).stdout)
    assert {Path(file["file"]).name for file in found["files"]} >= {projector.name, "E2B-Q8_0.gguf"}


def test_a_dry_run_of_a_repository_plans_the_projector(
    made: Callable[[str], Path], tiny: dict[str, Path], tmp_path: Path
) -> None:
    """As of the folder, and without the weights."""
    target, drafter = "google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"
    command = ("-o", "out", "--mmproj", "-q", "Q8_0", "--dry-run", "--json", "--name", "x")
    with serving({target: made("E2B"), drafter: tiny["ordered"]}) as hub:
        done = run_against(hub, tmp_path, "convert", target, *command)
        assert done.returncode == 0, done.stderr
        assert done.stdout == run_against(hub, tmp_path, "convert", made("E2B"), tiny["ordered"], *command).stdout
    assert json.loads(done.stdout)["projector"]["mmproj-x-F16.gguf"]["bytes"] > 0
    assert not list((tmp_path / "hf" / "hub").rglob("*.safetensors"))


def test_formats_split_files_and_a_projector_in_one_run(
    made: Callable[[str], Path], tiny: dict[str, Path], tmp_path: Path
) -> None:
    """The plan names the files that are written; each part has its hashes, and none may be missing."""
    out = tmp_path / "out"
    command = ["convert", str(made("E2B")), str(tiny["ordered"]), "-o", str(out), "-q", "Q4_0", "-q", "Q8_0",
               "--split-max-size", "1M", "--mmproj", "--mmproj-quant", "Q8_0", "--json"]  # fmt: skip
    plan = json.loads(CliRunner().invoke(main, [*command, "--dry-run"]).stdout)
    assert not out.exists()
    assert plan["projector"]["mmproj-E2B-Q8_0.gguf"]["bytes"] > 0
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    wrote = json.loads(done.stdout)
    assert [Path(path).name for path in wrote["files"]] == plan["files"]
    assert Path(wrote["projector"]).name in plan["files"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*plan["files"], "Modelfile"])

    first = Path(wrote["target"])
    parts = sorted(out.glob("E2B-Q4_0-*-of-*.gguf"))
    assert len(parts) > 1 and parts[0] == first
    for place in (out, first):
        found = json.loads(CliRunner().invoke(main, ["verify", str(place), "--json"]).stdout)
        hashed = {Path(file["file"]): (file["hashed"], file["tensors"]) for file in found["files"]}
        assert set(parts) <= set(hashed)
        assert all(count == n for path, (count, n) in hashed.items() if not path.name.startswith("mmproj"))
        assert found["pairs"][str(first)] == wrote["drafter"]
    parts[-1].unlink()
    for place in (out, first):
        done = CliRunner().invoke(main, ["verify", str(place)])
        assert done.exit_code == 1
        assert parts[-1].name in done.stderr


def test_mtmd_reads_an_image(made: Callable[[str], Path], tiny: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp's own multimodal library loads the projector for its target and encodes a picture to finite rows."""
    pair = convert_pair(made("31B"), tiny["dense"], tmp_path, "F16", "F16", mmproj="F16")
    assert pair.projector is not None
    with multimodal(pair.target, pair.projector) as context:
        assert context
        rows = encoded(context, picture(), TEXT["hidden_size"])
    assert len(rows) > 0
    assert np.isfinite(rows).all()
    assert rows.std() > 0


def test_what_has_no_projector(tiny: dict[str, Path], made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(MtpError, match="no projector"):
        convert_pair(tiny["target"], tiny["dense"], tmp_path / "out", mmproj="F16")
    with pytest.raises(MtpError, match="unknown format 'Q4_0'"):
        project(made("31B"), tmp_path / "x.gguf", "Q4_0")
    assert not list(tmp_path.iterdir())


LAYER = "model.vision_tower.encoder.layers.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(f"{LAYER}.mlp.up_proj.linear.weight"), "lacks v.blk.1.ffn_up.weight"),
        (lambda w: w.update({f"{LAYER}.mystery.weight": torch.zeros(4)}), "unknown tensor .*mystery"),
        (lambda w: w[f"{LAYER}.input_layernorm.weight"].fill_(float("nan")), "input_layernorm.* NaN"),
        (lambda w: w[f"{LAYER}.mlp.up_proj.linear.weight"].fill_(1e6), "more than F16"),
        (lambda w: w.update({f"{LAYER}.input_layernorm.weight": torch.zeros(64, dtype=torch.complex64)}), "is C64"),
        (lambda w: w.update({f"{LAYER}.mlp.up_proj.linear.weight": torch.zeros(128, 64).char()}), "is I8"),
        (
            lambda w: w.update({f"{LAYER}.mlp.up_proj.linear.weight": torch.zeros(128, 32)}),
            r"\[128, 32\].*hidden",
        ),
        (
            lambda w: w.update({f"{LAYER}.self_attn.o_proj.linear.weight": torch.zeros(32, 64)}),
            r"\[32, 64\].*hidden",
        ),
    ],
)
def test_a_damaged_encoder(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, made: Callable[[str], Path],
    tiny: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "spoilt"
    shutil.copytree(made("31B"), folder)
    edit_weights(folder, change)
    with pytest.raises(MtpError, match=words):
        convert_pair(folder, tiny["dense"], tmp_path / "out", mmproj="F16")
    assert not (tmp_path / "out").exists()


def test_without_the_image_processors_settings(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(made("31B"), folder)
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(MtpError, match="image_std"):
        project(folder, tmp_path / "x.gguf")


def test_encoders_without_the_prefix(made: Callable[[str], Path], tmp_path: Path) -> None:
    """As some exports have them: the projector is the same, and so it is with "model." before some names alone."""
    project(made("E2B"), tmp_path / "wanted.gguf")
    folder = tmp_path / "E2B"
    shutil.copytree(made("E2B"), folder)
    for start in ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."):

        def rename(weights: dict[str, torch.Tensor], start: str = start) -> None:
            for name in [name for name in weights if name.startswith(start)]:
                weights[name.removeprefix("model.")] = weights.pop(name)

        edit_weights(folder, rename)
        project(folder, tmp_path / f"{start}gguf")
        wanted, found = read(tmp_path / "wanted.gguf"), read(tmp_path / f"{start}gguf")
        assert {name: data(found, name) for name in found.tensors} == {
            name: data(wanted, name) for name in wanted.tensors
        }


PROCESSOR = "processor_config.json"
MEANS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (PROCESSOR, {"image_processor": MEANS | {"image_mean": "a"}}, r"processor_config.json: image_mean is 'a', wa"),
        (PROCESSOR, {"image_processor": MEANS | {"image_mean": "abc"}}, "image_mean is 'abc', wanted 3 numbers"),
        (PROCESSOR, {"image_processor": MEANS | {"image_std": [1, 2]}}, r"image_std is \[1, 2\], wanted 3 numbers"),
        (PROCESSOR, {"image_processor": MEANS | {"image_std": [1, 2, "3"]}}, "image_std is .*, wanted 3 numbers"),
        (PROCESSOR, {"image_processor": MEANS | {"image_std": [1, 2, 10**400]}}, "image_std is .*, wanted 3 numbers"),
        (PROCESSOR, {"image_processor": MEANS | {"image_std": [1, 0.0, 1]}}, "image_std is .*, and pixels are divided"),
        (PROCESSOR, {"image_processor": None}, "image_processor of processor_config.json has image_mean"),
        (PROCESSOR, {"image_processor": "x"}, "processor_config.json: image_processor is 'x', wanted an object"),
        ("config.json", {"intermediate_size": None}, "vision_config has no intermediate_size"),
        ("config.json", {"intermediate_size": "64"}, "vision_config.intermediate_size is '64', wanted a whole number"),
        ("config.json", {"num_hidden_layers": 1e9}, "vision_config.num_hidden_layers is 1000000000.0, wanted"),
        ("config.json", {"patch_size": True}, "vision_config.patch_size is True, wanted a whole number"),
        ("config.json", {"patch_size": 5}, "patch_embedder.input_proj.weight' has the shape"),
        ("config.json", {"rms_norm_eps": "x"}, "vision_config.rms_norm_eps is 'x', wanted a number"),
    ],
)
def test_settings_of_another_kind(
    file: str, values: dict[str, Any], words: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Refused at planning, by file and key; None stands for a key that is not there."""
    folder = tmp_path / "spoilt"
    shutil.copytree(made("31B"), folder)
    (folder / "preprocessor_config.json").unlink()
    if file == "config.json":
        config = json.loads((folder / file).read_text())
        changed = config["vision_config"] | values
        config["vision_config"] = {key: value for key, value in changed.items() if value is not None}
        values = config
    (folder / file).write_text(json.dumps(values))
    with open_checkpoint(folder) as checkpoint, pytest.raises(MtpError, match=words) as caught:
        plan_mmproj(checkpoint)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_null_that_another_file_makes_up_for(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "31B"
    shutil.copytree(made("31B"), folder)
    (folder / PROCESSOR).write_text('{"image_processor": null, "image_mean": null}')
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["rms_norm_eps"] = None
    (folder / "config.json").write_text(json.dumps(config))
    project(folder, tmp_path / "x.gguf")
    assert read(tmp_path / "x.gguf").metadata["clip.vision.image_std"].tolist() == [1, 1, 1]
