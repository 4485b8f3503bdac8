"""What a generation cost and what drafting brought."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counters of one request, or of several added up.

    Attributes:
        tokens: tokens handed to the caller.
        drafts: rounds in which the drafter ran.
        drafted: tokens it proposed.
        accepted: of these, tokens the target chose as well.
        accepted_per_position: `accepted` by place in the draft, first token first.
        drafted_per_position: `drafted` by place in the draft.
        target_passes: decodes of the target after the prompt.
        prompt_tokens: prompt tokens that were decoded, not taken from the cache.
        prompt_seconds: time for these.
        seconds: time for everything after the prompt, the caller's own time between tokens left out.
    """

    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    target_passes: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens; 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        """Tokens after the first (which the prompt's own pass gives) per target pass."""
        return max(self.tokens - 1, 0) / self.target_passes if self.target_passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second of generation."""
        return max(self.tokens - 1, 0) / self.seconds if self.seconds > 0 else 0.0

    def drafted_round(self, length: int) -> None:
        """Count one draft of `length` tokens."""
        self.drafts += 1
        self.drafted += length
        grow(self.drafted_per_position, length)
        grow(self.accepted_per_position, length)
        for place in range(length):
            self.drafted_per_position[place] += 1

    def accepted_at(self, place: int) -> None:
        """Count the acceptance of the draft token at this place (0-based)."""
        self.accepted += 1
        self.accepted_per_position[place] += 1

    def add(self, other: Stats) -> None:
        """Add another request's counters to these."""
        for name, value in vars(other).items():
            if isinstance(value, list):
                mine: list[int] = getattr(self, name)
                grow(mine, len(value))
                for place, count in enumerate(value):
                    mine[place] += count
            else:
                setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, Any]:
        """Counters and the ratios derived from them, ready for JSON."""
        ratios = ("acceptance", "tokens_per_target_pass", "tokens_per_second")
        return asdict(self) | {name: round(getattr(self, name), 4) for name in ratios}

    def line(self) -> str:
        """One line for people."""
        text = f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s"
        if not self.drafts:
            return f"{text}, without MTP"
        places = " ".join(
            f"{hit / of:.2f}" for hit, of in zip(self.accepted_per_position, self.drafted_per_position, strict=True)
        )
        return (
            f"{text}, {self.tokens_per_target_pass:.2f} tokens per target pass, "
            f"accepted {self.accepted} of {self.drafted} drafted ({self.acceptance:.0%}; by position {places})"
        )


def grow(counts: list[int], length: int) -> None:
    """Append zeros until the list has at least this length."""
    counts.extend([0] * (length - len(counts)))
