"""Folders that somebody has spoilt, and what converting them must end with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from gemma_mtp.runtime.cli.main import main
from safetensors.torch import load_file, save_file

Folders = tuple[Path, Path]


def refused(target: Path, drafter: Path, out: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    """Converting ends with one line that holds these words, a status of 1, and no output at all."""
    done = CliRunner().invoke(main, ["convert", str(target), str(drafter), "-o", str(out), *options])
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert not done.stdout
    assert not out.exists()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def experts_apart(weights: dict[str, torch.Tensor]) -> None:
    """Each expert's matrices as tensors of their own, as some exports have them."""
    for name in [name for name in weights if ".experts." in name]:
        tensor, start = weights.pop(name), name.rpartition(".experts.")[0]
        for number, matrix in enumerate(tensor):
            if "gate_up" in name:
                half = len(matrix) // 2
                weights[f"{start}.experts.{number}.gate_proj.weight"] = matrix[:half].clone()
                weights[f"{start}.experts.{number}.up_proj.weight"] = matrix[half:].clone()
            else:
                weights[f"{start}.experts.{number}.down_proj.weight"] = matrix.clone()


def converting(pair: Folders, out: Path, code: str) -> list[object]:
    """A conversion to F32 by a program that runs `main`."""
    return [sys.executable, "-c", code, "convert", *pair, "-o", out, "-q", "F32"]
