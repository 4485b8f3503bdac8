"""Tokens per second in total of llama-server by its slots and drafts: fixed lengths, "auto", none; ours and stock's.

    python tests/bench_slots.py [TARGET DRAFTER | --shape E2B] [--slots 1,2,4] [--acceptance 0,0.35,0.8] [--repeat 3]

Every slot answers a request of its own, all at once, greedy; acceptance is llama-server's own simulation
(`--spec-synth-rates`): drafts are made and verified, and accepted at random. Stock's is measured where
`make check-stock` has built it. A server is asked once before it is measured, which teaches "auto" what passes cost.
Each is visited in turn with a server of the same build without drafts, as the speed of a machine drifts: medians of the
visits count, and of their ratios. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from gemma_mtp.convert.random_pair import write_pair
from gemma_mtp.patches import source, stock
from gemma_mtp.runtime.bench.machine import physical_cores
from gemma_mtp.runtime.bench.server import Server
from gemma_mtp.runtime.programs import program
from gemma_mtp.runtime.request import MOST
from rich.console import Console
from rich.table import Table

COLUMNS = "slots", "server", "drafts", "acceptance", "plain tokens/s", "tokens/s", "over plain"


class Asked(Server):
    """A llama-server, and the time it takes over a request in each of its slots."""

    def speed(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens per second of all answers, from when they are asked for until the last one ends."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: self.run(prompt, 1, 0), prompts))  # the prompts are in the cache then
            clock = time.perf_counter()
            runs = list(pool.map(lambda prompt: self.run(prompt, tokens, 0), prompts))
        return sum(run.generated + 1 for run in runs) / (time.perf_counter() - clock)


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
    options = {"n_ctx": 64 + chosen.tokens + 64, "threads": chosen.threads, "gpu_layers": 0, "flash_attn": True}
    builds = {"ours": (program("llama-server"), [*chosen.draft.split(","), "auto"])}
    if stock.stock_dir().exists():
        builds["stock"] = stock.stock_dir() / "llama-server", ["3"]
    rows: list[dict[str, Any]] = []
    for slots, (whose, (binary, lengths)) in product(map(int, chosen.slots.split(",")), builds.items()):
        asked = prompts[:slots], chosen.tokens
        with Asked(binary, target, None, 0, None, slots=slots, **options) as plain:
            plain.speed(*asked)
            for chance, drafts in product(acceptance, lengths):
                auto = drafts == "auto"
                drafting = drafter, MOST if auto else int(drafts), chance
                with Asked(binary, target, *drafting, slots=slots, adaptive=auto, **options) as server:
                    server.speed(*asked)
                    visits = [(plain.speed(*asked), server.speed(*asked)) for _ in range(chosen.repeat)]
                speeds = (round(median(each), 2) for each in zip(*visits, strict=True))
                over = round(median(with_drafts / without for without, with_drafts in visits), 3)
                values = (slots, whose, drafts, chance, *speeds, over)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print(*values, file=sys.stderr, flush=True)  # it takes minutes
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    print(json.dumps({"target": target.name, "threads": chosen.threads, "rows": rows}))


if __name__ == "__main__":
    main()
