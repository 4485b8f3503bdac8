"""Models as Ollama itself converts them, which is how its library has them, against our conversion."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from encoders import encoded, make, multimodal, picture
from gemma_mtp.convert import convert_pair
from gemma_mtp.convert.gguf_io.read import Strings, read
from gemma_mtp.convert.gguf_io.types import Type
from gemma_mtp.convert.ollama.api import Client
from gemma_mtp.convert.ollama.store import stored
from library_file import library_checkpoint, write_library_file
from llamas import logits_of, words_of
from ollamas import run
from tiny import SIZES, TEXT, make_drafter, make_pair
from upstream import data

pytestmark = [pytest.mark.ollama, pytest.mark.usefixtures("real")]
# Its converter knows no Gemma4UnifiedForConditionalGeneration.
CONVERTED = [size for size in SIZES if size != "12B"]


def created(name: str, folder: Path, work: Path) -> Path:
    """The file that Ollama makes of a checkpoint."""
    checkpoint = library_checkpoint(folder, work / "checkpoint")
    (work / "Modelfile").write_text(f"FROM {checkpoint}\n")
    assert os.spawnlp(os.P_WAIT, "ollama", "ollama", "create", name, "-f", str(work / "Modelfile")) == 0
    target = stored(Client(), name).target
    assert target is not None
    return target


@pytest.mark.parametrize("size", CONVERTED)
def test_tokens_and_logits_are_those_of_our_conversion(size: str, tmp_path: Path) -> None:
    target, drafter = make_pair(size, tmp_path)
    pair = convert_pair(target, drafter, tmp_path / "out", "BF16")
    theirs = created(size.lower(), target, tmp_path)
    assert words_of(theirs) == words_of(pair.target)
    assert np.array_equal(logits_of(theirs), logits_of(pair.target))
    done = run("ollama", "attach", size.lower(), "--drafter", pair.drafter)
    assert done.exit_code == 0, done.stderr
    assert "drafts on" in done.stdout


@pytest.mark.parametrize("kind", ["E2B", "31B"])
def test_the_tests_write_what_ollama_writes(kind: str, tmp_path: Path) -> None:
    """Keys and tensors of the files that tests/runtime/test_library_file.py is about; pictures are seen alike."""
    folder = make(kind, tmp_path / kind)
    (folder / "processor_config.json").unlink()
    drafter = make_drafter(tmp_path / "drafter", ordered=True)
    pair = convert_pair(folder, drafter, tmp_path / "out", "BF16", mmproj="F16")
    theirs = read(created(kind.lower(), folder, tmp_path))
    ours = read(write_library_file(tmp_path / "sha256-0", pair.target, pair.projector))
    for key, value in ours.metadata.items():
        found = theirs.metadata[key]
        same = found.digest() == value.digest() if isinstance(value, Strings) else np.array_equal(found, value)
        assert same, key
    for name, tensor in ours.tensors.items():
        assert theirs.tensors[name].shape == tensor.shape, name
        if theirs.tensors[name].type == tensor.type:
            # A softplus of theirs is rounded otherwise.
            dtype = np.dtype(np.float32 if tensor.type is Type.F32 else np.uint8)
            left, right = (np.frombuffer(data(each, name), dtype) for each in (theirs, ours))
            assert np.allclose(left, right, rtol=1e-6), name
    assert pair.projector is not None
    rows = []
    for target, projector in ((pair.target, pair.projector), (theirs.path, theirs.path)):
        with multimodal(target, projector) as context:
            rows.append(encoded(context, picture(), TEXT["hidden_size"]))
    assert np.array_equal(rows[0], rows[1])
