"""Log-probabilities of a completion, kept for the tokens that a response names and for no others.

llama_cpp.Llama wants `logits_all=True` for them and then holds n_ctx rows of n_vocab numbers: 4 GiB for 4096 tokens of
Gemma 4. A response needs of a row the chosen token and the few most likely ones.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from gemma_mtp.runtime.native import Floats
from gemma_mtp.runtime.sampling import Choose
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
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    top = min(top, len(logprobs))
    if top == 0:
        return float(logprobs[token]), []
    ids = np.flatnonzero(logprobs >= np.partition(logprobs, -top)[-top])
    best = ids[np.lexsort((-ids, -logprobs[ids]))][:top]
    return float(logprobs[token]), [(int(i), float(logprobs[i])) for i in best]


class LogProbs:
    """The log-probabilities of one request.

    Args:
        top: how many of the most likely tokens at each position.
        echo: whether the prompt's own tokens are wanted as well.
        lead: tokens that stock counts as completed before the first: the BOS token, if the prompt is empty.
    """

    def __init__(self, top: int, echo: bool, lead: list[int]) -> None:
        self.top = top
        self.echo = echo
        self.lead = len(lead)
        self.prompt: list[int] = []
        self.completion = lead
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

    def begin(self, target: Target, tokens: list[int]) -> None:
        """Note the prompt; if its own tokens are wanted, decode it with logits for all of them, but for the last.

        Raises:
            ValueError: they are wanted, and not all of them are tokens.
        """
        self.prompt = tokens
        if not self.echo:
            return
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

    def response(self, llm: llama_cpp.Llama, start: int, count: int, offset: Callable[[int], int]) -> dict[str, Any]:
        """The `logprobs` part of a choice, for the completion's tokens or, from a negative start, the prompt's too.

        Args:
            llm: for its tokenizer.
            start: first token, counted from the completion's first.
            count: how many.
            offset: gives the text offset of a token, from its number.
        """
        found: dict[str, Any] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        for number in range(start, start + count):
            position = len(self.prompt) + number - (self.lead if number >= 0 else 0)
            token = self.prompt[number] if number < 0 else self.completion[number]
            if token == llm.token_bos():
                continue
            text = _text(llm, [token])
            found["tokens"].append(text)
            found["text_offset"].append(offset(number))
            logprob, best = self._at.get(position, (None, []))  # nothing says how likely a prompt's first token is
            found["token_logprobs"].append(logprob)
            top = {_text(llm, [i]): value for i, value in best}
            found["top_logprobs"].append(None if logprob is None else top | {text: logprob})
        return found

    def attached(
        self, llm: llama_cpp.Llama, prompt: str | list[int], answers: Iterator[dict[str, Any]], stream: bool
    ) -> Generator[dict[str, Any], None, None]:
        """What stock answers when it is not asked for log-probabilities, whole or in chunks, with them."""
        if stream:
            return self._in_chunks(llm, len(prompt), answers)
        return (self._in_whole(llm, len(prompt), answer) for answer in answers)

    def _in_whole(self, llm: llama_cpp.Llama, length: int, answer: dict[str, Any]) -> dict[str, Any]:
        count = answer["usage"]["completion_tokens"]
        first = 1 if self.prompt[:1] == [llm.token_bos()] else 0
        start = first - len(self.prompt) if self.echo else 0
        tokens = self.prompt[first:] * self.echo + self.completion[:count]
        before = 0 if self.echo else length
        found = self.response(
            llm, start, len(tokens), lambda number: before + len(_text(llm, tokens[: number - start]))
        )
        if self.echo and found["tokens"]:  # as OpenAI's API has it
            found["token_logprobs"][0] = found["top_logprobs"][0] = None
        answer["choices"][0]["logprobs"] = found
        return answer

    def _in_chunks(
        self, llm: llama_cpp.Llama, length: int, chunks: Iterator[dict[str, Any]]
    ) -> Generator[dict[str, Any], None, None]:
        """A chunk holds one token; or several, where a character is spread over them.

        (Stock then sends them one by one, and the character is lost.)
        """
        done = 0
        for chunk in chunks:
            choice = chunk["choices"][0]
            if choice["finish_reason"] is None:
                count = _covered(llm, self.completion[done:], choice["text"])
                choice["logprobs"] = self.response(
                    llm, done, count, lambda number: length + len(_text(llm, self.completion[:number]))
                )
                done += count
            yield chunk


def _text(llm: llama_cpp.Llama, tokens: list[int]) -> str:
    text: str = llm.detokenize(tokens).decode("utf-8", errors="ignore")
    return text


def _covered(llm: llama_cpp.Llama, tokens: list[int], text: str) -> int:
    """How many tokens a chunk's text is made of: the fewest that are whole characters and say the same, or one."""
    wanted = text.encode()
    for count in range(1, len(tokens) + 1):
        made = llm.detokenize(tokens[:count])
        if made == wanted:
            return count
        if len(made) > len(wanted):
            break
    return min(1, len(tokens))
