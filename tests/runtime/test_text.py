"""Text of tokens as they come, held against the same done at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from gemma_mtp.runtime.text import Stop, Text, pieces_of

PIECES = [
    b"a",
    b"b",
    b"ab",
    b"",
    "ä".encode(),
    b"\xf0\x9f",
    b"\x8d\x8e",
    b"\x80",
    b" ",
    "\N{RED APPLE}ab".encode(),
    b"\xe6",
]


@pytest.mark.parametrize("seed", range(40))
def test_a_stop_is_found_where_it_ends_first(seed: int) -> None:
    """However the text is cut into pieces."""
    draw = random.Random(seed)
    text = "".join(draw.choices("ab", k=60))
    wanted = "".join(draw.choices("ab", k=draw.randint(1, 6)))
    stop, at, found = Stop(wanted), 0, None
    while at < len(text) and found is None:
        size = draw.randint(0, 4)
        place = stop.find(text[at : at + size])
        found, at = None if place is None else at + place, at + size
    where = text.find(wanted)
    assert found == (None if where < 0 else where + len(wanted))
    if found is None:
        seen = max(n for n in range(len(wanted)) if text.endswith(wanted[:n]))
        assert stop.seen == seen


def told(pieces: Sequence[bytes], stops: Sequence[str]) -> tuple[str, list[Any], Text]:
    """A text, the parts of it that a stream would hand on, and what made both."""
    text = Text(stops)
    parts: list[Any] = []
    for piece in pieces:
        text.add(piece)
        if text.stopped:
            break
        parts += text.ready()
    return str(text), [*parts, *text.rest()], text


@pytest.mark.parametrize("stops", [[], ["ab"], ["ba", "b\N{RED APPLE}"], ["\N{RED APPLE}", "aab", ""], ["ä"]], ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_parts_make_the_text(seed: int, stops: list[str]) -> None:
    """Whole characters, nothing twice, nothing of a stop, and what is no character left out."""
    pieces = random.Random(seed).choices(PIECES, k=30)
    whole, parts, text = told(pieces, stops)
    assert "".join(part.text for part in parts) == whole
    assert not [stop for stop in stops if stop and stop in whole]
    everything = b"".join(pieces).decode(errors="ignore")
    assert everything.startswith(whole)
    assert text.stopped or whole == everything
    assert sum(part.tokens for part in parts) <= len(pieces)
    if not text.stopped:
        assert sum(part.tokens for part in parts) >= len([piece for piece in pieces if piece])


def test_of_two_stops_in_a_token_the_first_counts() -> None:
    assert told([b"x", b"yabz"], ["b", "ab"])[0] == "xy"
    assert told([b"x", b"yabz"], ["ab", "b"])[0] == "xy"
    assert told([b"xa", b"b", b"c"], ["bc", "ab"])[0] == "x"


def test_nothing_is_held_back_for_long() -> None:
    """A byte that begins no character does not hold the rest."""
    text = Text(["abc"])
    seen = []
    for piece in (b"\xf0", b"x", b"ab", b"d"):
        text.add(piece)
        seen.append("".join(part.text for part in text.ready()))
    assert seen == ["", "x", "", "abd"]


def test_the_work_grows_with_the_text() -> None:
    """Characters that are looked at for each of the text: by a stop as long as the text, and as repetitive."""

    class Counted(str):
        looks = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.looks += 1
            return super().__getitem__(at)

    for length in (100, 1000):
        stop = Stop("a" * length + "b")
        stop.wanted, Counted.looks = Counted(stop.wanted), 0
        for _ in range(20 * length):
            assert stop.find("a") is None
        assert Counted.looks <= 5 * 20 * length


class Words:
    """A tokenizer that is not llama.cpp's: bytes are tokens, with a space before the first of a word pair."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [*text] if add_bos or special else []

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        assert prev_tokens is not None and len(prev_tokens) <= 8
        before = bytes(prev_tokens).decode(errors="replace")
        return bytes([*prev_tokens, *tokens]).decode(errors="replace")[len(before) :].encode()


def test_another_tokenizer_is_asked_for_whole_characters() -> None:
    piece = pieces_of(Words())
    wanted = "so süß \N{RED APPLE}, 東京"
    assert b"".join(piece(byte) for byte in wanted.encode()) == wanted.encode()
    piece = pieces_of(Words())
    assert [piece(byte) for byte in b"\x80a\x80bcd"][-1] == b"d"
