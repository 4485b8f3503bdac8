"""Text of tokens: pieces of any length, whole characters as they come, and the stops that end an answer.

All of it in time that grows with the text and not with its square; llama_cpp.Llama makes the whole text anew for every
token, and knows no piece of more than 32 bytes.
"""

from __future__ import annotations

import codecs
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple

from gemma_mtp.runtime.faults import CLOSED
from llama_cpp import LlamaTokenizer
from llama_cpp import llama_cpp as lib

Piece = Callable[[int], bytes]
PIECE_BYTES = 256  # of most pieces; a longer one is asked for again
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
# Tokens that a foreign tokenizer is shown before the new ones, and the most that one character is made of.
BEFORE, CHARACTER = 8, 4


class Tokenizer(LlamaTokenizer):
    """llama_cpp's tokenizer, with pieces of any length, each made once.

    Args:
        llama: whose vocabulary it is.

    Attributes:
        adds_space: whether the vocabulary puts a space at the beginning of every text. (Gemma 4's does not, and stock
            takes a text's own for it.)
    """

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self.adds_space = llama.metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"

    def piece(self, token: int, special: bool = False) -> bytes:
        """The text of a token; that of a control token is empty unless `special` ones are wanted.

        Raises:
            IndexError: there is no such token.
            TypeError: it is no whole number.
            RuntimeError: the model was freed.
        """
        token = index(token)
        found = self._pieces.get((token, special))
        return self._made(token, special) if found is None else found

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """As llama_cpp's.

        Raises:
            TypeError: the text is not in bytes.
        """
        if not isinstance(text, bytes):
            raise TypeError(f"tokenize takes bytes, not {type(text).__name__}; of a str give text.encode().")
        found: list[int] = super().tokenize(text, add_bos, special)
        return found

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens, without the space that some vocabularies put at the beginning of every text.

        Raises:
            IndexError: one of them is no token of this model.
        """
        del prev_tokens  # a piece does not depend on what is before it
        text = b"".join([self.piece(token, special) for token in tokens])
        begins = self.adds_space and len(tokens) > 0 and tokens[0] == self._model.token_bos()
        return text.removeprefix(b" ") if begins else text

    def _made(self, token: int, special: bool) -> bytes:
        if self._model.model is None:
            raise RuntimeError(CLOSED)
        count = lib.llama_vocab_n_tokens(self._model.vocab)
        if not 0 <= token < count:  # llama.cpp would end the process
            raise IndexError(f"{token!r} is no token of this model; its ids go from 0 to {count - 1}.")
        size = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = lib.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if length >= 0:
                break
            size = -length
        made: bytes = buffer.raw[:length]
        self._pieces[token, special] = made
        return made


def pieces_of(tokenizer: Any) -> Piece:
    """What gives the piece of each token of an answer, asked for one after the other.

    Args:
        tokenizer: `Tokenizer`, or whatever else `Llama(tokenizer=...)` was given. Such a one may need the tokens before
            to tell where a space goes, and is shown a few; what is not a whole character yet comes with the next token.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.piece
    before: deque[int] = deque(maxlen=BEFORE)
    waiting: list[int] = []

    def piece(token: int) -> bytes:
        waiting.append(token)
        made: bytes = tokenizer.detokenize(list(waiting), prev_tokens=list(before))
        if made.endswith(REPLACEMENT) and len(waiting) < CHARACTER:
            return b""
        before.extend(waiting)
        waiting.clear()
        return made

    return piece


class Stop:
    """Looks for a string in a text that comes in pieces (Knuth, Morris and Pratt, SIAM J. Comput. 6, 1977).

    Args:
        wanted: the string, not empty.

    Attributes:
        seen: how many of its first characters the text so far ends with.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted, self.seen = wanted, 0
        self._shorter = [0]  # for so many characters seen, less one: how many still are if the next one is wrong
        length = 0
        for character in wanted[1:]:
            while length and wanted[length] != character:
                length = self._shorter[length - 1]
            length += wanted[length] == character
            self._shorter.append(length)

    def find(self, piece: str) -> int | None:
        """Read on; how many characters of the piece it takes until the string is there, None if it does not come."""
        for place, character in enumerate(piece, 1):
            while self.seen and self.wanted[self.seen] != character:
                self.seen = self._shorter[self.seen - 1]
            self.seen += self.wanted[self.seen] == character
            if self.seen == len(self.wanted):
                return place
        return None


class Part(NamedTuple):
    """Tokens that end with a whole character.

    Attributes:
        tokens: how many.
        start: characters of the text before them.
        text: theirs.
    """

    tokens: int
    start: int
    text: str

    @property
    def end(self) -> int:
        """Characters of the text up to their end."""
        return self.start + len(self.text)


class Text:
    """The text of an answer as its tokens come.

    Bytes that make no character are left out, wherever they are, as in llama_cpp.Llama's answers.

    Args:
        stops: what ends it; the text is what stands before the first of them. Of those that are complete with the same
            token the one that begins first counts, as in llama-server.

    Attributes:
        stopped: whether one of them is there.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = [Stop(stop) for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._pieces: list[str] = []
        self._size = 0
        self._end: int | None = None
        self._open = Part(0, 0, "")  # tokens that do not end with a whole character yet
        self._waiting: deque[Part] = deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop is there."""
        return self._end is not None

    def add(self, piece: bytes) -> None:
        """Go on with the piece of a token."""
        text = self._decoder.decode(piece)
        if self._stops:
            places = [(stop.find(text), stop) for stop in self._stops]
            self._end = min((self._size + place - len(stop.wanted) for place, stop in places if place), default=None)
        self._pieces.append(text)
        self._size += len(text)
        part = Part(self._open.tokens + 1, self._open.start, self._open.text + text)
        if self._decoder.getstate()[0]:
            self._open = part
        else:
            self._waiting.append(part)
            self._open = Part(0, self._size, "")

    def ready(self) -> Iterator[Part]:
        """What may be handed on: whole characters, and nothing that a stop may begin with."""
        certain = self._size - max((stop.seen for stop in self._stops), default=0)
        while self._waiting and self._waiting[0].end <= certain:
            yield self._waiting.popleft()

    def rest(self) -> Iterator[Part]:
        """At the end: what was not handed on, up to the stop."""
        end = self._size if self._end is None else self._end
        for part in (*self._waiting, *([self._open] if self._open.tokens else [])):
            yield part._replace(text=part.text[: end - part.start])
            if part.end >= end:
                return

    def __str__(self) -> str:
        """The text so far, up to the stop."""
        return "".join(self._pieces)[: self._end]
