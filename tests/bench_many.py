"""Tokens per second in total of many prompts at once, by how many sequences they go through, with MTP and without.

    python tests/bench_many.py [PAIR | --shape E2B] [-t THREADS] [--counts 1,2,4,8] [--acceptance 0.6] [--repeat 3]

PAIR is a target with its drafter beside it; without one, random weights of the shape are made and kept in the cache
folder. Prompts are random tokens, answers greedy. With --acceptance what is drafted is replaced by recorded answers
that are right with that chance, as in `gemma-mtp bench`; the drafter runs and is paid for. Everything is measured in
turn, and the median of the visits counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from gemma_mtp.convert.random_pair import write_pair
from gemma_mtp.patches import source
from gemma_mtp.runtime.bench.machine import physical_cores
from gemma_mtp.runtime.bench.replay import Fruitless, Replay
from gemma_mtp.runtime.bench.settings import Chance
from gemma_mtp.runtime.draft.drafter import FromDrafter
from gemma_mtp.runtime.draft.lookup import FromText
from gemma_mtp.runtime.draft.proposals import Proposals
from gemma_mtp.runtime.llama import Llama
from gemma_mtp.runtime.many.job import Job, Working
from gemma_mtp.runtime.many.rounds import Rounds
from gemma_mtp.runtime.many.slots import Slot
from gemma_mtp.runtime.sampling import Sampler


class Replaying(Rounds):
    """Records the answers of rounds without drafts, and replays them in those with."""

    chance: Chance | None = None
    records: ClassVar[dict[tuple[int, ...], list[int]]] = {}

    def _proposals(self, job: Job, sampler: Sampler, slot: Slot) -> Proposals:
        made = super()._proposals(job, sampler, slot)
        record = self.records.get(tuple(job.tokens))
        if self.chance is None or record is None:
            return made
        asked = list(made._sources)
        for place, each in enumerate(asked):
            if isinstance(each, FromDrafter):
                each.drafter = Replay(each.drafter, record, self.chance, sum(job.tokens), len(job.tokens))
            elif isinstance(each, FromText):
                asked[place] = Fruitless(each)
        made._sources = asked
        return made

    def _complete(self, working: Working) -> Any:
        if working.job.request.length == 0:
            self.records[tuple(working.job.tokens)] = [*working.job.tokens, *working.job.made.tokens]
        return super()._complete(working)


def visit(llm: Llama, prompts: list[list[int]], count: int, length: Any, tokens: int) -> dict[str, float]:
    """One run over all prompts."""
    answers = list(llm.create_completions(prompts, n_parallel=count, draft_length=length, max_tokens=tokens,
                                          temperature=0.0))  # fmt: skip
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    stats = llm.stats
    generating = stats.seconds - stats.prompt_seconds
    return {
        "tokens_per_second": (stats.tokens - len(prompts)) / generating,
        "with_prompts": stats.tokens / stats.seconds,
        "tokens_per_pass": (stats.tokens - len(prompts)) / stats.target_passes,
        "mean_drafted": stats.mean_drafted,
        "acceptance": stats.acceptance,
    }


def opened(chosen: argparse.Namespace) -> Llama:
    """The pair that is measured."""
    target, drafter = chosen.pair, "auto"
    if target is None:
        made = write_pair(chosen.shape, source.cache_dir() / "shapes", quant=chosen.quant, drafter_quant=chosen.quant,
                          drafter_head=chosen.drafter_head)  # fmt: skip
        target, drafter = made[0], str(made[1])
    threads = {"n_threads": chosen.threads, "n_threads_batch": chosen.threads}
    return Llama(target, drafter=drafter, n_ctx=chosen.prompt + chosen.tokens + 64, verbose=False, **threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="?", type=Path)
    parser.add_argument("--shape", default="E2B")
    parser.add_argument("-q", "--quant", default="Q4_0")
    parser.add_argument("--drafter-head", default="Q4_0")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores())
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--draft", default="auto", help="tokens to draft, or auto")
    parser.add_argument("--acceptance", type=Chance.parse, help="of replayed drafts; without, the drafter's own")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=8, help="how many")
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()
    counts = [int(count) for count in chosen.counts.split(",")]
    length = chosen.draft if chosen.draft == "auto" else int(chosen.draft)
    Replaying.chance = chosen.acceptance
    with closing(opened(chosen)) as llm:
        llm._rounds = Replaying
        rng = random.Random(0)
        prompts = [[rng.randrange(1000, llm.n_vocab()) for _ in range(chosen.prompt)] for _ in range(chosen.prompts)]
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        visit(llm, prompts, counts[-1], 0, chosen.tokens)  # the records
        visit(llm, prompts, counts[-1], length, chosen.tokens)  # what passes cost
        for _ in range(chosen.repeat):
            for count in counts:
                for name, wanted in (("plain", 0), ("mtp", length)):
                    found.setdefault((count, name), []).append(visit(llm, prompts, count, wanted, chosen.tokens))
        model = Path(llm.model_path).name
    rows: list[dict[str, Any]] = [
        {"sequences": count, "with": name} | {key: round(median(each[key] for each in visits), 3) for key in visits[0]}
        for (count, name), visits in found.items()
    ]
    base = next(row for row in rows if row["with"] == "plain")
    for row in rows:
        gain = row["tokens_per_second"] / base["tokens_per_second"]
        print(
            f"{row['sequences']:3} {row['with']:5} {row['tokens_per_second']:8.1f} tokens/s, {gain:.2f} times plain of "
            f"{base['sequences']}, {row['tokens_per_pass']:.2f} a pass, {row['mean_drafted']:.2f} drafted, "
            f"{row['acceptance']:.2f} accepted"
        )
    about = {name: getattr(chosen, name) for name in ("threads", "prompts", "prompt", "tokens", "draft")}
    acceptance = chosen.acceptance and chosen.acceptance.name
    print(json.dumps({"model": model, "acceptance": acceptance, **about, "rows": rows}))


if __name__ == "__main__":
    main()
