"""What a generation cost and what drafting brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counters of one request, or of several added up.

    Attributes:
        tokens: tokens handed to the caller.
        drafts: rounds with a draft.
        drafted: tokens proposed.
        accepted: of these, tokens the target chose as well.
        accepted_per_position: `accepted` by place in the draft, first token first.
        drafted_per_position: `drafted` by place in the draft.
        drafted_from: `drafted` by source: "mtp" (the drafter), "lookup" (the text so far), "grammar" (the only token
            that the grammar allowed).
        accepted_from: `accepted` by source.
        target_passes: decodes of the target after the prompt.
        prompt_tokens: prompt tokens that were decoded, not taken from the cache.
        prompt_seconds: time for these.
        seconds: time for everything after the prompt, the caller's own time between tokens left out.
        pass_seconds: of these, time in target passes.
        draft_seconds: of these, time spent drafting.
        plain_pass_seconds: what the passes would have taken with one token each, by the passes over one token that were
            measured; 0.0 where none was.
    """

    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    drafted_from: dict[str, int] = field(default_factory=dict)
    accepted_from: dict[str, int] = field(default_factory=dict)
    target_passes: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    pass_seconds: float = 0.0
    draft_seconds: float = 0.0
    plain_pass_seconds: float = 0.0

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

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def speedup(self) -> float | None:
        """Speed over plain generation, by the passes over one token that were measured; None where none was."""
        if not self.plain_pass_seconds or not self.seconds:
            return None
        return (self.seconds - self.pass_seconds - self.draft_seconds + self.plain_pass_seconds) / self.seconds

    def drafted_round(self, sources: Sequence[str], seconds: float = 0.0) -> None:
        """Count one draft: where each of its tokens came from, and what it took; an empty one only took time."""
        self.draft_seconds += seconds
        self.drafts += bool(sources)
        self.drafted += len(sources)
        grow(self.drafted_per_position, len(sources))
        grow(self.accepted_per_position, len(sources))
        for place, source in enumerate(sources):
            self.drafted_per_position[place] += 1
            self.drafted_from[source] = self.drafted_from.get(source, 0) + 1

    def accepted_at(self, place: int, source: str) -> None:
        """Count the acceptance of the draft token at this place (0-based)."""
        self.accepted += 1
        self.accepted_per_position[place] += 1
        self.accepted_from[source] = self.accepted_from.get(source, 0) + 1

    def passed(self, seconds: float) -> None:
        """Count one target pass after the prompt."""
        self.target_passes += 1
        self.pass_seconds += seconds

    def add(self, other: Stats) -> None:
        """Add another request's counters to these."""
        for name, value in vars(other).items():
            if isinstance(value, list):
                mine: list[int] = getattr(self, name)
                grow(mine, len(value))
                for place, count in enumerate(value):
                    mine[place] += count
            elif isinstance(value, dict):
                counts: dict[str, int] = getattr(self, name)
                for source, count in value.items():
                    counts[source] = counts.get(source, 0) + count
            else:
                setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, Any]:
        """Counters and the ratios derived from them, ready for JSON."""
        ratios = ("acceptance", "mean_accepted", "tokens_per_target_pass", "tokens_per_second", "speedup")
        values = ((name, getattr(self, name)) for name in ratios)
        return asdict(self) | {name: value if value is None else round(value, 4) for name, value in values}

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

    def report(self) -> str:
        """Several lines for people: what was drafted and accepted, and what it brought."""
        rows = [
            ("tokens", f"{self.tokens}, {self.tokens_per_second:.1f} per second"),
            ("prompt", f"{self.prompt_tokens} tokens read in {self.prompt_seconds:.2f} s"),
            ("target passes", f"{self.target_passes}, {self.tokens_per_target_pass:.2f} tokens each"),
        ]
        if self.drafts:
            pairs = zip(self.accepted_per_position, self.drafted_per_position, strict=True)
            rows += [
                ("drafted", f"{self.drafted} tokens in {self.drafts} drafts"),
                ("accepted", f"{self.accepted} ({self.acceptance:.0%}), {self.mean_accepted:.2f} per draft"),
                ("by position", " ".join(f"{hit / of:.2f}" for hit, of in pairs)),
            ]
        rows += [
            (f"from {source}", f"{self.accepted_from.get(source, 0)} of {count} accepted")
            for source, count in self.drafted_from.items()
        ]
        shares = [f"{part / self.seconds:.0%}" for part in (self.pass_seconds, self.draft_seconds) if self.seconds]
        if shares:
            rows.append(("time", f"target {shares[0]}, drafting {shares[1]}"))
        gain = "not measured: no pass over one token" if self.speedup is None else f"{self.speedup:.2f} times plain"
        rows.append(("speed", gain))
        return "\n".join(f"{name:<14} {value}" for name, value in rows)


def grow(counts: list[int], length: int) -> None:
    """Append zeros until the list has at least this length."""
    counts.extend([0] * (length - len(counts)))
