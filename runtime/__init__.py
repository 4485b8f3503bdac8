"""Gemma 4 with multi-token prediction behind llama-cpp-python's API.

from gemma_mtp.runtime import Llama

llm = Llama("gemma-4-E2B-it-Q4_K_M.gguf")  # finds the drafter that was converted with it
print(llm("The capital of France is", max_tokens=16)["choices"][0]["text"])
print(llm.stats)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Llama", "Stats", "as_async", "open_pair"]

if TYPE_CHECKING:
    from gemma_mtp.runtime.asynchronous import as_async
    from gemma_mtp.runtime.llama import Llama, open_pair
    from gemma_mtp.runtime.stats import Stats
else:
    # Commands that do not generate are in this package too: libllama is loaded when a name is first asked for.
    HOMES = {"Llama": "llama", "as_async": "asynchronous", "Stats": "stats", "open_pair": "llama"}

    def __getattr__(name):
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            found = globals()[name] = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
        except ModuleNotFoundError as problem:
            if problem.name != "llama_cpp":
                raise
            raise ModuleNotFoundError(
                "llama-cpp-python is not installed; run: gemma-mtp build", name="llama_cpp"
            ) from None
        return found

    def __dir__():
        return sorted({*globals(), *HOMES})
