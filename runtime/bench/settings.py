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
TURN = 64  # tokens that one of several chances lasts
WARM_TOKENS = 256  # that teach "auto" before it is measured
# Told of progress: what is being measured, steps done and steps in all.
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Chance:
    """The chance that a replayed token is right: one for all, or several that take turns.

    Attributes:
        levels: one chance, or more.
        turn: tokens that each of several lasts.
    """

    levels: tuple[float, ...]
    turn: int = TURN

    @classmethod
    def parse(cls, text: str) -> Chance:
        """Read "0.35", or "0.1/0.9:64" for two that change after 64 tokens each.

        Raises:
            ValueError: it is neither, or a chance is not between 0 and 1.
        """
        levels, _, turn = text.partition(":")
        found = cls(tuple(float(level) for level in levels.split("/")), int(turn or TURN))
        if not all(0 <= level <= 1 for level in found.levels):
            raise ValueError("each must lie between 0 and 1.")
        if found.turn < 1 or (turn and not found.switches):
            raise ValueError("a number of tokens is for chances that take turns, as in 0.1/0.9:64.")
        return found

    @property
    def switches(self) -> bool:
        """Whether there are several."""
        return len(self.levels) > 1

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        levels = "/".join(f"{level:g}" for level in self.levels)
        return f"{levels}:{self.turn}" if self.switches else levels

    def at(self, made: int) -> float:
        """The chance after so many tokens."""
        return self.levels[made // self.turn % len(self.levels)]

    def tokens(self, wanted: int) -> int:
        """At least as many tokens as wanted, in which each of several chances has the same number of turns."""
        cycle = self.turn * len(self.levels) if self.switches else 1
        return -(-wanted // cycle) * cycle


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        target: GGUF file of the target.
        drafter: of its drafter.
        ctx_filled: tokens in the KV cache when passes, rounds and replayed continuations begin.
        acceptance: chances at which recorded continuations are replayed.
        own: whether to generate with the drafter's own tokens as well.
        draft: lengths to compare; empty for the best by measured costs, per acceptance.
        tokens: generated per run.
        warm_tokens: generated before a run with the draft length "auto", which learns from them.
        repeat: visits, of which medians are taken.
        prompts: for `own`.
        temp: temperature for `own`; replays are greedy.
        seed: of prompts, noise and acceptance.
        threads: CPU threads.
        gpu_layers: layers on the GPU, -1 for all.
        flash_attn: whether to use flash attention.
        against: other builds: "stock", "patched-server", "portable", or the path of a llama-server.
        prompt: lengths of prompts to read, in tokens.
        passes: whether to stop after target passes and draft rounds.
        speeds: whether to leave these out; `draft` must then say which lengths to compare.
    """

    target: Path
    drafter: Path
    ctx_filled: int = 256
    acceptance: tuple[Chance, ...] = ()
    own: bool = True
    draft: tuple[int, ...] = ()
    tokens: int = 64
    warm_tokens: int = WARM_TOKENS
    repeat: int = 3
    prompts: tuple[str, ...] = PROMPTS
    temp: float = 0.0
    seed: int = 0
    threads: int = 1
    gpu_layers: int = -1
    flash_attn: bool = True
    against: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    passes: bool = False
    speeds: bool = False

    @property
    def recorded(self) -> int:
        """Tokens of the longest replay."""
        return max([self.tokens, *(chance.tokens(self.tokens) for chance in self.acceptance)])

    @property
    def n_ctx(self) -> int:
        longest = max((len(prompt.encode()) for prompt in self.prompts), default=0) if self.own else 0
        filled = self.ctx_filled + max(PROMPT_TOKENS, self.recorded)
        return max(filled, longest + self.tokens, *self.prompt) + MARGIN

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `Llama`. A verify pass counts as a batch, so both kinds get the threads."""
        threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
        return {"n_ctx": self.n_ctx, "n_gpu_layers": self.gpu_layers, "flash_attn": self.flash_attn, **threads}
