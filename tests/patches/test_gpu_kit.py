"""The script of the GPU kit: what is missing is told, the other steps run, and a run that is killed leaves results.

With programs that only pretend; `make check-gpu-kit` runs the packed kit itself, without network, from its archive.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "gpu"
ARCHIVE = ROOT / "build" / "gpu-kit.tar.xz"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kit is for Linux")
PROGRAMS = ("llama-server", "test-backend-ops")
LOOPBACK = 'ip link set lo up 2>/dev/null; exec "$@"'


def program(path: Path, text: str = "echo version 1") -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit whose programs say what is asked of them and do nothing."""
    made = tmp_path / "gpu-kit"
    for folder in ("bin/ours", "bin/stock", "bin/fallback", "pair", "tests", "python"):
        (made / folder).mkdir(parents=True)
    for name in ("run.sh", "table.py"):
        shutil.copy2(HERE / name, made / ("tests" if name == "table.py" else "") / name)
    (made / "kit.json").write_text('{"made": "today", "commit": "c", "patches": 1, "libggml_cuda": null}')
    (made / "stock-key").write_text("stock")
    for name in PROGRAMS:
        program(made / "bin" / "ours" / name)
    program(made / "bin" / "ours" / "llama-bench", "echo '[]'")
    return made


def run(
    kit: Path, seconds: int = 60, network: bool = True, python: str = "none", env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run the script in a bare environment and an empty folder; returns what it wrote, its status and its output."""
    here = kit.parent / "here"
    here.mkdir(exist_ok=True)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(here), "GPU_KIT_PYTHON": python, "GPU_KIT_SECONDS": str(seconds)}
    command = ["bash", str(kit / "run.sh")]
    if not network:
        command = ["unshare", "-n", "bash", "-c", LOOPBACK, "run", *command]
    done = subprocess.run(command, cwd=here, env={**bare, **(env or {})}, capture_output=True, text=True, timeout=1200)
    assert sorted(path.name for path in (here / "out").iterdir()) == ["log.txt", "results.json", "table.txt"]
    results: dict[str, Any] = json.loads((here / "out" / "results.json").read_text())
    return results | {"status": done.returncode, "output": done.stdout + done.stderr}


def by_name(results: dict[str, Any]) -> dict[str, Any]:
    return {step["step"]: step for step in results["steps"]}


def without_python(kit: Path) -> dict[str, str]:
    """An environment whose PATH has everything but Python."""
    tools = kit.parent / "tools"
    tools.mkdir()
    for folder in ("/bin", "/usr/bin"):
        for path in Path(folder).iterdir():
            if not path.name.startswith(("python", "pypy", "nvcc")) and not (tools / path.name).exists():
                (tools / path.name).symlink_to(path)
    return {"PATH": str(tools), "GPU_KIT_SEARCH": ""}


def test_what_is_missing_is_told_and_the_rest_runs(kit: Path) -> None:
    found = run(kit, env=without_python(kit))
    steps = by_name(found)
    assert found["dry"] is True and found["kit"]["commit"] == "c"
    assert steps["devices"]["status"] == "skipped" and "no GPU" in steps["devices"]["said"]
    assert steps["programs"]["status"] == steps["operations"]["status"] == "passed"
    for name in ("tokens", "drafts", "head", "graphs", "bench-E2B", "bench-E2B-stock"):
        assert steps[name]["status"] == "skipped" and "no Python" in steps[name]["said"], name
    assert steps["server"]["status"] == "failed"  # it pretends
    assert found["failures"] == 1 and found["status"] == 1


def test_a_program_that_does_not_start_is_told(kit: Path) -> None:
    program(kit / "bin" / "ours" / "llama-server", 'echo "no such \\"library\\""; exit 1')
    env = without_python(kit)
    step = by_name(run(kit, env=env))["programs"]
    assert step["status"] == "failed"
    assert "this kit has no sources" in step["said"]
    (kit / "source").mkdir()
    step = by_name(run(kit, env=env))["programs"]
    assert step["status"] == "failed"
    assert step["said"].endswith("there is no python3")


def test_a_gpu_that_llama_cpp_does_not_see_is_no_gpu(kit: Path) -> None:
    """Nothing that is meant for a GPU is measured on the CPU without a word."""
    env = without_python(kit)
    program(Path(env["PATH"]) / "nvidia-smi", "echo 'GPU 0: pretended'")
    found = run(kit, env=env)
    steps = by_name(found)
    assert (found["dry"], found["gpu"]) == (False, "GPU 0: pretended")
    assert steps["devices"]["status"] == "passed"
    assert steps["programs"]["status"] == "failed"
    assert {steps[f"bench-{shape}"]["status"] for shape in ("E2B", "31B")} == {"skipped"}
    assert "does not see the GPU" in steps["bench-31B"]["said"]
    program(kit / "bin" / "ours" / "llama-server", "echo CUDA0: pretended")
    program(kit / "bin" / "ours" / "test-backend-ops", 'shift; echo "asked: $*"; echo "1/1 tests passed"')
    found = run(kit, env=env)
    steps = by_name(found)
    assert steps["programs"]["said"] == "as packed"
    assert "no Python" in steps["bench-31B"]["said"]
    assert steps["operations"]["said"] == "1/1 tests passed,1/1 tests passed"
    assert "asked: -j" in (kit.parent / "here" / "out" / "log.txt").read_text()
    assert found["status"] == 1  # what was skipped is not passed


def test_a_step_ends_at_its_limit_and_the_results_are_there(kit: Path) -> None:
    program(kit / "bin" / "ours" / "test-backend-ops", "[ $1 = test ] || exit 0; echo begun; sleep 100")
    found = run(kit, seconds=9, env=without_python(kit))
    steps = by_name(found)
    assert steps["operations"]["status"] == "killed" and steps["operations"]["said"].endswith("begun")
    assert steps["operations"]["seconds"] <= 15
    assert {step["status"] for step in found["steps"][-2:]} == {"skipped"}
    assert steps["server"]["said"] == "no time was left"
    assert found["status"] == 1


def test_a_run_that_is_killed_leaves_what_it_has(kit: Path) -> None:
    program(kit / "bin" / "ours" / "test-backend-ops", "[ $1 = test ] && kill -9 $(cat $PIDS/run)")
    here = kit.parent / "here"
    here.mkdir()
    env = without_python(kit) | {"HOME": str(here), "GPU_KIT_PYTHON": "none", "PIDS": str(here)}
    env["GPU_KIT_WORK"] = str(kit.parent / "work")
    command = f"echo $$ > {here}/run; exec bash {kit}/run.sh {here}/out"
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=60)
    assert done.returncode == -9
    left = json.loads((here / "out" / "results.json").read_text())
    assert [step["step"] for step in left["steps"]][:2] == ["devices", "programs"]
    assert "programs" in (here / "out" / "table.txt").read_text()


# The packed kit itself.


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    if not ARCHIVE.exists():
        pytest.skip("no build/gpu-kit.tar.xz; make gpu-kit packs it")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "gpu-kit"


@pytest.mark.kit
def test_the_kit_runs_from_its_archive_without_network(packed: Path) -> None:
    """With a Python that has numpy and nothing else; then without numpy."""
    venv = packed.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    bare = run(packed, seconds=400, network=False, python=str(venv / "bin" / "python"), env=without_python(packed))
    steps = by_name(bare)
    assert {steps[name]["status"] for name in ("programs", "operations", "server")} == {"passed"}, bare["output"]
    assert "numpy" in steps["tokens"]["said"] and bare["status"] == 0
    import numpy

    site = next((venv / "lib").glob("python3*/site-packages"))
    for folder in Path(numpy.__file__).parents[1].glob("numpy*"):
        (site / folder.name).symlink_to(folder)
    found = run(packed, seconds=900, network=False, python=str(venv / "bin" / "python"))
    print(found["output"])
    assert {step["status"] for step in found["steps"][1:]} == {"passed"}, found["output"]
    assert found["status"] == 0 and ARCHIVE.stat().st_size < 40e6
