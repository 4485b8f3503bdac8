"""llama-cpp-python's own tests, from the pinned sdist, with our Llama in place of theirs on the bundled pair."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from children import environment
from gemma_mtp.convert import Pair
from gemma_mtp.patches import source

# Left out, in pytest's -k notation, and why.
LEFT_OUT = {
    "test_real_model": "calls llama.cpp below Llama, and asserts token ids of Qwen3.5-0.8B",
    "test_real_llama": "two tests assert what Qwen3.5-0.8B says, one wants a model that pools its embeddings",
    "recurrent": "five tests that need a recurrent model",
    "hybrid": "five tests that need a hybrid model",
}
VOCAB = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests, and the vocabulary that they name."""
    work = tmp_path_factory.mktemp("sdist")
    tree = source.unpack(work, "tests/", VOCAB)
    assert (tree / VOCAB).exists()
    return tree


def test_their_tests_pass_with_ours(demo: Pair, sdist: Path, tmp_path: Path) -> None:
    here = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "with_ours", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(sdist), "-k", f"not ({' or '.join(LEFT_OUT)})"]
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    env = environment(tmp_path, PYTHONPATH=path, GEMMA_MTP_TARGET=str(demo.target), HF_HUB_OFFLINE="1")
    done = subprocess.run(command, cwd=sdist, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counted = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", done.stdout)
    }
    drafters = re.search(r"with a drafter: (\d+)", done.stdout)
    assert counted == {"passed": 12, "deselected": 14}
    assert drafters is not None
    assert int(drafters[1]) >= 10
