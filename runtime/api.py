"""llama_cpp.Llama's calls, with our keywords: one request at a time, seeds told, log-probabilities, clear errors."""

from __future__ import annotations

import sys
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.convert import link
from gemma_mtp.runtime import chat, chat_native
from gemma_mtp.runtime.arguments import CHAT, REQUEST, check_bias, check_messages, check_tokens, check_variables
from gemma_mtp.runtime.borrowed import bind, like
from gemma_mtp.runtime.chat_format import UNSAID, stock_grammar
from gemma_mtp.runtime.checks import checked
from gemma_mtp.runtime.completion import Asked, completion, lead
from gemma_mtp.runtime.context import Context, Stock
from gemma_mtp.runtime.faults import Careful, check_grammar
from gemma_mtp.runtime.guard import CALL, STREAM, exclusive
from gemma_mtp.runtime.logprobs import LogProbs
from gemma_mtp.runtime.media import KINDS
from gemma_mtp.runtime.pair import projector_of
from gemma_mtp.runtime.processors import with_bias
from gemma_mtp.runtime.request import (
    WISHES,
    DraftLength,
    Request,
    ask,
    asked,
    checked_length,
    chosen_seed,
    following_seed,
    has_seed,
    tell,
    telling,
)
from gemma_mtp.runtime.stats import Stats
from llama_cpp import llama_chat_format
from llama_cpp import llama_cpp as lib

if TYPE_CHECKING:
    from gemma_mtp.runtime.projector import Projector

# Arguments of a completion that `generate` has under the same name.
CHOOSING = (
    "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty", "presence_penalty", "tfs_z",
    "mirostat_mode", "mirostat_tau", "mirostat_eta", "logits_processor", "stopping_criteria", "grammar",
)  # fmt: skip


STOCK_CHATS = (
    "this llama-cpp-python lacks gemma-mtp's patches: tools and schemas are as it has them itself; `gemma-mtp build` "
    "installs the patched build"
)
COMPLETING = WISHES | {"response_format": "dict[str, Any] | None"}
CHATTING = WISHES | {
    "chat_template_kwargs": "dict[str, Any] | None",
    "parallel_tool_calls": "bool | None",
    "reasoning_effort": "str | None",
}


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
    _named_format: str | None  # the chat format that the caller named
    _mmproj: tuple[Any, Any]  # what the target was asked for by, and the projector that is wanted
    _projector: Projector | None  # once an image or a sound came
    _stack: Any

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

    def asked(
        self, mtp: bool | None = None, draft_length: DraftLength | None = None, min_tokens: int | None = None
    ) -> Request:
        """All that a call asks for: what it says itself, else the call around it, else this object.

        Raises:
            ValueError: a wish is not what it may be, or cannot be had.
        """
        return self._possible(asked(mtp, draft_length, min_tokens).within(self._defaults))

    def _possible(self, request: Request) -> Request:
        if request.mtp and self._undrafted is not None:
            raise link.PairError(f"MTP was asked for, but {self._undrafted}.")
        if request.mtp and request.length == 0:
            raise ValueError('MTP was asked for, but draft_length is 0, for no drafts; give one from 1 on, or "auto".')
        return request

    @like(Stock.__call__, **COMPLETING)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wishes = {name: kwargs.pop(name, None) for name in COMPLETING}
        return self.create_completion(**bind(Stock.__call__, *args, **kwargs), **wishes)

    @like(Stock.create_completion, **COMPLETING)
    def create_completion(
        self,
        *args: Any,
        mtp: bool | None = None,
        draft_length: DraftLength | None = None,
        min_tokens: int | None = None,
        response_format: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As llama_cpp.Llama.create_completion, with four more; the answer, or a stream's last chunk, tells more.

        Args:
            args: as there; `max_tokens` of 0 reads the prompt and makes nothing, below 0 or None makes what fits.
            mtp: False generates without drafting; True insists on it.
            draft_length: tokens to draft in a round, or "auto".
            min_tokens: tokens before which none ends the answer.
            response_format: as OpenAI's chats have it, {"type": "json_schema", "json_schema": {"schema": ...}}.
            kwargs: as there.

        Returns:
            As there; with "seed", and "timings" with the names that llama-server has for them.

        Raises:
            ValueError: an argument is not what it may be, or the prompt does not fit the context.
        """
        self.check_open()
        given = self._completing(bind(Stock.create_completion, *args, **kwargs), response_format)
        # What only the caller's context knows is asked here, before a stream starts, and what is wrong is told.
        return self._read(self._begun(self.asked(mtp, draft_length, min_tokens), given), given["stream"])

    def _read(self, source: Generator[Any, Any, None], stream: bool) -> Any:
        """The stream of a request that is its own, or its answer."""
        if stream:
            return self.guard.stream(source, STREAM)
        with closing(self.guard.stream(source, CALL)) as answers:
            return next(answers)

    def _completing(self, bound: dict[str, Any], response_format: Any) -> dict[str, Any]:
        """The arguments of a completion, checked, with the grammar of its response_format."""
        given = checked(REQUEST, bound)
        if (form := CHAT["response_format"]("response_format", response_format)) is None:
            return given
        if given["grammar"] is not None:
            raise ValueError("grammar is given, and a response_format, which has one of its own; give either.")
        if chat_native.functions() is None:
            self._tell(STOCK_CHATS)
            return given | {"grammar": stock_grammar(form)}
        return given | {"grammar": chat.format_grammar(form)}

    def _begun(
        self, request: Request, given: dict[str, Any], made: chat.Prepared | None = None
    ) -> Generator[Any, Any, None]:
        """A completion, of a chat if it is one, whose arguments are looked at before anything is asked of it."""
        return self._complete(request, self._to_make(given, made), given["seed"], self._choosing(given))

    def _complete(
        self, request: Request, asked: Asked, wanted: int | None, choosing: dict[str, Any]
    ) -> Generator[Any, Any, None]:
        """A completion, its seed chosen and told."""
        seed = self._chosen(wanted)
        request.told["seed"] = seed
        self._request, self._logprobs, self._media = request, asked.notes, asked.media
        try:
            with self.counted(seed, request) as stats, closing(completion(self, asked, choosing)) as source:
                for item in source:
                    stats.lap()
                    request.told["timings"] = stats.timings()
                    yield tell(request, item)
        finally:
            self._request, self._logprobs, self._media = None, None, {}

    def _choosing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` for those of a completion."""
        choosing = {name: given[name] for name in CHOOSING if name in given} | {"temp": given["temperature"]}
        if given["logit_bias"]:
            check_bias(given["logit_bias"], self._n_vocab)
            choosing["logits_processor"] = with_bias(choosing["logits_processor"] or (), given["logit_bias"])
        return choosing

    def _to_make(self, given: dict[str, Any], made: chat.Prepared | None) -> Asked:
        """What a completion shall be, by its arguments and what was made of a chat."""
        prompt, most = given["prompt"], given["max_tokens"]
        if not isinstance(prompt, str):
            check_tokens(prompt, self._n_vocab)
        notes = None
        if given["logprobs"] is not None:
            notes = LogProbs(given["logprobs"], given["echo"], lead(self, prompt), self.token_bos())
        asked = {name: given[name] for name in ("prompt", "suffix", "echo", "stop", "stream", "model")}
        if made is not None:
            asked |= {"shown": made.shown, "media": made.media}
        return Asked(max_tokens=None if most is None or most < 0 else most, notes=notes, **asked)

    def _chosen(self, seed: int | None) -> int:
        """The seed of a completion: its own, which leaves the object's as it is, or the next of the object's."""
        if seed is not None:
            return chosen_seed(seed)
        following = following_seed(self._seed)
        if has_seed(self._seed):
            self._seed = following
        return following

    @like(Stock.create_chat_completion, **CHATTING)
    def create_chat_completion(
        self,
        *args: Any,
        chat_template_kwargs: dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        reasoning_effort: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As llama_cpp.Llama.create_chat_completion, with what `create_completion` has beside stock's, and three more.

        Templates, tools, schemas and what an answer is taken apart by are llama.cpp's own, as in llama-server. For a
        `chat_handler`, or a `chat_format` of llama-cpp-python that was named, they are that library's.

        Args:
            args: as there.
            chat_template_kwargs: variables for the chat template, for instance {"enable_thinking": True}.
            parallel_tool_calls: whether an answer may have several calls; as the template has it if nothing is said.
            reasoning_effort: "none" for no thinking; another lets the model think, where it can.
            kwargs: as there, and `mtp`, `draft_length`, `min_tokens`.

        Returns:
            As there; the answer, or a stream's last chunk, has "seed" and "timings". Thoughts are `reasoning_content`.

        Raises:
            ValueError: an argument is not what it may be, a schema asks for what no grammar can say (named by its
                path), or the chat does not fit the context.
        """
        self.check_open()
        request = self.asked(**{name: kwargs.pop(name, None) for name in WISHES})
        more = {"chat_template_kwargs": chat_template_kwargs, "parallel_tool_calls": parallel_tool_calls}
        bound = bind(Stock.create_chat_completion, *args, **kwargs)
        given = self._chatting(bound, more | {"reasoning_effort": reasoning_effort})
        if self._templates is None:
            arguments = self._for_handler(given, bound)
            return telling(request, ask(request, lambda: self._handler()(llama=self, **arguments)))
        made = chat.prepare(self, self._templates, given, self.projector)
        given |= chat.as_completion(made, given)
        source = chat.answers(made, self._begun(request, given, made), given["stream"])
        return self._read(source, given["stream"])

    def _chatting(self, bound: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a chat, stock's and ours, checked."""
        given = checked(CHAT, bound | more)
        reads = None if self.chat_handler is not None else () if self._templates is None else tuple(KINDS)
        check_messages(given["messages"], reads)
        check_variables(given["chat_template_kwargs"] or {}, bound)
        if self.chat_format == UNSAID:
            self._tell(f"{self.model_path} has no chat template; the chat is in Gemma 4's own format")
        return given

    @cached_property
    def _templates(self) -> chat_native.Templates | None:
        """What chats are made of; None where stock makes them."""
        if self.chat_handler is not None or chat_native.functions() is None:
            return None
        try:
            return chat.templates_of(self, self.chat_format, self._named_format)
        except ValueError as problem:
            self._tell(f"llama.cpp cannot read the chat template ({problem}); chats are as llama-cpp-python has them")
            return None

    @exclusive
    def projector(self) -> Projector:
        """What reads images and sounds; it is loaded when the first one comes.

        Raises:
            gemma_mtp.convert.link.MtpError: there is none.
            RuntimeError: llama.cpp cannot load it.
        """
        if self._projector is None:
            from gemma_mtp.runtime.projector import Projector

            asked, wanted = self._mmproj
            path = projector_of(asked, link.read_header(Path(self.model_path)), wanted)
            if path is None:
                raise link.MtpError(_no_projector(asked, wanted))
            self._projector = Projector(path, self)
            self._stack.callback(self._projector.close)
        return self._projector

    def _for_handler(self, given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
        """The arguments that llama-cpp-python's chat handlers know."""
        if chat_native.functions() is None and any(given[name] is not None for name in chat.WANTING):
            self._tell(STOCK_CHATS)
        return {name: given[name] for name in known} | (given["chat_template_kwargs"] or {})

    def _handler(self) -> Any:
        """What formats messages and reads answers where llama-cpp-python does."""
        return (
            self.chat_handler
            or self._chat_handlers.get(self.chat_format)
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )

    @contextmanager
    def counted(self, seed: int, request: Request) -> Iterator[Stats]:
        """Counters and clock of a request: of a completion, or of tokens that are generated without one."""
        if self._counting:  # the tokens of a completion
            yield self.stats
            return
        self._counting, self.stats = True, Stats(seed=seed, draft_length=request.length)
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
            check_grammar(self._model.model, grammar)
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


def _no_projector(target: Any, wanted: Any) -> str:
    """Why images and sounds cannot be read, with the next step."""
    if wanted is None:
        return "the chat has an image or a sound, and this Llama was loaded with mmproj=None; load it without."
    return (
        f"the chat has an image or a sound, and there is no projector beside {target}; put the model's mmproj file "
        "there (gemma-mtp convert --mmproj makes it), or name it with mmproj= (--mmproj)."
    )
