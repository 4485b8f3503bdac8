"""The commands around a conversion, as a user types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from children import GUARD, MAIN
from click.testing import CliRunner, Result
from gemma_mtp.convert import Pair, convert_pair, integrity, link, write
from gemma_mtp.convert.modelfile import SMALL, modelfile
from gemma_mtp.runtime.cli.main import COMMANDS, main

OLLAMA = ("create", "attach", "detach", "list", "doctor")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_convert_says_what_it_wrote(tiny: dict[str, Path], tmp_path: Path) -> None:
    done = run("convert", tiny["target"], tiny["ordered"], "-o", tmp_path, "-q", "q4_k_m", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said.pop("files") == [said["target"], said["drafter"]]
    wrote = {key: Path(value).name for key, value in said.items()}
    assert wrote == {
        "target": "tiny-target-Q4_K_M.gguf",
        "drafter": "tiny-ordered-Q8_0.gguf",
        "modelfile": "Modelfile",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(wrote.values())
    table = run("convert", tiny["target"], tiny["ordered"], "-o", tmp_path, "--name", "x", "--force").stdout
    assert "x-Q4_K_M.gguf" in table
    assert "x-assistant-Q8_0.gguf" in table


def test_the_same_input_gives_the_same_bytes(tiny: dict[str, Path], tmp_path: Path) -> None:
    pairs = [convert_pair(tiny["target"], tiny["ordered"], tmp_path / name, "Q4_0") for name in "ab"]
    for role in ("target", "drafter", "modelfile"):
        first, second = (getattr(pair, role).read_bytes() for pair in pairs)
        assert first == second


def test_hashes_are_made_while_writing(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No output is read again, and hashes are right when pieces of a tensor are done in another order than they lie."""
    formats = ("BF16", "Q4_0"), "Q8_0"
    wanted = convert_pair(tiny["target"], tiny["ordered"], tmp_path / "a", *formats, split_max_size=1_000_000)
    made, piece = threading.Semaphore(0), write._piece

    def late(rows: Any, *arguments: Any) -> Any:
        """The first piece of the embeddings is made after the others that may be begun."""
        if rows.name == "token_embd.weight" and rows.start == 0:
            made.acquire(timeout=GUARD)
        done = piece(rows, *arguments)
        if rows.name == "token_embd.weight" and rows.start > 0:
            made.release()
        return done

    def read_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("an output was read again")

    with monkeypatch.context() as patch:
        patch.setattr(write, "PIECE", 1 << 14)
        patch.setattr(write, "AHEAD", 1 << 17)
        patch.setattr(os, "cpu_count", lambda: 4)
        patch.setattr(write, "_piece", late)
        patch.setattr(integrity, "_looked_at", read_again)
        found = convert_pair(tiny["target"], tiny["ordered"], tmp_path / "b", *formats, split_max_size=1_000_000)
    assert len(found.files) > 4
    for first, second in zip(wanted.files, found.files, strict=True):
        assert first.read_bytes() == second.read_bytes()
    checked = integrity.verify_files(tmp_path / "b")["files"]
    assert all(each["hashed"] == each["tensors"] > 0 for each in checked)


def test_inspect(demo: Pair) -> None:
    found = json.loads(run("inspect", demo.target, "--json").stdout)
    assert found["architecture"] == "gemma4"
    assert found["link"]["drafter"] == str(demo.drafter)
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 3072
    assert {tensor["name"] for tensor in found["tensors"]} == set(link.read_header(demo.target).tensors)
    shown = run("inspect", demo.drafter, "--tensors").stdout
    assert "nextn.pre_projection.weight" in shown
    assert "gemma4-assistant" in shown


def test_inspect_of_a_checkpoint(tiny: dict[str, Path]) -> None:
    """What a conversion leaves out on purpose, with the reason, and nothing else is missing."""
    found = json.loads(run("inspect", tiny["ordered"], "--json").stdout)
    assert found["architecture"] == "gemma4-assistant"
    assert set(found["dropped"]) == {"masked_embedding.centroids.weight", "masked_embedding.token_ordering"}
    assert all("mtp.ordered" in reason for reason in found["dropped"].values())
    assert set(found["dropped"]) < {tensor["name"] for tensor in found["tensors"]}
    shown = run("inspect", tiny["ordered"], "--tensors").stdout
    assert "left out: masked_embedding.centroids.weight and 1 more: " in shown
    assert "model.layers.0.self_attn.q_proj.weight" in shown
    assert json.loads(run("inspect", tiny["target"], "--json").stdout)["dropped"] == {}
    assert run("inspect", tiny["target"].parent).exit_code == 1


def test_verify_accepts_what_convert_wrote(demo: Pair) -> None:
    found = json.loads(run("verify", demo.target.parent, "--json").stdout)
    assert found["pairs"] == {str(demo.target): str(demo.drafter)}
    assert "drafts for" in run("verify", demo.target.parent).stdout


def test_verify_names_what_is_wrong(demo: Pair, tmp_path: Path) -> None:
    for path in (demo.target, demo.drafter):
        shutil.copy(path, tmp_path)
    target, drafter = tmp_path / demo.target.name, tmp_path / demo.drafter.name
    tensor = link.read_header(target).tensors["blk.0.attn_norm.weight"]
    whole = target.read_bytes()
    target.write_bytes(whole[: tensor.offset] + b"\xff" * 4 + whole[tensor.offset + 4 :])
    done = run("verify", tmp_path)
    assert done.exit_code == 1
    assert "blk.0.attn_norm.weight" in done.stderr
    target.write_bytes(whole[:-100])
    assert "cut off" in run("verify", tmp_path).stderr
    target.write_bytes(whole)
    drafter.unlink()
    assert "no linked drafter" in run("verify", tmp_path).stderr
    target.unlink()
    assert "no GGUF file" in run("verify", tmp_path).stderr


def parsed(text: str) -> list[tuple[str, str]]:
    """Commands of a Modelfile: one a line, as ollama's parser reads those without quotes."""
    known = "FROM|DRAFT|PARAMETER|TEMPLATE|SYSTEM|ADAPTER|LICENSE|MESSAGE|RENDERER|PARSER|REQUIRES"
    commands = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(rf"({known}) (\S.*)", line)
        assert found is not None, line
        commands.append((found[1], found[2]))
    return commands


def test_the_modelfile_names_both_files(demo: Pair) -> None:
    commands = parsed(demo.modelfile.read_text())
    for command, path in (("FROM", demo.target), ("DRAFT", demo.drafter)):
        (named,) = [argument for name, argument in commands if name == command]
        assert (demo.modelfile.parent / named).resolve() == path.resolve()
    parameters = dict(argument.split(" ", 1) for name, argument in commands if name == "PARAMETER")
    sampling = {"temperature": "1", "top_k": "64", "top_p": "0.95"}
    assert parameters == {"stop": "<turn|>", **sampling, "draft_num_predict": "4"}
    assert run("modelfile", demo.modelfile.parent).stdout == demo.modelfile.read_text()


def test_the_modelfile_takes_the_checkpoints_sampling() -> None:
    commands = parsed(modelfile(["t.gguf"], ["d.gguf"], {"temperature": 0.7, "top_k": 20}, SMALL))
    assert ("PARAMETER", "temperature 0.7") in commands
    assert ("PARAMETER", "top_k 20") in commands
    assert ("PARAMETER", "top_p 0.95") in commands


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS], *[["ollama", name] for name in OLLAMA]])
def test_help_has_an_example(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    if command != ["ollama"]:
        assert re.search(r"Examples?:\n\s+gemma-mtp ", done.stdout), done.stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    program = [sys.executable, "-c", MAIN]
    command = ["inspect", str(tmp_path / "none.gguf")]
    quiet, loud = (
        subprocess.run([*program, *options, *command], capture_output=True, text=True, check=False)
        for options in ([], ["--debug"])
    )
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert quiet.returncode == loud.returncode == 1
