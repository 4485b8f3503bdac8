"""What a generation cost and what drafting brought."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter
from typing import Any

OF_ONE = ("seed", "draft_length")  # what only a single request has


@dataclass
class Stats:
    """Counters of one request, or of several added up; one request is timed from when its object is made.

    Attributes:
        seed: what the random numbers of the request came from: given with the same arguments it makes the same tokens.
            None in a sum.
        draft_length: how many tokens a draft was to have, a number or "auto". None in a sum.
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
        cached_tokens: prompt tokens that the KV cache held already.
        prompt_tokens: prompt tokens that were decoded, not taken from the cache.
        prompt_seconds: time for these.
        seconds: by the clock on the wall, from the start of the request until its last token, or its whole answer, was
            handed over: what the user waits for, with tokenizing, detokenizing and whatever a reader of a stream does
            between two items.
        time_to_first_token: by the same clock, until the first token was made.
        loop_seconds: after the first token, time in the loop that drafts and verifies; what is done between two tokens
            outside of it is left out.
        pass_seconds: of these, time in target passes.
        draft_seconds: of these, time spent drafting.
        plain_pass_seconds: what the passes would have taken with one token each, by the passes over one token that were
            measured; 0.0 where none was.
    """

    seed: int | None = None
    draft_length: int | str | None = None
    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    drafted_from: dict[str, int] = field(default_factory=dict)
    accepted_from: dict[str, int] = field(default_factory=dict)
    target_passes: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    time_to_first_token: float = 0.0
    loop_seconds: float = 0.0
    pass_seconds: float = 0.0
    draft_seconds: float = 0.0
    plain_pass_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._begun = perf_counter()

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens; 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        """Tokens after the first (which the prompt's own pass gives) per target pass."""
        return max(self.tokens - 1, 0) / self.target_passes if self.target_passes else 0.0

    @property
    def generation_seconds(self) -> float:
        """By the clock on the wall, from the first token to the last."""
        return max(self.seconds - self.time_to_first_token, 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second of `generation_seconds`, as the user gets them."""
        return max(self.tokens - 1, 0) / self.generation_seconds if self.generation_seconds > 0 else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def mean_drafted(self) -> float:
        """Drafted tokens per draft: the length that was chosen, on average."""
        return self.drafted / self.drafts if self.drafts else 0.0

    @property
    def speedup(self) -> float | None:
        """Speed over plain generation, by the passes over one token that were measured; None where none was.

        Both by the clock on the wall: what is outside of passes and drafts would take as long without drafts.
        """
        if not self.plain_pass_seconds or not self.generation_seconds:
            return None
        rest = self.generation_seconds - self.pass_seconds - self.draft_seconds
        return (rest + self.plain_pass_seconds) / self.generation_seconds

    def lap(self) -> None:
        """Something is handed over now: a token, or a part of the answer."""
        self.seconds = perf_counter() - self._begun

    def token(self) -> None:
        """Count a token that is handed over now."""
        self.tokens += 1
        self.lap()
        if self.tokens == 1:
            self.time_to_first_token = self.seconds

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

    def counting(
        self, source: Generator[int, Sequence[int] | None, None]
    ) -> Generator[int, Sequence[int] | None, None]:
        """The same generator of tokens, counted."""
        sent: Sequence[int] | None = None
        clock = perf_counter()
        while True:
            try:
                token = source.send(sent)
            except StopIteration:
                return
            if not self.tokens:
                self.prompt_seconds += perf_counter() - clock
            self.token()
            sent = yield token

    def add(self, other: Stats) -> None:
        """Add another request's counters to these."""
        for name, value in (
            (each.name, getattr(other, each.name)) for each in fields(other) if each.name not in OF_ONE
        ):
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

    def timings(self) -> dict[str, Any]:
        """What llama-server tells under "timings", by the same names and the same clock.

        `prompt_ms` goes from the start of the request to its first token and `predicted_ms` from there to the last, the
        first being the prompt's; what tells of drafts is there where drafts were, and "speedup" where it was measured.
        """
        prompt, answer = self.time_to_first_token * 1e3, self.generation_seconds * 1e3
        steps = max(self.tokens - 1, 0)
        found: dict[str, Any] = {
            "cache_n": self.cached_tokens,
            "prompt_n": self.prompt_tokens,
            "prompt_ms": prompt,
            "prompt_per_token_ms": prompt / self.prompt_tokens if self.prompt_tokens else 0.0,
            "prompt_per_second": self.prompt_tokens / prompt * 1e3 if prompt else 0.0,
            "predicted_n": self.tokens,
            "predicted_ms": answer,
            "predicted_per_token_ms": answer / steps if steps else 0.0,
            "predicted_per_second": self.tokens_per_second,
        }
        if self.drafted:
            found |= {
                "draft_n": self.drafted,
                "draft_n_accepted": self.accepted,
                "draft_n_per_position": self.drafted_per_position,
                "draft_n_accepted_per_position": self.accepted_per_position,
                "draft_n_from": self.drafted_from,
                "draft_n_accepted_from": {source: self.accepted_from.get(source, 0) for source in self.drafted_from},
            }
        return found if self.speedup is None else found | {"speedup": self.speedup}

    def as_dict(self) -> dict[str, Any]:
        """Counters and the ratios derived from them, ready for JSON."""
        ratios = (
            "acceptance", "mean_accepted", "mean_drafted", "tokens_per_target_pass",
            "generation_seconds", "tokens_per_second", "speedup",
        )  # fmt: skip
        values = ((name, getattr(self, name)) for name in ratios)
        return asdict(self) | {name: value if value is None else round(value, 4) for name, value in values}

    def line(self) -> str:
        """One line for people."""
        text = f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s"
        if self.tokens and self.time_to_first_token:
            text += f", the first after {self.time_to_first_token:.2f} s"
        seed = "" if self.seed is None else f", seed {self.seed}"
        if not self.drafts:
            return f"{text}, without MTP{seed}"
        places = " ".join(
            f"{hit / of:.2f}" for hit, of in zip(self.accepted_per_position, self.drafted_per_position, strict=True)
        )
        return (
            f"{text}, {self.tokens_per_target_pass:.2f} tokens per target pass, "
            f"accepted {self.accepted} of {self.drafted} drafted ({self.acceptance:.0%}; by position {places}){seed}"
        )

    def report(self) -> str:
        """Several lines for people: what was drafted and accepted, and what it brought."""
        held = f", {self.cached_tokens} were in the cache" if self.cached_tokens else ""
        rows = [
            ("tokens", f"{self.tokens} in {self.seconds:.2f} s"),
            ("first token", f"after {self.time_to_first_token:.2f} s, then {self.tokens_per_second:.1f} per second"),
            ("prompt", f"{self.prompt_tokens} tokens read in {self.prompt_seconds:.2f} s{held}"),
            ("target passes", f"{self.target_passes}, {self.tokens_per_target_pass:.2f} tokens each"),
        ]
        if self.drafts:
            wanted = "" if self.draft_length is None else f" (draft_length {self.draft_length})"
            pairs = zip(self.accepted_per_position, self.drafted_per_position, strict=True)
            rows += [
                ("drafted", f"{self.drafted} tokens in {self.drafts} drafts, {self.mean_drafted:.2f} in each{wanted}"),
                ("accepted", f"{self.accepted} ({self.acceptance:.0%}), {self.mean_accepted:.2f} per draft"),
                ("by position", " ".join(f"{hit / of:.2f}" for hit, of in pairs)),
            ]
        rows += [
            (f"from {source}", f"{self.accepted_from.get(source, 0)} of {count} accepted")
            for source, count in self.drafted_from.items()
        ]
        if self.target_passes and (whole := self.generation_seconds):
            parts = {"target": self.pass_seconds, "drafting": self.draft_seconds}
            parts["choosing tokens"] = self.loop_seconds - sum(parts.values())
            parts["text and the rest"] = whole - self.loop_seconds
            rows.append(("time", ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.items())))
        gain = "not measured: no pass over one token" if self.speedup is None else f"{self.speedup:.2f} times plain"
        rows.append(("speed", gain))
        if self.seed is not None:
            rows.append(("seed", str(self.seed)))
        return "\n".join(f"{name:<14} {value}" for name, value in rows)


def grow(counts: list[int], length: int) -> None:
    """Append zeros until the list has at least this length."""
    counts.extend([0] * (length - len(counts)))
