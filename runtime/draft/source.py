"""What a source of drafts is, and what it adds to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from gemma_mtp.runtime.sampling import Sampler


@dataclass
class Draft:
    """Proposed tokens.

    Attributes:
        tokens: token ids.
        sources: where each came from, as `Stats` counts it: "mtp", "lookup" or "grammar".
        kind: what the policy chose it as; empty for no draft of its choosing.
        seconds: what making it took.
        steps: passes of the drafter.
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    kind: str = ""
    seconds: float = 0.0
    steps: int = 0

    def add(self, token: int, source: str) -> None:
        """Append a token."""
        self.tokens.append(token)
        self.sources.append(source)


@dataclass(frozen=True)
class Start:
    """Where a draft begins.

    Attributes:
        token: the last token of the sequence, which is not decoded yet.
        row: batch row of the token before it.
        sampler: chooses as the target would; a copy, moved on by what is drafted.
    """

    token: int
    row: int
    sampler: Sampler


@dataclass(frozen=True)
class Proposal:
    """What a source could add to a draft.

    Attributes:
        kind: what its acceptance is remembered under.
        most: how many tokens.
        take: adds so many of them, or fewer where it sees that they would be rejected.
        free: whether they cost nothing but their place in the target's pass.
    """

    kind: str
    most: int
    take: Callable[[int], None]
    free: bool = False


class DraftSource(Protocol):
    """One way of guessing what follows. Sources are asked in turn, and each sees what those before it added."""

    def propose(self, start: Start, draft: Draft, room: int) -> Proposal | None:
        """What could be added to a draft; tokens that are certain are added at once.

        Args:
            start: where the draft begins.
            draft: what is drafted already.
            room: how many more tokens fit.
        """

    def learn(self, draft: Draft, accepted: int) -> None:
        """A draft was verified: so many of its first tokens were accepted. By default nothing is learned."""
        return
