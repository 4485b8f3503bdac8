"""What `gemma-mtp bench` shall measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = (
    "def parse_arguments(argv):\n    ",
    "The history of the steam engine begins with",
    "import json\nimport os\n\nclass Settings:\n    ",
)
PROMPT_TOKENS = 128  # of the pass that the speed of prompts is taken from
MARGIN = 64  # context beyond what is generated: the longest draft, and the record that must not end before it
# Told of progress: what is being measured, steps done and steps in all.
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        target: GGUF file of the target.
        drafter: of its drafter.
        ctx_filled: tokens in the KV cache when passes, rounds and replayed continuations begin.
        acceptance: chances per token at which recorded continuations are replayed.
        own: whether to generate with the drafter's own tokens as well.
        draft: lengths to compare; empty for the best by measured costs, per acceptance.
        tokens: generated per run.
        repeat: visits, of which medians are taken.
        prompts: for `own`.
        temp: temperature for `own`; replays are greedy.
        seed: of prompts, noise and acceptance.
        threads: CPU threads.
        gpu_layers: layers on the GPU, -1 for all.
        flash_attn: whether to use flash attention.
        against: other builds: "stock", "patched-server".
    """

    target: Path
    drafter: Path
    ctx_filled: int = 256
    acceptance: tuple[float, ...] = ()
    own: bool = True
    draft: tuple[int, ...] = ()
    tokens: int = 64
    repeat: int = 3
    prompts: tuple[str, ...] = PROMPTS
    temp: float = 0.0
    seed: int = 0
    threads: int = 1
    gpu_layers: int = -1
    flash_attn: bool = True
    against: tuple[str, ...] = ()

    @property
    def n_ctx(self) -> int:
        longest = max((len(prompt.encode()) for prompt in self.prompts), default=0) if self.own else 0
        return max(self.ctx_filled + PROMPT_TOKENS, self.ctx_filled + self.tokens, longest + self.tokens) + MARGIN

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `Llama`. A verify pass counts as a batch, so both kinds get the threads."""
        threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
        return {"n_ctx": self.n_ctx, "n_gpu_layers": self.gpu_layers, "flash_attn": self.flash_attn, **threads}
