"""`make check-same-text`: whether an answer is the same with drafts and without, alone and beside others.

Twenty prompts that the bundled pair was not trained on, 128 tokens each: greedy, at temperature 1 with a seed, and by
two JSON schemas. They are asked of `gemma-mtp serve` with one slot, with four that have a context each (-np 4) and with
four that share one (the default), one request after the other and four at once, with three drafts, as many as pay, and
none.
Counted are answers that are, token for token, those of one slot without drafts; and the share of drafts that were
accepted. One request after the other has to give all of them, else the exit status is 1; four at once: docs/server.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from demo import PAIR, QUANT, held_out
from gemma_mtp.convert import convert_pair
from prompts import FIELDS, STRINGS
from serves import Served, served

# What a request says beside its prompt.
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {"temperature": 1, "seed": 7},
    "schema": {"temperature": 1, "seed": 7, "json_schema": STRINGS},
    "schema of fields": {"temperature": 1, "seed": 7, "json_schema": FIELDS},
}
SLOTS: dict[str, tuple[object, ...]] = {"one slot": ("-np", 1), "-np 4": ("-np", 4), "default": ()}
DRAFTS: dict[str, object] = {"no drafts": 0, "drafts": 3, "auto": "auto"}
TOKENS = 128


@dataclass(frozen=True)
class Text:
    """The tokens of an answer, and how many were drafted and accepted for it."""

    tokens: list[int]
    drafted: int
    accepted: int


def answers(found: Served, at_once: int) -> list[list[Text]]:
    """Those to all prompts, for each of `ASKED`."""

    def text(body: dict[str, Any]) -> Text:
        answer = found.ask("/completion", {"n_predict": TOKENS, "return_tokens": True, **body}).json
        timings = answer["timings"]
        return Text(answer["tokens"], timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))

    with ThreadPoolExecutor(at_once) as threads:
        return [
            list(threads.map(text, [{"prompt": prompt, **more} for prompt in held_out()])) for more in ASKED.values()
        ]


def rows(folder: Path) -> Iterator[tuple[str, bool, list[list[Text]]]]:
    """Each way to ask, whether slots have a context each, and the answers; those to compare with come first."""
    target = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", folder, QUANT).target
    for (slots, flags), (drafts, length) in product(SLOTS.items(), DRAFTS.items()):
        with served(target, folder, *flags, "--draft", length) as found:
            for at_once in (1,) if slots == "one slot" else (1, 4):
                yield f"{slots}, {at_once} at once, {drafts}", bool(flags), answers(found, at_once)


def cell(found: list[Text], wanted: list[Text]) -> tuple[bool, str]:
    """Whether all answers are those wanted, and how many are."""
    same = sum(one.tokens == other.tokens for one, other in zip(found, wanted, strict=True))
    drafted, accepted = (sum(getattr(each, name) for each in found) for name in ("drafted", "accepted"))
    return same == len(wanted), f"{same} of {len(wanted)}" + (f", {accepted / drafted:.2f}" if drafted else " " * 6)


def main() -> None:
    failed, wanted = False, None
    print(f"{'same tokens, acceptance':32}" + "".join(f"{name:>18}" for name in ASKED), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for label, own, found in rows(Path(folder)):
            wanted = wanted or found
            cells = [cell(*each) for each in zip(found, wanted, strict=True)]
            failed |= own and not all(right for right, _ in cells)
            print(f"{label:32}" + "".join(f"{text:>18}" for _, text in cells), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
