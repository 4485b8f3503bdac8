"""pytest plugin for llama-cpp-python's own tests: our Llama in place of theirs, the pair instead of downloads.

The environment names the target (GEMMA_MTP_TARGET). The summary says how many Llama had a drafter.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import types
from typing import Any

import huggingface_hub
import llama_cpp
from gemma_mtp.runtime import Llama

# Their file imports a function of scipy, and does not use it.
special = types.ModuleType("scipy.special")
special.log_softmax = None  # type: ignore[attr-defined]
sys.modules |= {"scipy": types.ModuleType("scipy"), "scipy.special": special}

drafters = 0


class Counted(Llama):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        global drafters
        drafters += self.drafter is not None


llama_cpp.Llama = Counted
multiprocessing.cpu_count = lambda: 1  # all of a loaded machine's cores are slower than one
huggingface_hub.hf_hub_download = lambda repo, file: os.environ["GEMMA_MTP_TARGET"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"with a drafter: {drafters}")
