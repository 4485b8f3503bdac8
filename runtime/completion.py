"""A completion: its prompt's tokens, the text of those that are generated, and answers in llama_cpp.Llama's shape.

Stock's own (`Llama._create_completion`) spells all tokens anew for each; here a token costs what it adds. Whole and
streamed answers come from the same loop and say the same.
"""

from __future__ import annotations

import functools
import time
import uuid
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from gemma_mtp.runtime.context import Context, Seen, Stock
from gemma_mtp.runtime.logprobs import LogProbs, Offset
from gemma_mtp.runtime.text import Part, Text, pieces_of
from llama_cpp import llama_cpp as lib

# The token that stock puts before a prompt, a suffix and the place between them, for want of a model's own.
INFILL = 0


@dataclass
class Asked:
    """What a completion shall be, beside how its tokens are chosen; checked before.

    Attributes:
        prompt: text, or token ids.
        suffix: text after the completion, None for none.
        max_tokens: tokens at most, 0 for none; None for as many as the context holds.
        echo: whether the text begins with the prompt.
        stop: what ends the text.
        stream: whether the answer comes in chunks.
        model: what the answer calls the model, None for its path.
        notes: keeps log-probabilities, if they are wanted.
        shown: the text of control tokens that the answer's text shows, for whoever takes it apart.
        media: images and sounds of the prompt, by their first positions.
        created: when it was asked for, in seconds since 1970.
        id: of the answer.
    """

    prompt: str | list[int]
    suffix: str | None = None
    max_tokens: int | None = None
    echo: bool = False
    stop: Sequence[str] = ()
    stream: bool = False
    model: str | None = None
    notes: LogProbs | None = None
    shown: Mapping[int, bytes] = field(default_factory=dict)
    media: Mapping[int, Seen] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")


def completion(llm: Context, asked: Asked, choosing: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """The answer, or its chunks.

    Args:
        llm: generates.
        asked: what is wanted.
        choosing: further arguments of `llm.generate`.

    Raises:
        ValueError: the prompt does not fit the context.
    """
    if llm.verbose:
        llm._ctx.reset_timings()
    prompt = prompt_tokens(llm, asked.prompt, asked.suffix)
    most = limit(llm, len(prompt), asked.max_tokens)
    take_from_cache(llm, prompt)
    made = Made(llm, asked, prompt)
    if most:
        with closing(llm.generate(prompt, **choosing)) as source:
            yield from made.reading(source, most)
    else:
        made.tokens.clear()
        llm.read(prompt)
    if llm.verbose:
        llm._ctx.print_timings()
    if llm.cache is not None:
        llm.cache[prompt + made.tokens] = llm.save_state()
    if asked.stream:
        yield from made.chunks(made.text.rest())
        yield made.answer("", None, made.finish)
    else:
        yield made.whole()


class Made:
    """What a completion has made so far.

    Args:
        llm: whose tokens they are.
        asked: what is wanted.
        prompt: the prompt's tokens.

    Attributes:
        tokens: made so far; as in stock a BOS token stands before them where the prompt is empty.
        text: of these.
        finish: why it ended.
    """

    def __init__(self, llm: Context, asked: Asked, prompt: list[int]) -> None:
        self.asked, self.prompt = asked, prompt
        self.tokens = lead(llm, asked.prompt)
        self.text = Text(asked.stop)
        self.finish = "length"
        self._llm, self._piece = llm, pieces_of(llm.tokenizer_)
        self._ends = stop_tokens(llm, asked.stop)
        self._spell = functools.cache(lambda token: str(llm.detokenize([token]), "utf-8", "ignore"))
        self._pieces: list[bytes] = []
        self._told = 0  # tokens that chunks have named
        self._offset = Offset(0 if asked.echo and not asked.stream else len(asked.prompt))
        for _ in self.tokens:
            self._add(b"")

    def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.text.add(piece)

    def reading(self, source: Iterator[int], most: int) -> Iterator[dict[str, Any]]:
        """Take tokens until the end, giving the chunks of a stream."""
        for token in source:
            going = self.take(token, most)
            if self.asked.stream and self.finish != "stop":
                yield from self.chunks(self.text.ready())
            if not going:
                return
        self.finish = "stop"  # the stopping criteria's

    def take(self, token: int, most: int) -> bool:
        """Go on with a token; False at the end, which is there with `most` tokens at the latest."""
        if self._llm.ends(token) or token in self._ends:
            self.finish = "stop"
            return False
        self.tokens.append(token)
        self._add(self.asked.shown.get(token) or self._piece(token))
        if self.text.stopped:
            self.finish = "stop"
            return False
        return len(self.tokens) < most

    def chunks(self, parts: Iterator[Part]) -> Iterator[dict[str, Any]]:
        """Chunks of parts of the text, each of one token or more."""
        for part in parts:
            told = self._logprobs(range(self._told, self._told + part.tokens))
            self._told += part.tokens
            yield self.answer(part.text, told)

    def answer(self, text: str, logprobs: dict[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        """A chunk, or what all of an answer but its usage is."""
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}
        return {
            "id": self.asked.id,
            "object": "text_completion",
            "created": self.asked.created,
            "model": self._llm.model_path if self.asked.model is None else self.asked.model,
            "choices": [choice],
        }

    def whole(self) -> dict[str, Any]:
        """The answer."""
        text = str(self.text)
        if self.asked.echo:
            text = spelled(self._llm, self.asked.prompt) + text
        made = len(self.tokens)
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": made}
        usage["total_tokens"] = sum(usage.values())
        return self.answer(text, self._logprobs(range(self._first(), made)), self.finish) | {"usage": usage}

    def _first(self) -> int:
        """Number of the first token that is told of: below 0 one of the prompt's, without its BOS token."""
        if not self.asked.echo:
            return 0
        return (1 if self.prompt[:1] == [self._llm.token_bos()] else 0) - len(self.prompt)

    def _logprobs(self, numbers: range) -> dict[str, Any] | None:
        notes = self.asked.notes
        if notes is None:
            return None
        llm = self._llm

        def piece(number: int) -> bytes:
            return llm.detokenize([self.prompt[number]]) if number < 0 else self._pieces[number]

        found = notes.told(numbers, self._spell, self._offset, piece)
        if self.asked.echo and not self.asked.stream:  # as OpenAI's API has it
            for key in ("token_logprobs", "top_logprobs"):
                found[key][:1] = [None] * len(found[key][:1])
        return found


def lead(llm: Context, prompt: str | list[int]) -> list[int]:
    """What stock counts as completed before anything is."""
    return [] if len(prompt) else [llm.token_bos()]


def spelled(llm: Context, prompt: str | list[int]) -> str:
    """A prompt's text; an image or a sound in it has none."""
    if isinstance(prompt, str):
        return prompt
    return str(llm.detokenize([token for token in prompt if token >= 0]), "utf-8", "ignore")


def prompt_tokens(llm: Context, prompt: str | list[int], suffix: str | None) -> list[int]:
    """The tokens of a prompt, as stock makes them: text gets the BOS token, and the EOS token, that the file asks for.

    With a suffix the model is to fill in what is between; stock marks the places with token 0, and so do we.
    """
    model, bos = llm._model, llm.token_bos()
    first, last = (
        [special if special != -1 else plain]
        for special, plain in ((model.token_cls(), bos), (model.token_sep(), llm.token_eos()))
    )
    given = not isinstance(prompt, str) and suffix is None
    if given or not model.add_bos_token() or first == [-1]:
        first = []
    if given or (not model.add_eos_token() and model.token_sep() == -1):
        last = []
    words = prompt
    if isinstance(words, str):
        words = llm.tokenize(words.encode(), add_bos=False, special=suffix is None) if words else []
    inner = words
    if suffix is not None:
        after = [INFILL, *(llm.tokenize(suffix.encode(), add_bos=False, special=False) if suffix else [])]
        before = [INFILL, *words]
        inner = [*(after + before if llm.spm_infill else before + after), INFILL]
    made = [*first, *inner, *last]
    if made[:2] == [bos, bos]:
        warnings.warn(
            f"the prompt begins with {model.token_get_text(bos)!r}, which is put before every text: there are two now, "
            "and answers get worse; leave it out.",
            RuntimeWarning,
            stacklevel=2,
        )
    return made


def limit(llm: Context, prompt: int, wanted: int | None) -> int:
    """How many tokens may follow a prompt of so many.

    Raises:
        ValueError: there is no room for one.
    """
    context = int(llm.n_ctx())
    if prompt >= context:
        raise ValueError(
            f"Requested tokens ({prompt}) exceed context window of {context}; raise n_ctx, or shorten the prompt."
        )
    room = context - prompt
    return room if wanted is None else min(wanted, room)


def stop_tokens(llm: Context, stops: Sequence[str]) -> set[int]:
    """Stops that are control tokens: the text does not show these, so they are known by their ids."""
    model = llm._model
    found = (model.tokenize(stop.encode(), add_bos=False, special=True) for stop in stops if stop)
    return {ids[0] for ids in found if len(ids) == 1 and lib.llama_vocab_is_control(model.vocab, ids[0])}


def take_from_cache(llm: Context, prompt: list[int]) -> None:
    """Load the state of the cache that shares most with a prompt, if that is more than the object's own."""
    if llm.cache is None:
        return
    try:
        state = llm.cache[prompt]
    except KeyError:
        return
    kept = state.input_ids[: state.n_tokens].tolist()
    if Stock.longest_token_prefix(kept, prompt) > Stock.longest_token_prefix(llm._input_ids.tolist(), prompt):
        seed = llm._seed
        llm.load_state(state)
        llm._seed = seed  # which is the object's own, not of whoever filled the cache
