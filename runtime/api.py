"""llama_cpp.Llama's calls, with our keywords: one request at a time, seeds told, log-probabilities, clear errors."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import link
from gemma_mtp.runtime.borrowed import bind, like
from gemma_mtp.runtime.chat_format import UNSAID
from gemma_mtp.runtime.context import Context, Stock
from gemma_mtp.runtime.faults import Careful, check_grammar
from gemma_mtp.runtime.guard import CALL, STREAM, exclusive
from gemma_mtp.runtime.logprobs import LogProbs
from gemma_mtp.runtime.request import (
    WISHES,
    DraftLength,
    Request,
    ask,
    asked,
    checked_length,
    chosen_seed,
    following_seed,
    tell,
    telling,
)
from gemma_mtp.runtime.sampling import reading
from gemma_mtp.runtime.stats import Stats
from llama_cpp import LogitsProcessorList, llama_chat_format
from llama_cpp import llama_cpp as lib


class Api(Context):
    """What is ours in llama_cpp.Llama's public calls, but for generation itself.

    Attributes:
        stats: counters of the latest request.
        total_stats: counters of all requests.
    """

    stats: Stats
    total_stats: Stats
    chat_format: str
    _seed: Any
    # Of the request that runs, for stock's code stands between a call and what generates its tokens:
    _request: Request | None  # what it asks for, if it is a completion
    _logprobs: LogProbs | None  # what it keeps, if it is to tell them
    _careful: Careful  # its logits processors
    _counting: bool  # whether `stats` are its own

    _defaults: Request  # what a request asks for that says nothing itself
    _told: set[str]  # what was said
    _undrafted: str | None  # why nothing can be drafted, and what to do about it

    def _tell(self, reason: str) -> None:
        """Say once per object why a request runs otherwise than one may think."""
        if reason not in self._told:
            self._told.add(reason)
            print(f"gemma-mtp: {reason}.", file=sys.stderr)

    @property
    def mtp(self) -> bool | None:
        """For requests that say nothing else: False generates without drafting, True insists on it.

        Raises:
            ValueError: on setting it to what is neither, or to True where nothing can be drafted.
        """
        return self._defaults.mtp

    @mtp.setter
    def mtp(self, value: bool | None) -> None:
        self._defaults = self._possible(replace(self._defaults, mtp=value))

    @property
    def draft_length(self) -> DraftLength:
        """Tokens to draft in a round, or "auto"; for requests that say nothing else.

        Raises:
            ValueError: on setting it to what is neither.
        """
        return checked_length(self._defaults.draft_length)

    @draft_length.setter
    def draft_length(self, value: DraftLength) -> None:
        self._defaults = self._possible(replace(self._defaults, draft_length=checked_length(value)))

    def asked(self, mtp: bool | None, draft_length: DraftLength | None) -> Request:
        """All that a call asks for: what it says itself, else the call around it, else this object.

        Raises:
            ValueError: a wish is not what it may be, or cannot be had.
        """
        return self._possible(asked(mtp, draft_length).within(self._defaults))

    def _possible(self, request: Request) -> Request:
        if request.mtp and self._undrafted is not None:
            raise link.PairError(f"MTP was asked for, but {self._undrafted}.")
        if request.mtp and request.length == 0:
            raise ValueError('MTP was asked for, but draft_length is 0, for no drafts; give one from 1 on, or "auto".')
        return request

    @like(Stock.__call__, **WISHES)
    def __call__(
        self, *args: Any, mtp: bool | None = None, draft_length: DraftLength | None = None, **kwargs: Any
    ) -> Any:
        given = bind(Stock.__call__, *args, **kwargs)
        return self.create_completion(**given, mtp=mtp, draft_length=draft_length)

    @like(Stock.create_completion, **WISHES)
    def create_completion(
        self, *args: Any, mtp: bool | None = None, draft_length: DraftLength | None = None, **kwargs: Any
    ) -> Any:
        self.check_open()
        given = bind(Stock.create_completion, *args, **kwargs)
        if given["logit_bias"] is not None and given["logits_processor"] is not None:
            # Stock loses both: it takes the None that list.extend returns for the new list.
            given["logits_processor"] = _with_bias(given["logits_processor"], given["logit_bias"])
            given["logit_bias"] = None
        given["stopping_criteria"] = reading(given["stopping_criteria"])
        stream = given["stream"]
        # What only the caller's context knows is asked here, before a stream starts.
        source = self._complete(self.asked(mtp, draft_length), **given)
        answers = self.guard.stream(source, STREAM if stream else CALL)
        return answers if stream else next(answers)

    def _complete(
        self, request: Request, prompt: str | list[int], logprobs: int | None, max_tokens: int | None, **given: Any
    ) -> Generator[Any, Any, None]:
        """Stock's completion, its seed chosen and told, its log-probabilities kept here instead of there."""
        wanted = None if logprobs is None else LogProbs(logprobs, given["echo"], [] if prompt else [self.token_bos()])
        seed = following_seed(self._seed) if given["seed"] is None else chosen_seed(given["seed"])
        request.told["seed"] = seed
        self._request, self._logprobs = request, wanted
        try:
            given |= {"max_tokens": -1 if max_tokens is None else max_tokens, "seed": seed}
            source = super()._create_completion(prompt, **given)
            if wanted is not None:
                source = wanted.attached(self, prompt, source, given["stream"])
            with self.counted(seed) as stats, closing(source):
                for item in source:
                    stats.lap()
                    yield tell(request, item)
        finally:
            self._request = self._logprobs = None

    @like(Stock.create_chat_completion, **WISHES, chat_template_kwargs="dict[str, Any] | None")
    def create_chat_completion(
        self,
        *args: Any,
        mtp: bool | None = None,
        draft_length: DraftLength | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As llama_cpp.Llama.create_chat_completion, with three more; the answer, or a stream's last chunk, has "seed".

        Args:
            args: as there.
            mtp: False generates without drafting; True insists on it.
            draft_length: tokens to draft in a round, or "auto".
            chat_template_kwargs: variables for the chat template, for instance {"enable_thinking": True}.
            kwargs: as there.
        """
        self.check_open()
        if self.chat_format == UNSAID:
            self._tell(f"{self.model_path} has no chat template; the chat is in Gemma 4's own format")
        given = bind(Stock.create_chat_completion, *args, **kwargs) | (chat_template_kwargs or {})
        handler = (
            self.chat_handler
            or self._chat_handlers.get(self.chat_format)
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )
        request = self.asked(mtp, draft_length)
        return telling(request, ask(request, lambda: handler(llama=self, **given)))

    @contextmanager
    def counted(self, seed: int) -> Iterator[Stats]:
        """Counters and clock of a request: of a completion, or of tokens that are generated without one."""
        if self._counting:  # the tokens of a completion
            yield self.stats
            return
        self._counting, self.stats = True, Stats(seed=seed)
        try:
            yield self.stats
        finally:
            self._counting = False
            self.total_stats.add(self.stats)

    def _init_sampler(self, *args: Any, logits_processor: Any = None, grammar: Any = None, **kwargs: Any) -> Any:
        """Stock's sampler chain, with a grammar that llama.cpp can read and processors whose exceptions are kept.

        Within a request its seed is the one that is told, where llama.cpp would draw one and keep it to itself.
        """
        if grammar is not None:
            check_grammar(self._model.vocab, grammar)
        self._careful = Careful(logits_processor or ())
        careful = [self._careful] if logits_processor is not None else None
        own = self._seed
        if self._counting:
            self._seed = self.stats.seed
        try:
            return super()._init_sampler(*args, logits_processor=careful, grammar=grammar, **kwargs)
        finally:
            self._seed = own

    @exclusive
    @like(Stock.sample)
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As llama_cpp.Llama.sample; what a logits processor raises is raised here."""
        token: int = super().sample(*args, **kwargs)
        self._careful.check()
        return token

    @exclusive
    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """As llama_cpp.Llama.embed.

        Without pooling, as Gemma 4 is loaded, stock reads the rows of the second text of a batch and of those after it
        from the wrong place; one text a batch is read right.
        """
        if isinstance(input, str) or self.pooling_type() != lib.LLAMA_POOLING_TYPE_NONE:
            return super().embed(input, normalize, truncate, return_count)
        made = [super(Api, self).embed(text, normalize, truncate, True) for text in input]
        rows, count = [row for row, _ in made], sum(n for _, n in made)
        return (rows, count) if return_count else rows


def _with_bias(processors: Any, bias: dict[int, float]) -> LogitsProcessorList:
    """Logits processors with a bias after them."""
    ids = np.array([int(token) for token in bias], dtype=np.intp)
    added = np.array([float(value) for value in bias.values()], dtype=np.single)

    def add_bias(input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        del input_ids
        scores[ids] += added
        return scores

    return LogitsProcessorList([*processors, add_bias])
