"""Log-probabilities of a completion, kept for the tokens that a response names and for no others.

llama_cpp.Llama wants `logits_all=True` for them and then holds n_ctx rows of n_vocab numbers: 4 GiB for 4096 tokens of
Gemma 4. A response needs of a row the chosen token and the few most likely ones.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import Choose, likeliest
from gemma_mtp.runtime.target import Target

# Prompt tokens decoded at a time when each needs its logits: llama.cpp's output buffer keeps as many rows for good.
PROMPT_ROWS = 32


def top_logprobs(logits: Floats, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token, and the `top` most likely (token, log-probability), best first.

    Equal ones are in the order that stock llama_cpp.Llama sorts them: higher id first.

    Args:
        logits: shape [n_vocab].
        token: id of the token.
        top: how many.
    """
    highest = logits.max()
    shifted = logits - highest
    total = np.log(np.exp(shifted, out=shifted).sum())
    ids = likeliest(logits, top) if top else np.arange(0)
    logprobs = logits[ids] - highest - total
    best = np.lexsort((-ids, -logprobs))[:top]
    of_best = zip(ids[best].tolist(), logprobs[best].tolist(), strict=True)
    return float(logits[token] - highest - total), list(of_best)


class LogProbs:
    """The log-probabilities of one request.

    Args:
        top: how many of the most likely tokens at each position.
        echo: whether the prompt's own tokens are wanted as well.
        lead: tokens that stock counts as completed before the first: the BOS token, if the prompt is empty.
        bos: the BOS token, which answers do not name.
    """

    def __init__(self, top: int, echo: bool, lead: list[int], bos: int) -> None:
        self.top, self.echo, self.bos = top, echo, bos
        self.lead = len(lead)
        self.prompt: list[int] = []
        self.completion = list(lead)
        self._at: dict[int, tuple[float, list[tuple[int, float]]]] = {}

    def add(self, position: int, logits: Floats, token: int) -> None:
        """Keep the row that chose the token at a position."""
        self._at[position] = top_logprobs(logits, token, self.top)

    def recording(self, choose: Choose) -> Choose:
        """A choice that also keeps the rows it is shown."""

        def recorded(logits: Floats, position: int) -> int:
            token = choose(logits, position)
            self.add(position, logits, token)
            self.completion.append(token)
            return token

        return recorded

    def begin(self, target: Target, tokens: list[int]) -> int:
        """Note the prompt; if its own tokens are wanted, decode it with logits for all of them, but for the last.

        Returns:
            How many tokens were decoded.

        Raises:
            ValueError: they are wanted, and not all of them are tokens.
        """
        self.prompt = tokens
        if not self.echo:
            return 0
        if min(tokens, default=0) < 0:
            raise ValueError("echo with logprobs needs a prompt of text; this one holds an image or a sound.")
        target.reset()
        step = min(PROMPT_ROWS, target.n_batch)
        for start in range(0, len(tokens) - 1, step):
            chunk = tokens[start : min(start + step, len(tokens) - 1)]
            row = target.decode(chunk[:1], chunk[1:])
            target.n_tokens = start + len(chunk)
            for i in range(len(chunk)):
                self.add(start + i + 1, target.logits(row + i), tokens[start + i + 1])
        return max(len(tokens) - 1, 0)

    def watching(
        self, source: Generator[int, Sequence[int] | None, None], chosen_from: Callable[[int], Floats]
    ) -> Generator[int, Sequence[int] | None, None]:
        """Stock's generator of tokens, its rows kept.

        Args:
            source: the generator.
            chosen_from: gives the logits from which it has just chosen the token at a position.
        """
        sent: Sequence[int] | None = None
        position = len(self.prompt)
        while True:
            try:
                token = source.send(sent)
            except StopIteration:
                return
            self.add(position, chosen_from(position), token)
            self.completion.append(token)
            sent = yield token
            position += 1 + len(sent or ())

    def told(
        self, numbers: range, spell: Callable[[int], str], offset: Offset, piece: Callable[[int], bytes]
    ) -> dict[str, Any]:
        """The `logprobs` part of a choice, for tokens numbered from the completion's first: below 0 the prompt's.

        Args:
            numbers: which tokens, one after the other.
            spell: the text of a token id.
            offset: of the first of them; afterwards that of the token behind the last.
            piece: what the token of a number adds to the text.
        """
        found: dict[str, Any] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        for number in numbers:
            position = len(self.prompt) + number - (self.lead if number >= 0 else 0)
            token = self.prompt[number] if number < 0 else self.completion[number]
            if token != self.bos:
                # Nothing says how likely a prompt's first token is.
                logprob, best = self._at.get(position, (None, []))
                text = spell(token)
                found["tokens"].append(text)
                found["text_offset"].append(offset.characters)
                found["token_logprobs"].append(logprob)
                top = {spell(i): value for i, value in best} | {text: logprob}
                found["top_logprobs"].append(None if logprob is None else top)
            offset.add(piece(number))
        return found


class Offset:
    """How many characters of a text stand before a token.

    Args:
        start: before the first.
    """

    def __init__(self, start: int) -> None:
        self.characters = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def add(self, piece: bytes) -> None:
        """Go on by a token, of which this is the piece."""
        self.characters += len(self._decoder.decode(piece))
