"""The portable wheel: kernels for each kind of CPU, of which the best is loaded that this one can run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from children import post, serving
from gemma_mtp.convert import Pair
from gemma_mtp.patches import toolchain

FEATURES = toolchain.cpu_features().split()
x86 = pytest.mark.skipif("avx2" not in FEATURES, reason="names variants of x86-64, up to AVX2")
# What is hidden of a CPU, and the variant that is left for it.
LEFT = {
    "avx512f avx_vnni": "haswell",
    "avx2": "piledriver",
    "avx2 fma": "ivybridge",
    "avx2 fma f16c": "sandybridge",
    "avx": "sse42",
    "avx sse4_2": "x64",
}
GENERATE = """
import json, sys
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.native import cpu_library, patched
tokens, stats = {}, {}
for name, drafter in (("mtp", "auto"), ("plain", None)):
    llm = Llama(sys.argv[1], drafter=drafter, n_ctx=256, verbose=False, draft_length=3, n_threads=2)
    for temperature in (0.0, 1.0):
        answer = llm.create_completion("def main(", max_tokens=12, temperature=temperature, seed=7)
        tokens[f"{name} {temperature}"] = answer["choices"][0]["text"]
    stats[name] = llm.stats.accepted
    llm.close()
print(json.dumps({"tokens": tokens, "accepted": stats["mtp"], "library": cpu_library(), "patched": patched()}))
"""


def generate(portable: Path, pair: Pair, before: Sequence[str | Path] = (), **env: str) -> dict[str, Any]:
    """Tokens of a pair by the portable wheel in a process of its own, and the library whose kernels made them."""
    path = os.pathsep.join([str(portable), os.environ.get("PYTHONPATH", "")])
    command = [*before, sys.executable, "-c", GENERATE, pair.target]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "load_backend" not in done.stderr  # verbose is off
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def check(told: dict[str, Any], variant: str, portable: Path) -> None:
    assert Path(told["library"]).name == f"libggml-cpu-{variant}.so"
    assert Path(told["library"]).is_relative_to(portable)
    assert told["patched"] and told["accepted"] > 0
    for temperature in ("0.0", "1.0"):
        assert told["tokens"][f"mtp {temperature}"] == told["tokens"][f"plain {temperature}"] != ""


@x86
@pytest.mark.parametrize("hidden", LEFT)
def test_the_best_variant_that_is_left_makes_the_same_tokens_with_and_without_mtp(
    hidden: str, portable: Path, demo: Pair
) -> None:
    check(generate(portable, demo, GGML_CPU_HIDE=hidden), LEFT[hidden], portable)


@x86
@pytest.mark.parametrize(("cpu", "variant"), [("Nehalem", "sse42"), ("Haswell", "haswell")])
def test_on_an_emulated_cpu(cpu: str, variant: str, portable: Path, demo: Pair) -> None:
    if (emulator := shutil.which("qemu-x86_64")) is None:
        pytest.skip("no qemu-x86_64 here; on Debian it is in qemu-user")
    check(generate(portable, demo, [emulator, "-cpu", cpu]), variant, portable)


def test_each_library_is_there_once(portable: Path) -> None:
    libraries = sorted(path.name for path in (portable / "llama_cpp" / "lib").glob("*.so*"))
    assert len(libraries) == len({name.split(".so")[0] for name in libraries})
    assert {"libllama.so", "libggml.so", "libggml-base.so", "libmtmd.so"} <= set(libraries)
    assert "libggml-cpu.so" not in libraries


def test_llama_server_finds_its_kernels_from_any_folder(
    portable: Path, demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draft = ("-md", demo.drafter, "--spec-type", "draft-mtp", "--spec-draft-adaptive", "off")
    server = portable / "llama_cpp" / "lib" / "llama-server"
    with serving(server, tmp_path / "log", "-m", demo.target, *draft) as address:
        told = post(f"{address}/completion", {"prompt": "def main(", "n_predict": 12, "temperature": 0})
    assert told["content"] and told["timings"]["draft_n_accepted"] > 0
