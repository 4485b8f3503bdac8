"""The drop-in for llama_cpp.Llama: loads a target with its drafter, generates, closes.

A `Llama` is an `Api` (stock's calls with our keywords), which is a `Context` (the target's KV cache), which is stock's.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike, fspath
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self

import llama_cpp
from gemma_mtp.convert import link
from gemma_mtp.runtime import chat_format, devices, loop, native, rpc, sampling
from gemma_mtp.runtime.arguments import GENERATE, OURS, check_tokens
from gemma_mtp.runtime.borrowed import bind, like, signature
from gemma_mtp.runtime.checks import checked, unknown
from gemma_mtp.runtime.context import Stock
from gemma_mtp.runtime.draft.costs import Costs, costs_path
from gemma_mtp.runtime.draft.drafter import Drafter, DraftSettings, attached
from gemma_mtp.runtime.draft.policy import policy_for
from gemma_mtp.runtime.draft.proposals import Proposals, sources
from gemma_mtp.runtime.draft.source import DraftSource
from gemma_mtp.runtime.faults import (
    Careful,
    Closed,
    check_options,
    explaining_decode,
    explaining_load,
    keep_for_good,
    naming_nan,
)
from gemma_mtp.runtime.grammar import Mask
from gemma_mtp.runtime.guard import Guard, exclusive, exclusive_stream
from gemma_mtp.runtime.interrupt import interruptible, while_loading
from gemma_mtp.runtime.many.calls import Many
from gemma_mtp.runtime.pair import Wanted, fetch_drafter, named, projector_of, searched
from gemma_mtp.runtime.processors import processors_of
from gemma_mtp.runtime.request import DRAFTING, MOST, DraftLength, Request, checked_length, checked_mtp, chosen_seed
from gemma_mtp.runtime.sampling import Sampler, reading
from gemma_mtp.runtime.stats import Stats
from gemma_mtp.runtime.text import Tokenizer
from llama_cpp import LlamaTokenizer
from llama_cpp._utils import suppress_stdout_stderr

# Arguments of llama_cpp.Llama under which no drafter can work.
WITHOUT_DRAFTER = {
    "draft_model": "draft_model was given: it drafts, and the MTP drafter is not loaded",
    "embedding": "embedding=True keeps embeddings instead of hidden rows: the MTP drafter is not loaded",
    "vocab_only": "vocab_only=True: there are no weights, and the MTP drafter is not loaded",
}
# Arguments of `generate` that its sampler chain is made without: `Sampler` asks processors and grammar itself.
NOT_OF_THE_CHAIN = ("tokens", "reset", "logits_processor", "stopping_criteria", "grammar")
MIROSTAT = "mirostat draws its own random numbers"


class Llama(Many):
    """Drop-in `llama_cpp.Llama` that generates with the drafter linked to its target.

    Tokens for a seed do not depend on whether, how far or with what was drafted (but for near-ties that floating point
    decides otherwise in batches of another size). They differ from stock llama_cpp.Llama's for the same seed at a
    temperature, as the random numbers are drawn otherwise; the distribution is the same.

    Args:
        model_path: GGUF file of the target, or the name of a model of Ollama's store.
        drafter: "auto" (the default) takes the linked drafter beside the target; if there is none, a line on stderr
            says so, and what to do. A path names it; None turns multi-token prediction off.
        draft_length: tokens to draft in a round, 15 at most, or "auto" (the default) to go by what passes cost on this
            machine and by what is accepted: then drafts also come from the text itself, and there are none where they
            do not pay. It may be set later on.
        mmproj: "auto" (the default) takes the projector beside the target when the first image or sound comes; a path
            names it; None or False turns it off.
        mtp: False generates without drafting unless a request says mtp=True; True insists on a drafter. It may be set
            later on.
        rpc_servers: HOST:PORT,... of machines where `gemma-mtp rpc-server` runs: the model's layers lie there, in this
            order, then on this machine's GPUs, the drafter beside the last ones. With n_gpu_layers=N (all by default
            then) the last N do, and the others on this machine's CPU. When one of them is lost, the process ends.
        options: everything llama_cpp.Llama takes. flash_attn is True by default where no layer is on a GPU. Without a
            seed every request draws one, which its answer tells under "seed", and `stats`.

    Attributes:
        drafter: the drafter beside the target, None without one.
        stats: counters of the latest request.
        total_stats: counters of all requests.

    Raises:
        gemma_mtp.convert.link.MtpError: a file is damaged, the drafter is not the target's, or mtp=True without one.
        RuntimeError: the library was built for another CPU, llama.cpp cannot load the model, or a machine does not
            answer.
        ValueError: as llama_cpp.Llama, for instance when model_path does not exist; or draft_length is neither a count
            nor "auto".
    """

    drafter: Drafter | None
    tokenizer_: Any

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        drafter: Wanted = "auto",
        draft_length: DraftLength = "auto",
        mmproj: Wanted | Literal[False] = "auto",
        mtp: bool | None = None,
        rpc_servers: str | None = None,
        **options: Any,
    ) -> None:
        # For close() and __del__, should what follows raise.
        self._stack, self.guard, self.drafter, self.pid = ExitStack(), Guard(), None, os.getpid()
        wishes = Request(mtp, checked_length(draft_length))
        mmproj = None if mmproj is False else mmproj
        checked(OURS, {"model_path": model_path, "drafter": drafter, "mmproj": mmproj, "rpc_servers": rpc_servers})
        options = check_options(options)
        native.check_cpu()
        self.rpc_servers, self._devices = rpc_servers, None
        if rpc_servers:
            self._devices = devices.of_machines(rpc.addresses(rpc_servers))
            options.setdefault("n_gpu_layers", -1)
        self._mmproj, self._projector = (model_path, mmproj), None
        model_path, drafter = named(model_path, drafter)
        path, missing = searched(model_path, drafter)
        if mmproj not in ("auto", None):
            projector_of(model_path, link.read_header(Path(model_path)), mmproj)
        reason = next((WITHOUT_DRAFTER[name] for name in WITHOUT_DRAFTER if options.get(name)), None)
        self._wanted, self._told = drafter, set[str]()
        self._undrafted = _undrafted(drafter, missing, reason)
        self._defaults = self._possible(wishes)
        self.stats, self.total_stats = Stats(), Stats()
        self._request = self._logprobs = None
        self._careful, self._counting = Careful(()), False
        self._named_format = options.get("chat_format")
        if (strange := unknown(options, signature(Stock.__init__).parameters)) is not None:
            self._tell(strange)
        with interruptible() as ended:
            self._progress = while_loading(ended)
            self._load(model_path, options)
            self.fit_arrays()
            if path is not None and reason is None:
                native.notice_unpatched()
                # Weakly, so that dropping the object frees it at once, as it does stock's.
                self.drafter = self._stack.enter_context(attached(weakref.proxy(self), path))
        if path is not None and reason is not None:
            self._tell(reason)
        elif missing is not None and reason is None and mtp is not False:
            self._tell(f"generating without MTP: {missing}")
        # What passes and draft steps take here; from the cache, if this model has run on this machine before.
        self._costs_path = self._costs_file()
        self._costs = Costs.load(self._costs_path, MOST + 1)
        self._policy = policy_for(self._costs, MOST)

    @property
    def model_params(self) -> Any:
        """llama_model_params of the target."""
        return self._model_params

    @model_params.setter
    def model_params(self, made: Any) -> None:
        """Stock makes them as it loads the model, and leaves the devices to llama.cpp."""
        made.progress_callback = self._progress
        if self._devices is not None:
            made.devices = ctypes.addressof(self._devices)
        self._model_params = made

    def _load(self, model_path: str | PathLike[str], options: dict[str, Any]) -> None:
        """Stock's __init__, with our defaults, and errors that name the next step."""
        if options.get("swa_full") is False:
            # A batch longer than n_ubatch may overwrite keys that its rollback needs.
            options["n_ubatch"] = max(options.get("n_ubatch", 512), MOST + 1)
        if native.patched() and not (options.get("n_gpu_layers") and native.has_gpu()):
            # On the CPU the series has attention of a few queries in this form only; stock's default is without.
            options.setdefault("flash_attn", True)
        # llama.cpp reports the sizes of its caches as warnings, which stock Llama shows even when told to be quiet.
        with suppress_stdout_stderr(disable=options.get("verbose", True)), explaining_load(model_path, options):
            super().__init__(fspath(model_path), **options)
            if self.lora_path and not self._lora_adapter:  # stock lets llama.cpp's null pointer pass
                raise RuntimeError(f"Failed to initialize LoRA adapter from lora path: {self.lora_path}")
        if options.get("seed") == 0:  # stock takes it for none
            self._seed = 0
        if isinstance(self.tokenizer_, LlamaTokenizer):
            self.tokenizer_ = Tokenizer(self)
        self._chat_handlers |= dict.fromkeys(chat_format.GEMMA_FORMATS, chat_format.gemma_handler(self))
        if options.get("chat_format") and self.chat_handler is None:
            chat_format.check(options["chat_format"], self._chat_handlers)
        if self.chat_format == chat_format.FALLBACK and not options.get("chat_format"):
            self.chat_format = chat_format.UNSAID

    @like(Stock.generate, **DRAFTING)
    @exclusive_stream
    def generate(
        self, *args: Any, mtp: bool | None = None, draft_length: DraftLength | None = None, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens from a prompt; arguments and behaviour are llama_cpp.Llama.generate's, with two more.

        Args:
            args: as there, the prompt's tokens first.
            mtp: False generates without drafting; True insists on it.
            draft_length: tokens to draft in a round, or "auto".
            kwargs: as there.
        """
        given = checked(GENERATE, bind(Stock.generate, *args, **kwargs))
        check_tokens(given["tokens"], self._n_vocab)
        given["stopping_criteria"] = reading(given["stopping_criteria"])
        own = mtp is not None or draft_length is not None
        request = self.asked(mtp, draft_length) if own or self._request is None else self._request
        given["logits_processor"] = processors_of(
            given["logits_processor"], request.min_tokens or 0, lambda: self._ends
        )
        mirostat = given["mirostat_mode"] != 0 and given["temp"] > 0
        if mirostat and request.mtp:
            raise ValueError(f"MTP was asked for, but {MIROSTAT}; leave mirostat_mode at 0.")
        seed = self._seed_now()
        with self.counted(seed, request) as stats, explaining_decode():
            self._begin(given["tokens"], stats)
            if self.draft_model is None and not mirostat:
                yield from self._drafting(given, seed, request, stats)
            else:
                held = self._shared_with(given["tokens"]) if given["reset"] else 0
                stats.cached_tokens = min(held, len(given["tokens"]) - 1) - stats.prompt_tokens
                stats.prompt_tokens = len(given["tokens"]) - stats.cached_tokens
                yield from stats.counting(self._as_stock(given))

    def _seed_now(self) -> int:
        """The seed of the completion that runs, or of tokens that are generated without one."""
        return chosen_seed(self.stats.seed if self._counting else self._seed)

    def _begin(self, tokens: list[int], stats: Stats) -> None:
        """Keep the log-probabilities of a prompt's tokens, if they are wanted."""
        if self._logprobs is not None:
            clock = perf_counter()
            stats.prompt_tokens = self._logprobs.begin(self, tokens)
            stats.prompt_seconds = perf_counter() - clock

    def _reuse(self, tokens: list[int], stats: Stats) -> list[int]:
        """As `reuse_prefix`, counted."""
        left = self.reuse_prefix(tokens)
        stats.cached_tokens = self.n_tokens - stats.prompt_tokens
        return left

    @exclusive
    def read(self, tokens: list[int]) -> None:
        """As `Context.read`, as a part of a request."""
        with self.counted(self._seed_now(), self.asked()) as stats, explaining_decode():
            self._begin(tokens, stats)
            left, clock = self._reuse(tokens, stats), perf_counter()
            self.eval(left)
            stats.prompt_tokens += len(left)
            stats.prompt_seconds += perf_counter() - clock
            stats.lap()
            stats.time_to_first_token = stats.seconds

    def _as_stock(self, given: dict[str, Any]) -> Generator[int, Sequence[int] | None, None]:
        """Stock's own loop, for what only it can do."""
        if given["mirostat_mode"] != 0 and self.drafter is not None:
            self._tell(f"{MIROSTAT}: this request runs without MTP")
        if given["reset"] and not self.can_reuse(given["tokens"]):
            self.reset()
        source = super().generate(**given)
        return source if self._logprobs is None else self._logprobs.watching(source, self.chosen_from)

    def _drafting(
        self, given: dict[str, Any], seed: int, request: Request, stats: Stats
    ) -> Generator[int, Sequence[int] | None, None]:
        """Our loop, with drafts or without."""
        tokens, criteria = given["tokens"], given["stopping_criteria"]

        def stop(row: int) -> bool:
            return criteria is not None and bool(criteria(self._input_ids, self.logits(row)))

        sampler = self._choice(given, seed)
        try:
            left = self._reuse(tokens if given["reset"] else [*self._input_ids.tolist(), *tokens], stats)
            asked = self.sources(sampler, request.length, DraftSettings.of(given, seed))
            proposals = Proposals(self, sampler, asked, request.length, self._policy, self._costs)
            choose = naming_nan(sampler)
            if self._logprobs is not None:
                choose = self._logprobs.recording(choose)
            yield from loop.generate(self, left, choose, proposals, stop, stats)
        finally:
            if self._costs.seen(1):
                stats.plain_pass_seconds = max(stats.tokens - 1, 0) * self._costs.pass_seconds(1)
            self._costs.save(self._costs_path)

    def sources(self, sampler: Sampler, length: DraftLength, settings: DraftSettings | None) -> list[DraftSource]:
        """What is asked for drafts, in this order; for a request.

        Args:
            sampler: chooses the target's tokens.
            length: tokens per draft, or "auto".
            settings: how `sampler` chooses, if arguments say it all; without processors and grammar a round of the
                drafter is then one native call.
        """
        if self.drafter is None or length == 0:
            return []
        native_round = settings if sampler.plain and native.drafts_rounds() else None
        return sources(self, self.drafter, self._costs, native_round, length)

    def _choice(self, given: Mapping[str, Any], seed: int, ids: Callable[[], Any] | None = None) -> Sampler:
        """What chooses tokens under these arguments: llama.cpp's sampler chain, with our noise for its draw.

        Args:
            given: arguments of `generate`.
            seed: of the noise.
            ids: gives the tokens so far; None for the object's own.
        """
        temp, top_k = given["temp"], given["top_k"]
        penalties = (given["repeat_penalty"], given["frequency_penalty"], given["presence_penalty"])
        chain = self._init_sampler(**{name: value for name, value in given.items() if name not in NOT_OF_THE_CHAIN})
        noise = None if temp == 0.0 else seed
        return Sampler(
            sampling.with_noise(sampling.without_draw(chain), noise),
            self._n_vocab,
            seed=noise,
            keep=1 if temp == 0.0 else top_k if temp > 0.0 and 0 < top_k < self._n_vocab else None,
            penalized=0 if penalties == (1.0, 0.0, 0.0) else max(self.last_n_tokens_size, 0),
            mask=None if (rules := given["grammar"]) is None else Mask.of(rules, self._model.model, self._n_vocab),
            processors=given["logits_processor"] or (),
            input_ids=ids or (lambda: self._input_ids),
        )

    def tokenizer(self) -> Tokenizer:
        """As llama_cpp.Llama.tokenizer, with pieces of any length."""
        return Tokenizer(self)

    def _costs_file(self) -> Path:
        settings = ("n_threads", "n_ubatch", "flash_attn_type", "type_k", "type_v", "offload_kqv")
        return costs_path(
            model=Path(self.model_path).name,
            size=self._model.size(),
            drafter=self.drafter is not None,
            layers=self.model_params.n_gpu_layers,
            libllama=(llama_cpp.__version__, native.patched()),
            **({"machines": self.rpc_servers} if self.rpc_servers else {}),
            **{name: str(getattr(self.context_params, name, None)) for name in settings},
        )

    def close(self) -> None:
        """Free drafter and model; a stream still open ends, and so does a call of another thread at its next step."""
        if os.getpid() == self.pid:
            self.guard.finish(self._free)
        else:  # after a fork: it is the other process's, and so are the threads that would have to end
            keep_for_good(self._stack.pop_all())
            self._free()

    def _free(self) -> None:
        self._stack.close()
        self.drafter = self._projector = None
        self._ctx = self._model = self.tokenizer_ = Closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "guard"):
            self.guard.dropped = True
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        ours = {"drafter": self._wanted, "draft_length": self.draft_length, "mtp": self.mtp, "mmproj": self._mmproj[1]}
        return state | ours | {"rpc_servers": self.rpc_servers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

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
            ValueError: no file of the repository, or more than one, matches; or a wish is not what it may be.
        """
        function = Stock.from_pretrained.__func__
        given = bind(function, repo_id, filename, *args, **kwargs)
        loading = given.pop("kwargs")
        # Before anything is downloaded.
        checked_length(loading.get("draft_length", "auto"))
        checked_mtp(loading.get("mtp"))
        # Stock's code downloads the files and then calls its class with model_path.
        path = function(lambda model_path: model_path, **given)
        if loading.get("drafter", "auto") == "auto":
            fetch_drafter(Path(path), given)
        return cls(path, **loading)


def _undrafted(wanted: Wanted, missing: str | None, reason: str | None) -> str | None:
    """Why a target has no drafter that could draft, with what to do about it; None if it has, or is not there."""
    if reason is not None:
        return f"{reason}; leave that argument out"
    if wanted is None:
        return "drafter=None was given when it was loaded; load it with its drafter"
    return missing


@contextmanager
def open_pair(target: str | PathLike[str], drafter: Wanted = "auto", **options: Any) -> Iterator[Llama]:
    """Open a target with its drafter, and close both at the end; a missing drafter is an error here.

    Args:
        target: as for `Llama`.
        drafter: as for `Llama`.
        options: further arguments of `Llama`.

    Raises:
        gemma_mtp.convert.link.MtpError: there is no drafter, or not of this target.
    """
    target, drafter = named(target, drafter)
    path, missing = searched(target, drafter)
    if missing is not None:
        raise link.PairError(f"{missing}.")
    with closing(Llama(target, drafter=path, **options)) as llm:
        yield llm
