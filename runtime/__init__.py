"""Gemma 4 with multi-token prediction behind llama-cpp-python's API.

from gemma_mtp.runtime import Llama

llm = Llama("gemma-4-E2B-it-Q4_K_M.gguf")  # finds the drafter that was converted with it
print(llm("The capital of France is", max_tokens=16)["choices"][0]["text"])
print(llm.stats)
"""

from __future__ import annotations

from gemma_mtp.runtime.llama import Llama
from gemma_mtp.runtime.pair import open_pair
from gemma_mtp.runtime.stats import Stats

__all__ = ["Llama", "Stats", "open_pair"]
