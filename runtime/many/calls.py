"""`create_completions` and `create_chat_completions`: many prompts through a few sequences of one KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gemma_mtp.runtime import chat
from gemma_mtp.runtime.api import CHATTING, COMPLETING, Api
from gemma_mtp.runtime.arguments import CHAT, GENERATE, REQUEST
from gemma_mtp.runtime.borrowed import bind
from gemma_mtp.runtime.checks import FLAG, checked, whole
from gemma_mtp.runtime.completion import Made, limit, prompt_tokens
from gemma_mtp.runtime.context import Stock
from gemma_mtp.runtime.draft.drafter import Drafter
from gemma_mtp.runtime.faults import check_grammar
from gemma_mtp.runtime.guard import STREAM
from gemma_mtp.runtime.many.chat import Asking, Replay
from gemma_mtp.runtime.many.job import Job
from gemma_mtp.runtime.many.rounds import Answer, Rounds
from gemma_mtp.runtime.many.slots import Slots
from gemma_mtp.runtime.processors import processors_of
from gemma_mtp.runtime.request import WISHES, Request, telling
from gemma_mtp.runtime.sampling import Sampler, reading
from gemma_mtp.runtime.stats import Stats
from llama_cpp import llama_cpp as lib

PARALLEL = 4
# What requests may say that stock's may not, beside wishes.
FORMAT, CHAT_WORDS = COMPLETING.keys() - WISHES.keys(), CHATTING.keys() - WISHES.keys()
Prompt = str | Sequence[int] | Mapping[str, Any]
Chat = Sequence[Mapping[str, Any]] | Mapping[str, Any]
Prepare = Callable[[Any], Job]


class Many(Api):
    """The calls for many prompts at once."""

    drafter: Drafter | None
    _costs_path: Path
    _choice: Callable[..., Sampler]
    _rounds: type[Rounds] = Rounds

    @cached_property
    def _ends(self) -> list[int]:
        """All tokens that end an answer."""
        return [token for token in range(self._n_vocab) if self.ends(token)]

    def create_completions(
        self,
        prompts: Iterable[Prompt],
        *,
        n_parallel: int = PARALLEL,
        as_completed: bool = False,
        **options: Any,
    ) -> Generator[Any, None, None]:
        """Complete many prompts, several at a time: each answer is that of `create_completion` for its prompt alone.

        A context of its own is made for the call, with a KV cache of `n_ctx` tokens for each of `n_parallel` sequences.
        Prompts are taken when there is a sequence free for one, so that they may come from an iterator of any length;
        what a prompt begins with is decoded once, if one before it in any of the sequences began with the same. The
        object is in use until the last answer is read; another call of the same thread before that ends these.

        Args:
            prompts: texts, lists of token ids, or dicts with "prompt" and whatever else `create_completion` takes, for
                this prompt alone.
            n_parallel: how many are generated at a time.
            as_completed: give pairs (number of the prompt, answer) as they get ready, instead of answers in order.
            options: for all prompts, as `create_completion` takes them, without `stream`.

        Yields:
            For each prompt its answer, or the exception that `create_completion` would have raised.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
            RuntimeError: memory is short.
        """
        return self._stream(prompts, self.jobs_of_prompts(**options), "prompts", n_parallel, as_completed)

    def jobs_of_prompts(self, **options: Any) -> Prepare:
        """What makes jobs of prompts, for `answered`; arguments and errors as `create_completions`."""
        wishes, ours, options = _split(options, FORMAT)
        self._check(self._completing(bind(Stock.create_completion, "", **options), ours.get("response_format")), wishes)

        def prepare(item: Any) -> Job:
            own, form, more = _split(item if isinstance(item, Mapping) else {"prompt": item}, FORMAT)
            bound = bind(Stock.create_completion, **(options | more))
            given = self._completing(bound, (ours | form).get("response_format"))
            return self._job(given, self.asked(**(wishes | own)))

        return prepare

    def create_chat_completions(
        self,
        conversations: Iterable[Chat],
        *,
        n_parallel: int = PARALLEL,
        as_completed: bool = False,
        **options: Any,
    ) -> Generator[Any, None, None]:
        """Answer many chats, several at a time: as `create_completions`.

        Args:
            conversations: lists of messages, or dicts with "messages" and whatever else `create_chat_completion` takes,
                for this one alone.
            n_parallel: how many are generated at a time.
            as_completed: give pairs (number of the conversation, answer) as they get ready, instead of answers in
                order.
            options: for all of them, as `create_chat_completion` takes them, without `stream`.

        Yields:
            For each conversation its answer, or the exception that `create_chat_completion` would have raised.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
            RuntimeError: memory is short.
        """
        return self._stream(conversations, self.jobs_of_chats(**options), "conversations", n_parallel, as_completed)

    def jobs_of_chats(self, **options: Any) -> Prepare:
        """What makes jobs of conversations, for `answered`; arguments and errors as `create_chat_completions`."""
        wishes, ours, options = _split(options, CHAT_WORDS)
        bound = bind(Stock.create_chat_completion, (), **options)
        self._check(checked(CHAT, bound | ours), wishes)
        if self.chat_handler is not None:
            raise ValueError("a chat_handler reads pictures or sound, one chat at a time; use create_chat_completion.")

        def prepare(item: Any) -> Job:
            own, words, more = _split(item if isinstance(item, Mapping) else {"messages": item}, CHAT_WORDS)
            bound = bind(Stock.create_chat_completion, **(options | more))
            given = self._chatting(bound, dict.fromkeys(CHAT_WORDS) | ours | words)
            self._possible_choice(given)
            request = self.asked(**(wishes | own))
            if self._templates is None:
                job: Job = self._asking(self._for_handler(given, bound), request, [])
                return job
            made = chat.prepare(self, self._templates, given, _no_media)
            given |= chat.as_completion(made, given)
            return self._job(given, request, partial(chat.whole, made), made)

        return prepare

    def _check(self, given: dict[str, Any], wishes: dict[str, Any]) -> None:
        """What all prompts ask for, looked at before the first."""
        self.check_open()
        self._possible_choice(given)
        self.asked(**wishes)
        self._choosing(given)
        if given["grammar"] is not None:
            check_grammar(self._model.model, given["grammar"])

    @staticmethod
    def _possible_choice(given: Mapping[str, Any]) -> None:
        if given["stream"]:
            raise ValueError("stream is True; many prompts at once are answered whole: leave it out.")
        if given["mirostat_mode"] != 0 and given["temperature"] > 0:
            raise ValueError("mirostat draws its own random numbers, and works for one prompt at a time; leave it out.")

    def _job(
        self,
        given: dict[str, Any],
        request: Request,
        finish: Callable[[Any], Any] | None = None,
        prepared: chat.Prepared | None = None,
    ) -> Job:
        """A completion, by its checked arguments."""
        self._possible_choice(given)
        asked = self._to_make(given, prepared)
        tokens = prompt_tokens(self, asked.prompt, asked.suffix)
        if not tokens or min(tokens) < 0:
            raise ValueError("the prompt is empty, or holds an image or a sound; give text, or its tokens.")
        most = limit(self, len(tokens), asked.max_tokens)
        choosing = checked(GENERATE, bind(Stock.generate, tokens, **self._choosing(given)))
        choosing["stopping_criteria"] = reading(choosing["stopping_criteria"])
        choosing["logits_processor"] = processors_of(
            choosing["logits_processor"], request.min_tokens or 0, lambda: self._ends
        )
        made, seed = Made(self, asked, tokens), self._chosen(given["seed"])
        return Job(tokens, made, most, seed, request, choosing, asked.notes, finish or (lambda answer: answer))

    def _asking(self, given: dict[str, Any], request: Request, answers: list[dict[str, Any]]) -> Any:
        """What a chat handler makes of the answers so far: a chat's answer, or the next job."""
        try:
            answer = self._handler()(llama=Replay(self, answers), **given)
        except Asking as asking:
            wanted = checked(REQUEST, asking.given)
            return self._job(wanted, request, lambda answer: self._asking(given, request, [*answers, answer]))
        return telling(request, answer)

    def _stream(
        self, items: Iterable[Any], prepare: Prepare, name: str, n_parallel: int, as_completed: bool
    ) -> Generator[Any, None, None]:
        """Answers, as a stream of the object's."""
        whole(1, lib.llama_max_parallel_sequences(), ": sequences at a time")("n_parallel", n_parallel)
        FLAG("as_completed", as_completed)
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise ValueError(f"{name} is {type(items).__name__}; give a list of them, or an iterator.")
        count = min(n_parallel, len(items)) if isinstance(items, Sequence) else n_parallel
        return self.answered(items, prepare, count, as_completed)

    def answered(
        self, items: Iterable[Any], prepare: Prepare, count: int, as_completed: bool = False
    ) -> Generator[Any, None, None]:
        """As the calls, for items of any kind.

        Args:
            items: what is asked; exceptions stand for themselves.
            prepare: makes a job of one; what it raises is the answer.
            count: sequences.
            as_completed: as there.
        """
        found = self._through(iter(items), prepare, count)
        return self.guard.stream(_paired(found) if as_completed else _in_order(found), STREAM)

    def _through(self, items: Iterator[Any], prepare: Prepare, count: int) -> Generator[Answer, None, None]:
        self.check_open()
        first = list(islice(items, 1))
        if not first:
            return
        jobs = enumerate(map(partial(_prepared, prepare), chain(first, items)))
        self.stats = stats = Stats()
        try:
            with closing(Slots(self, count, self.drafter)) as slots:
                yield from self._rounds(slots, self._choice, self._costs_path, stats).run(jobs)
        finally:
            self.total_stats.add(stats)


def _no_media() -> Any:
    raise ValueError("images and sounds are read for one prompt at a time; use create_chat_completion.")


def _split(given: Mapping[str, Any], words: Collection[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Wishes, those of our own words that are there, and what stock knows."""
    wishes, ours = ({name: given[name] for name in names if name in given} for names in (WISHES, words))
    return wishes, ours, {name: value for name, value in given.items() if name not in wishes.keys() | ours.keys()}


def _prepared(prepare: Prepare, item: Any) -> Job | Exception:
    """What becomes of a prompt before it is decoded."""
    if isinstance(item, Exception):
        return item
    try:
        return prepare(item)
    except Exception as problem:
        return problem


def _paired(found: Iterable[Answer]) -> Generator[tuple[int, Any], None, None]:
    for answer in found:
        yield answer.number, answer.value


def _in_order(found: Iterable[Answer]) -> Generator[Any, None, None]:
    """Answers in the order of their prompts; those that get ready too early wait."""
    waiting: dict[int, Any] = {}
    following = 0
    for answer in found:
        waiting[answer.number] = answer.value
        while following in waiting:
            yield waiting.pop(following)
            following += 1
