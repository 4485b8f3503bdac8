"""llama_cpp.Llama's calls, made safe to use with a drafter: one request at a time, log-probabilities, clear errors."""

from __future__ import annotations

import copy
import functools
import inspect
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt
from gemma_mtp.convert import link
from gemma_mtp.runtime import logprobs
from gemma_mtp.runtime.draft.drafter import Drafter
from gemma_mtp.runtime.faults import CLOSED, Careful, Closed, check_grammar, explain_decode
from gemma_mtp.runtime.guard import CALL, STREAM, Guard
from gemma_mtp.runtime.logprobs import Kept
from gemma_mtp.runtime.request import (
    ASKED,
    WISHES,
    DraftLength,
    Request,
    ask,
    chosen_seed,
    following_seed,
    per_request,
    tell,
    telling,
    with_keywords,
    within,
)
from gemma_mtp.runtime.sampling import reading
from gemma_mtp.runtime.stats import Stats
from llama_cpp import LogitsProcessorList, llama_chat_format
from llama_cpp import llama_cpp as lib

Stock = llama_cpp.Llama


def exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that needs the object for itself while it runs."""

    @functools.wraps(method)
    def guarded(self: Api, *args: Any, **kwargs: Any) -> Any:
        self.check_open()
        with self.guard.call():
            return method(self, *args, **kwargs)

    return guarded


def exclusive_stream(method: Callable[..., Generator[Any, Any, None]]) -> Callable[..., Any]:
    """A generator method that needs the object for itself from its first item to its last."""

    @functools.wraps(method)
    def guarded(self: Api, *args: Any, **kwargs: Any) -> Any:
        self.check_open()
        return self.guard.stream(_explained(method(self, *args, **kwargs)))

    return guarded


def _explained(source: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    """The same generator; what llama.cpp refuses in it is raised with the next step."""
    try:
        yield from source
    except RuntimeError as problem:
        explained = explain_decode(problem)
        if str(explained) == str(problem):
            raise
        raise explained from problem


class Api(llama_cpp.Llama):
    """What is ours in llama_cpp.Llama's methods, but for generation itself.

    Attributes:
        guard: lets one thread in at a time; `guard.patience` is how many seconds others wait.
        stats: counters of the latest request.
        total_stats: counters of all requests.
    """

    # Set by llama_cpp.Llama: how many tokens the KV cache holds, and which they are, [n_ctx].
    n_tokens: int
    input_ids: npt.NDArray[np.intc]
    scores: npt.NDArray[np.single]
    _ctx: Any
    _seed: Any

    def prepare(self) -> None:
        """The state of this class; before llama_cpp.Llama's __init__."""
        self._stack = ExitStack()  # for close() and __del__, should what follows raise
        self.guard = Guard()
        self.drafter: Drafter | None = None
        self.request = Request()  # of the completion that runs
        self.kept: Kept | None = None  # its log-probabilities
        self.careful = Careful(())  # the logits processors of the latest sampler
        self.stats = Stats()
        self.total_stats = Stats()
        self._counting = False

    def fit_arrays(self) -> None:
        """Arrays as long as the context that llama.cpp made; after llama_cpp.Llama's __init__.

        llama.cpp rounds n_ctx up, to 256 at least, and stock has no room for the tokens beyond the n_ctx given. Without
        logits_all stock keeps n_batch rows of scores and never writes them; a single one serves the same callers (512
        rows are 512 MiB for Gemma 4, in every saved state).
        """
        self.input_ids = np.full(self._n_ctx, -1, dtype=np.intc)
        rows = self._n_ctx if self._logits_all else 1
        self.scores = np.zeros((rows, self._n_vocab), dtype=np.single)

    def check_open(self) -> None:
        """Raise RuntimeError if there is nothing to run: the model was freed, or loaded without weights."""
        if self._ctx.ctx is None:
            raise RuntimeError(CLOSED)
        if self._ctx.memory is None:
            raise RuntimeError("this Llama was loaded with vocab_only=True and has no weights; load it without.")

    __call__ = per_request(Stock.__call__)
    create_completion = per_request(Stock.create_completion)

    def _chat(
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
            mtp: False generates without drafting.
            draft_length: tokens to draft in a round.
            chat_template_kwargs: variables for the chat template, for instance {"enable_thinking": True}.
            kwargs: as there.
        """
        self.check_open()
        given = inspect.signature(Stock.create_chat_completion).bind(self, *args, **kwargs)
        given.apply_defaults()
        arguments = {name: value for name, value in given.arguments.items() if name != "self"}
        handler = (
            self.chat_handler
            or self._chat_handlers.get(self.chat_format)
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )
        variables = chat_template_kwargs or {}
        request = within(mtp, draft_length)
        return telling(request, ask(request, lambda: handler(llama=self, **arguments, **variables)))

    create_chat_completion = with_keywords(
        functools.update_wrapper(_chat, Stock.create_chat_completion, assigned=("__name__", "__qualname__")),
        **WISHES,
        chat_template_kwargs="dict[str, Any] | None",
    )

    def _create_completion(
        self,
        prompt: str | list[int],
        logprobs: int | None = None,
        logit_bias: dict[int, float] | None = None,
        logits_processor: Any = None,
        stream: bool = False,
        **arguments: Any,
    ) -> Generator[Any, Any, None]:
        """Stock's completion under the guard; what only the caller's context knows is read here, before it starts."""
        self.check_open()
        if logit_bias is not None and logits_processor is not None:
            # Stock loses both: it takes the None that list.extend returns for the new list.
            logits_processor, logit_bias = _with_bias(logits_processor, logit_bias), None
        arguments |= {"logit_bias": logit_bias, "logits_processor": logits_processor}
        arguments["stopping_criteria"] = reading(arguments.get("stopping_criteria"))
        source = self._complete(ASKED.get(), prompt, logprobs, stream, arguments)
        return self.guard.stream(source, STREAM if stream else CALL)

    def _complete(
        self, request: Request, prompt: str | list[int], top: int | None, stream: bool, arguments: dict[str, Any]
    ) -> Generator[Any, Any, None]:
        kept = None
        if top is not None:
            kept = Kept(top, bool(arguments.get("echo")), [] if prompt else [self.token_bos()])
        given = arguments.get("seed")
        seed = following_seed(self._seed) if given is None else chosen_seed(given)
        self.request, self.kept = request, kept
        request.told["seed"] = seed
        try:
            source = super()._create_completion(prompt, stream=stream, **arguments | {"seed": seed})
            if kept is not None and stream:
                source = logprobs.attach_chunks(self, kept, prompt, source)
            with self.counted(seed) as stats, closing(source):
                for item in source:
                    if kept is not None and not stream:
                        item = logprobs.attach(self, kept, prompt, item)
                    stats.lap()
                    yield tell(request, item)
        finally:
            self.request, self.kept = Request(), None

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

    @exclusive
    def eval(self, tokens: Any) -> None:
        """Decode tokens; when that fails, the state is as before.

        Raises:
            RuntimeError: they do not fit the context, or llama.cpp could not decode them.
        """
        before = self.n_tokens
        if before + len(tokens) > self._n_ctx:
            raise RuntimeError(
                f"the context of {self._n_ctx} tokens is full; pass a larger n_ctx, or a shorter prompt or max_tokens."
            )
        try:
            super().eval(tokens)
        except BaseException as problem:
            self.n_tokens = before
            self.roll_back()
            if isinstance(problem, RuntimeError):
                raise explain_decode(problem) from problem
            raise

    def reset(self) -> None:
        """Forget all tokens.

        An id that no token has, and no other prompt, marks the positions then: an image puts embeddings there, and what
        an earlier prompt left would make a later one believe that it shares them.
        """
        self.check_open()
        with self.guard.call():
            super().reset()
            self.input_ids[:] = -1 - secrets.randbelow(2**31 - 1)

    def _init_sampler(self, *args: Any, logits_processor: Any = None, grammar: Any = None, **kwargs: Any) -> Any:
        """Stock's sampler chain, with a grammar that llama.cpp can read and processors whose exceptions are kept.

        Within a request its seed is the one that is told, where llama.cpp would draw one and keep it to itself.
        """
        if grammar is not None:
            check_grammar(self._model.vocab, grammar)
        self.careful = Careful(logits_processor or ())
        careful = [self.careful] if logits_processor is not None else None
        kept = self._seed
        if self._counting:
            self._seed = self.stats.seed
        try:
            return super()._init_sampler(*args, logits_processor=careful, grammar=grammar, **kwargs)
        finally:
            self._seed = kept

    @exclusive
    @functools.wraps(Stock.sample)
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Raise here what a logits processor raised."""
        token: int = super().sample(*args, **kwargs)
        self.careful.check()
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

    save_state = exclusive(Stock.save_state)

    @exclusive
    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Go on from a saved state, of this class or of stock's.

        Raises:
            ValueError: it holds more tokens than this context.
            RuntimeError: llama.cpp refuses it; the object is empty then.
        """
        if state.n_tokens > self._n_ctx:
            raise ValueError(f"the state holds {state.n_tokens} tokens, the context {self._n_ctx}; raise n_ctx.")
        fitted = copy.copy(state)
        rows = min(state.n_tokens, len(self.scores))
        fits = len(state.scores) == rows
        fitted.scores = state.scores if fits else np.zeros((rows, self._n_vocab), dtype=np.single)
        fitted.input_ids = self.input_ids.copy()
        fitted.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        try:
            super().load_state(fitted)
        except RuntimeError as problem:
            self._ctx.kv_cache_clear()
            self.reset()
            raise RuntimeError(f"{problem}: it is of another model, or of other context settings.") from problem

    def close(self) -> None:
        """Free drafter and model; a stream still open ends.

        Raises:
            RuntimeError: another thread has been using the object for `guard.patience` seconds.
        """
        with self.guard.call():
            self._stack.close()
            self.drafter = None
            self._ctx = self._model = self.tokenizer_ = Closed()

    def __del__(self) -> None:
        if hasattr(self, "guard"):
            self.guard.serialized = True  # nobody has the object any more, nor its streams
            self.close()

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None, *args: Any, **kwargs: Any) -> Self:
        """As llama_cpp.Llama.from_pretrained; the drafter that the target names is fetched with it.

        Args:
            repo_id: a repository of the Hugging Face Hub.
            filename: name or pattern of the target's file in it.
            args: further arguments of llama_cpp.Llama.from_pretrained.
            kwargs: the same, and arguments of this class.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: no file of the repository, or more than one, matches.
        """
        given = inspect.signature(Stock.from_pretrained).bind(repo_id, filename, *args, **kwargs)
        given.apply_defaults()
        loading = given.arguments.pop("kwargs")
        # Stock's code downloads the files and then calls its class with model_path.
        path = Stock.from_pretrained.__func__(lambda model_path: model_path, **given.arguments)
        if loading.get("drafter", "auto") == "auto":
            fetch_drafter(Path(path), given.arguments)
        return cls(path, **loading)


def fetch_drafter(target: Path, given: dict[str, Any]) -> None:
    """Download the drafter that a target names, from the target's repository into the target's folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    header = link.read_header(target)
    peer = Path(str(header.metadata.get(link.KEY_PEER, ""))).name
    if not peer or header.arch != link.TARGET_ARCH or (target.parent / peer).exists():
        return
    # In the Hub's cache a file lies at snapshots/REVISION/its path in the repository.
    parts = target.parent.parts
    inside = parts[parts.index("snapshots") + 2 :] if given["local_dir"] is None and "snapshots" in parts else ()
    try:
        hf_hub_download(
            repo_id=given["repo_id"],
            filename=peer,
            subfolder="/".join(inside) or None,
            local_dir=given["local_dir"],
            cache_dir=given["cache_dir"],
        )
    except EntryNotFoundError:
        return  # a repository without it: the target runs alone


def _with_bias(processors: Any, bias: dict[int, float]) -> LogitsProcessorList:
    """Logits processors with a bias after them."""
    ids = np.array([int(token) for token in bias], dtype=np.intp)
    added = np.array([float(value) for value in bias.values()], dtype=np.single)

    def add_bias(input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        del input_ids
        scores[ids] += added
        return scores

    return LogitsProcessorList([*processors, add_bias])
