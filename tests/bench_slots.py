"""Tokens per second in total of llama-server by its slots and drafts: fixed lengths, "auto", none; ours and stock's.

    python tests/bench_slots.py [TARGET DRAFTER | --shape E2B] [--slots 1,2,4] [--acceptance 0,0.35,0.8] [--repeat 3]

Every slot answers a request of its own, all at once, greedy; acceptance is llama-server's own simulation
(`--spec-synth-rates`): drafts are made and verified, and accepted at random. Stock's is measured where
`make check-stock` has built it. A server is asked once before it is measured, which teaches "auto" what passes cost;
the median of the visits counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from gemma_mtp.convert.random_pair import write_pair
from gemma_mtp.patches import source, stock
from gemma_mtp.runtime.bench.machine import physical_cores
from gemma_mtp.runtime.bench.server import Server
from gemma_mtp.runtime.programs import program
from rich.console import Console
from rich.table import Table

AUTO = 15  # as far as "auto" goes


class Asked(Server):
    """A llama-server, and the time it takes over a request in each of its slots."""

    def seconds(self, prompts: list[list[int]], tokens: int) -> tuple[float, int]:
        """Seconds from when the first answer begins until the last one ends, and tokens generated."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: self.run(prompt, 1, 0), prompts))  # the prompts are in the cache then
            clock = time.perf_counter()
            runs = list(pool.map(lambda prompt: self.run(prompt, tokens, 0), prompts))
        return time.perf_counter() - clock, sum(run.generated + 1 for run in runs)


def kinds(lengths: list[int], acceptance: list[float]) -> list[tuple[str, str, int, float | None]]:
    """What is measured: whose server, what it drafts, tokens at most, acceptance."""
    found: list[tuple[str, str, int, float | None]] = [("ours", "none", 0, None)]
    for chance in acceptance:
        found += [("ours", str(length), length, chance) for length in lengths]
        found.append(("ours", "auto", AUTO, chance))
    if stock.stock_dir().exists():
        found += [("stock", "none", 0, None), *(("stock", "3", 3, chance) for chance in acceptance)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="*", type=Path, metavar="TARGET DRAFTER")
    parser.add_argument("--shape", default="E2B")
    parser.add_argument("-q", "--quant", default="Q4_0")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores())
    parser.add_argument("--slots", default="1,2,4")
    parser.add_argument("--acceptance", default="0,0.35,0.8")
    parser.add_argument("--draft", default="1,3,6", help="fixed lengths")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()
    acceptance = [float(each) for each in chosen.acceptance.split(",")]
    target, drafter = chosen.pair or write_pair(
        chosen.shape, source.cache_dir() / "shapes", quant=chosen.quant, drafter_quant="Q4_0", drafter_head="Q4_0"
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(1000, 3000) for _ in range(64)] for _ in range(max(map(int, chosen.slots.split(","))))]
    binaries = {"ours": program("llama-server"), "stock": stock.stock_dir() / "llama-server"}
    options = {"n_ctx": 64 + chosen.tokens + 64, "threads": chosen.threads, "gpu_layers": 0, "flash_attn": True}
    rows: list[dict[str, Any]] = []
    for slots in map(int, chosen.slots.split(",")):
        plain: dict[str, float] = {}
        for whose, drafts, length, chance in kinds([int(each) for each in chosen.draft.split(",")], acceptance):
            drafting = drafter if length else None, length, chance
            with Asked(binaries[whose], target, *drafting, slots=slots, adaptive=drafts == "auto", **options) as server:
                server.seconds(prompts[:slots], chosen.tokens)
                visits = [server.seconds(prompts[:slots], chosen.tokens) for _ in range(chosen.repeat)]
            speed = median(tokens / seconds for seconds, tokens in visits)
            plain.setdefault(whose, speed)
            speeds = {"tokens_per_second": round(speed, 2), "over_plain": round(speed / plain[whose], 3)}
            row = {"slots": slots, "whose": whose, "drafts": drafts, "acceptance": chance, **speeds}
            rows.append(row)
            print(*row.values(), file=sys.stderr, flush=True)  # it takes minutes
    table = Table("slots", "server", "drafts", "acceptance", "tokens/s", "over its plain")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)
    print(json.dumps({"target": target.name, "threads": chosen.threads, "rows": rows}))


if __name__ == "__main__":
    main()
