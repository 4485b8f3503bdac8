"""No more threads than there are cores to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from gemma_mtp.convert import Pair

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the library looks at cores on Linux only")

# Two threads on one core; how much of the time of all threads the calling one had in the second half, and the text.
SHARED = """
import json, os, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from gemma_mtp.runtime import Llama
llm = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, draft_length=3, verbose=False)

def times():
    ticks = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        ticks[int(task.name)] = int(fields[11]) + int(fields[12])
    return ticks

def generate():
    return llm("import os\\n", max_tokens=600, temperature=0.0)["choices"][0]["text"]

generate()
before, text, after = times(), generate(), times()
spent = {task: after[task] - before.get(task, 0) for task in after}
print(json.dumps({"own": spent[os.getpid()] / max(sum(spent.values()), 1), "text": text}))
"""


def shared(demo: Pair, **env: str) -> tuple[float, str]:
    command = [sys.executable, "-c", SHARED, str(demo.target)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["own"], found["text"]


def test_two_threads_on_one_core_become_one(demo: Pair) -> None:
    """The second thread takes half of the core as long as there are two, and nothing once there is one."""
    own, text = shared(demo)
    both, same = shared(demo, GGML_SHARE_CORES="0")
    print(own, both)
    assert own > 0.9
    assert both < 0.8
    assert text == same
