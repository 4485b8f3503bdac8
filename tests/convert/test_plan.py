"""Plans at the true shapes, and files that are split."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import shapes
from click.testing import CliRunner
from gemma_mtp.convert import convert_pair, link, plan
from gemma_mtp.convert.checkpoint import Source
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.cli.main import main
from tiny import PAIR
from upstream import data

# Parameters in billions of the text models, and gigabytes in BF16, worked out by hand from the published shapes.
PARAMETERS = {"E2B": 4.63, "E4B": 7.46, "12B": 11.91, "26B-A4B": 25.23, "31B": 30.70}


@pytest.mark.parametrize("size", PARAMETERS)
def test_plans_of_the_true_shapes_total_the_right_sizes(size: str) -> None:
    config = shapes.parsed(shapes.target_json(size))
    planned = plan.plan(config, shapes.index(config, shared=False), "BF16")
    assert planned.n_params / 1e9 == pytest.approx(PARAMETERS[size], abs=0.01)
    assert planned.n_bytes / 1e9 == pytest.approx(2 * PARAMETERS[size], rel=0.002)


def test_a_dry_run_of_a_sparse_31b_prints_the_plan(tmp_path: Path) -> None:
    folders = tmp_path / "gemma-4-31B-it", tmp_path / "gemma-4-31B-it-assistant"
    for folder, config in zip(folders, (shapes.target_json("31B"), shapes.drafter_json("31B")), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_bytes((PAIR / "gemma-4-demo" / "tokenizer.json").read_bytes())
        index = shapes.index(shapes.parsed(config))
        if "assistant" not in folder.name:
            index["model.vision_tower.x.weight"] = Source(folder, (4, 4), "BF16")
        shapes.sparse_safetensors(folder / "model.safetensors", index)
    command = ["convert", *map(str, folders), "-o", str(tmp_path / "out"), "-q", "Q4_K_M", "-q", "Q8_0", "--dry-run"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "image input" in shown.stdout
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    (first, second) = found["targets"].values()
    assert first["parameters"] == second["parameters"] == pytest.approx(30.70e9, rel=0.001)
    assert first["bytes"] / 1e9 == pytest.approx(18.7, abs=0.5)
    assert second["bytes"] / first["parameters"] == pytest.approx(34 / 32, rel=0.001)
    assert not (tmp_path / "out").exists()


def test_a_split_pair_holds_the_same_and_runs_with_its_drafter(
    sizes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    whole = convert_pair(*sizes["E2B"], tmp_path / "whole", "Q8_0")
    split = convert_pair(*sizes["E2B"], tmp_path / "split", "Q8_0", split_max_size=1_500_000)
    parts = [path for path in split.files if "assistant" not in path.name]
    assert len(parts) > 2
    assert parts[0].name.endswith(f"-00001-of-{len(parts):05d}.gguf")
    headers = [link.read_header(path) for path in parts]
    one = link.read_header(whole.target)
    assert [name for header in headers for name in header.tensors] == list(one.tensors)
    for header in headers:
        for name in header.tensors:
            assert data(header, name) == data(one, name)
    assert link.find_drafter(split.target) == split.drafter
    texts = []
    for path in (whole.target, split.target):
        with closing(Llama(path, n_ctx=256, draft_length=3, n_threads=1, n_threads_batch=1, verbose=False)) as llm:
            texts.append(llm("import os\n", max_tokens=16, temperature=0.0)["choices"][0]["text"])
            assert llm.stats.drafted > 0
    assert texts[0] == texts[1]


def test_several_outputs_of_one_run_are_those_of_single_runs(
    sizes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    both = convert_pair(*sizes["26B-A4B"], tmp_path / "both", ["Q4_0", "Q8_0"], ["Q4_0", "BF16"])
    assert len(both.files) == 4
    for quant, path in zip(("Q4_0", "Q8_0"), both.files, strict=False):
        single = convert_pair(*sizes["26B-A4B"], tmp_path / quant, quant, "Q4_0")
        assert path.read_bytes() == single.target.read_bytes()
