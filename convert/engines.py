"""vLLM and SGLang, as far as a launcher has to know them: first versions, flags, addresses, counters.

All of it was read in the engines' sources, of the versions named here; tests/convert/test_launch.py reads it again.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from gemma_mtp.convert.sizes import SIZES

# Whether an engine is ready, and what it serves. Both answer alike (vllm/entrypoints, sglang/srt/entrypoints).
HEALTH, MODELS = "/health", "/v1/models"
# Tokens to draft in a round, by the hidden size of the target: those of vLLM's recipe for Gemma 4, tried on A100 and
# H100 (vllm-project/recipes, Google/Gemma4.md, 2026-05).
LENGTHS, LENGTH = {SIZES["E2B"].n_embd: 2}, 4


@dataclass(frozen=True)
class Model:
    """A checkpoint as an engine is told of it: folder or org/name, and the revision of the latter."""

    source: str
    revision: str | None = None


@dataclass(frozen=True)
class Job:
    """What an engine shall serve: the pair, the address, how many tokens to draft in a round."""

    target: Model
    drafter: Model
    host: str
    port: int
    length: int


@dataclass(frozen=True)
class Reported:
    """What an engine says of its drafts so far.

    `per_pass` is how many tokens a pass of the target brings on average, its own included; `rate` the share of drafted
    tokens that were accepted; `positions` the share of rounds in which the token at a place was accepted, if reported.
    """

    per_pass: float
    rate: float
    positions: tuple[float, ...] = ()

    def __str__(self) -> str:
        places = ", ".join(f"{share:.2f}" for share in self.positions)
        return f"{self.per_pass:.2f} tokens per pass, {self.rate:.0%} of drafted tokens accepted" + (
            f" (by position {places})" if places else ""
        )


class Engine(ABC):
    """One engine. `name` is that of its program and of its package.

    `since` is the first release that runs the drafters of E2B, E4B, 26B-A4B and 31B, `since_unified` that of 12B.
    `ours` are the flags that the launcher sets or stands upon; the user's may not be among them.
    `key` is the environment variable, if there is one, that holds the key which clients must send.
    """

    name: str
    since: str
    since_unified: str
    ours: tuple[str, ...]
    key: str | None

    @abstractmethod
    def command(self, job: Job) -> list[str]:
        """Program and arguments that serve a pair."""

    @abstractmethod
    def acceptance(self, get: Callable[[str], str | None], length: int) -> Reported | None:
        """What the engine reports, None before it has drafted.

        Args:
            get: the text at a path of the server, None if it does not answer.
            length: tokens drafted in a round.
        """


class VLLM(Engine):
    """vLLM.

    0.21.0 is the first release with `gemma4_assistant` in vllm/config/speculative.py (line 491; 0.20.2 takes such a
    drafter for a model of its own and fails), 0.23.0 the first with `gemma4_unified_assistant` (line 512). There, too,
    are the keys of --speculative-config; the flag itself is in vllm/engine/arg_utils.py (0.33.0: line 1866), beside
    --spec-method, --spec-model and --spec-tokens, which fill the same keys. The counters are in
    vllm/v1/spec_decode/metrics.py; Prometheus' client puts "_total" behind their names.
    """

    name = "vllm"
    since, since_unified = "0.21.0", "0.23.0"
    ours = (
        "--model", "--revision", "--host", "--port", "--uds", "--ssl-keyfile", "--ssl-certfile",
        "--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens",
    )  # fmt: skip
    key = "VLLM_API_KEY"
    metrics = "/metrics"
    drafts, drafted, accepted, at_position = (
        "vllm:spec_decode_num_drafts",
        "vllm:spec_decode_num_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens",
        "vllm:spec_decode_num_accepted_tokens_per_pos",
    )

    def command(self, job: Job) -> list[str]:
        drafting = {"method": "mtp", "model": job.drafter.source, "num_speculative_tokens": job.length}
        if job.drafter.revision:
            drafting["revision"] = job.drafter.revision
        revision = ["--revision", job.target.revision] if job.target.revision else []
        return [self.name, "serve", job.target.source, *revision, "--host", job.host, "--port", str(job.port),
                "--speculative-config", json.dumps(drafting)]  # fmt: skip

    def acceptance(self, get: Callable[[str], str | None], length: int) -> Reported | None:
        text = get(self.metrics) or ""
        rounds, drafted, accepted = (
            sum(_counters(text, name).values()) for name in (self.drafts, self.drafted, self.accepted)
        )
        if not rounds or not drafted:
            return None
        places = [0.0] * length
        for labels, value in _counters(text, self.at_position).items():
            found = re.search(r'position="(\d+)"', labels)
            if found and int(found[1]) < length:
                places[int(found[1])] += value / rounds
        return Reported(1 + accepted / rounds, accepted / drafted, tuple(places) if any(places) else ())


class SGLang(Engine):
    """SGLang.

    Its name for MTP with a drafter is NEXTN, which becomes FROZEN_KV_MTP when the drafter is a
    Gemma4AssistantForCausalLM or a Gemma4UnifiedAssistantForCausalLM (srt/arg_groups/speculative_hook.py). 0.5.12 has
    the first but is pinned to transformers 5.6.0, which does not know such a configuration; 0.5.13 (5.8.1) does. The
    second is in 0.5.13, and in transformers from 5.10, so that 0.5.15 (5.12.1) is the first release that runs it. The
    flags are fields of srt/arg_groups/fields/spec.py (0.5.23), before that arguments in srt/server_args.py. One branch
    of n steps makes n + 1 tokens to verify. /server_info has one state for each data-parallel rank.
    """

    name = "sglang"
    since, since_unified = "0.5.13", "0.5.15"
    ours = (
        "--model-path", "--model", "--revision", "--host", "--port", "--ssl-keyfile", "--ssl-certfile",
        "--speculative-algorithm", "--speculative-draft-model-path", "--speculative-draft-model",
        "--speculative-draft-model-revision", "--speculative-num-steps", "--speculative-eagle-topk",
        "--speculative-num-draft-tokens",
    )  # fmt: skip
    key = None
    info = "/server_info"
    states, per_pass = "internal_states", "avg_spec_accept_length"

    def command(self, job: Job) -> list[str]:
        command = [self.name, "serve", "--model-path", job.target.source]
        command += ["--revision", job.target.revision] if job.target.revision else []
        command += ["--host", job.host, "--port", str(job.port), "--speculative-algorithm", "NEXTN"]
        command += ["--speculative-draft-model-path", job.drafter.source]
        command += ["--speculative-draft-model-revision", job.drafter.revision] if job.drafter.revision else []
        return [*command, "--speculative-num-steps", str(job.length), "--speculative-eagle-topk", "1",
                "--speculative-num-draft-tokens", str(job.length + 1)]  # fmt: skip

    def acceptance(self, get: Callable[[str], str | None], length: int) -> Reported | None:
        text = get(self.info)
        states = json.loads(text).get(self.states, []) if text else []
        found = [float(state[self.per_pass]) for state in states if state.get(self.per_pass) is not None]
        if not found:
            return None
        mean = sum(found) / len(found)
        return Reported(mean, (mean - 1) / length)


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (VLLM(), SGLang())}


def _counters(text: str, name: str) -> dict[str, float]:
    """Labels to value of a counter in Prometheus' text format."""
    found = re.finditer(rf"^{re.escape(name)}_total(?:\{{(.*)\}})? (\S+)", text, re.MULTILINE)
    return {match[1] or "": float(match[2]) for match in found}
