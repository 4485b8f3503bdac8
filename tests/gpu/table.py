"""The figures of results.json as lines for people; standard library only, for any Python 3."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lines(results: dict[str, Any]) -> Iterator[str]:
    yield "\n{}; kit of {made}, commit {commit}, {patches} patches".format(
        results["gpu"] or "no GPU", **{key: results["kit"][key] for key in ("made", "commit", "patches")}
    )
    for step in results["steps"]:
        figures = step["figures"]
        if figures and "target_pass_ms" in figures:
            yield from bench(step["step"], figures)
        elif figures and all(isinstance(found, dict) for found in figures.values()):
            for name, found in figures.items():
                yield f"{step['step']}, {name}: {json.dumps(found)}"
        elif figures and step["step"] != "llama-bench":  # its last line says enough
            yield f"{step['step']}: {json.dumps(figures)}"


def bench(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Milliseconds by tokens, then a row an acceptance: ours, and stock's llama-server if it was measured."""
    for key, title in (("target_pass_ms", "a target pass over n tokens, ms"), ("draft_round_ms", "K drafted, ms")):
        yield f"{name}: {title}: " + "  ".join(f"{n}: {value:.2f}" for n, value in found[key].items())
    server = found.get("against", {}).get("stock", {}).get("server")
    row = "{:>22} {:>10} {:>10} {:>8} {:>8} {:>10} {:>8} {:>14} {:>8} {:>10}"
    yield row.format(name, "plain", "MTP", "times", "drafted", "auto", "times", "stock's server", "times", "ours / it")
    plain = f"{found['tokens_per_s']['plain']:.1f}"
    for chance, rate in found["tokens_per_s"]["mtp"].items():
        other = [""] * 3
        if server:
            other = [f"{server['mtp'][chance]:.1f}", f"{server['speedup'][chance]:.2f}",
                     f"{server['ours_over_it'][chance]:.2f}"]  # fmt: skip
        auto = found["auto"][chance]
        mtp = [f"{rate:.1f}", f"{found['speedup'][chance]:.2f}", found["draft_length"][chance]]
        mtp += [f"{auto['tokens_per_s']:.1f}", f"{auto['speedup']:.2f}"]
        yield row.format(chance, plain, *mtp, *other)
    if server:
        over = f"{server['ours_over_it']['plain']:.2f}"
        yield row.format("plain", plain, *[""] * 5, f"{server['plain']:.1f}", "", over)


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
