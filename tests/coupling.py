"""`make check-coupling`: how often the coupled draft is what the target draws, beside a greedy draft and the bound.

The bundled pair continues its held-out prompts at a temperature; the drafter is asked at every position what would
follow, its steps fed with the text itself. What counts is whether its token is the text's: the coupled one (the noise
of the target over the drafter's logits), the most likely one ("greedy": llama.cpp's rule), and the bound
sum_x min(p(x), q(x)), which no rule exceeds and rejection sampling (Leviathan et al., arXiv 2211.17192) attains. A
draft is accepted as far as all before it are. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
from demo import OUT, PAIR, QUANT, held_out
from gemma_mtp.convert import convert_pair
from gemma_mtp.runtime import Llama
from gemma_mtp.runtime.draft.drafter import DraftSettings
from rich.console import Console
from rich.progress import track
from rich.table import Table

LENGTH = 3
RULES = ("coupled", "greedy", "bound")
SETTINGS = {"top_k 64, top_p 0.95": {"top_k": 64, "top_p": 0.95}, "whole": {"top_k": 0, "top_p": 1.0}}
Floats = npt.NDArray[np.float64]


def probabilities(logits: Any, temp: float, top_k: int, top_p: float) -> Floats:
    """A distribution after top_k, top_p and temperature, in llama_cpp's order; shape [n_vocab]."""
    scores = logits.astype(np.float64)
    kept = np.argpartition(-scores, top_k)[:top_k] if top_k else np.arange(len(scores))
    if top_p < 1.0:
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        share = np.exp(scores[kept] - scores[kept[0]])
        kept = kept[: int(np.searchsorted(np.cumsum(share / share.sum()), top_p)) + 1]
    made = np.zeros(len(scores))
    made[kept] = np.exp((scores[kept] - scores.max()) / temp)
    made /= made.sum()
    return made


def rows(llm: Llama, prompt: str, tokens: int, temp: float, settings: dict[str, Any], seed: int) -> list[Any]:
    """For each position of a continuation, each of the three drafted places: coupled, greedy (0 or 1), bound."""
    ids = llm.tokenize(prompt.encode())
    llm.set_seed(seed)
    text: list[int] = list(ids)
    neutral = {"min_p": 0.0, "repeat_penalty": 1.0}
    for token in llm.generate(ids, temp=temp, mtp=False, **settings, **neutral):
        text.append(token)
        if token == llm.token_eos() or len(text) >= len(ids) + tokens:
            break
    llm.reset()
    llm.eval(ids)
    assert llm.drafter is not None
    coupled = DraftSettings(temp, seed=seed, **settings)
    target: dict[int, Floats] = {}
    drafted: list[list[tuple[int, int, Floats]]] = []
    row = (len(ids) - 1) % llm.n_batch
    for place in range(len(ids), len(text) - LENGTH):
        target[place] = probabilities(llm.logits(row), temp, **settings)
        found: list[tuple[int, int, Floats]] = []

        def choose(logits: Any, position: int, found: list[tuple[int, int, Floats]] = found) -> int:
            found.append((coupled(logits, position), int(logits.argmax()), probabilities(logits, temp, **settings)))
            return text[position]

        llm.drafter.draft(text[place], llm.hidden(row), place, LENGTH, choose)
        drafted.append(found)
        row = llm.decode([text[place]], [])
    made = []
    for start, found in enumerate(drafted, len(ids) + 1):
        places = [(text[at], target[at], *each) for at, each in enumerate(found, start) if at in target]
        if len(places) == len(found):
            made.append([[a == right, b == right, np.minimum(p, q).sum()] for right, p, a, b, q in places])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temp", type=float, default=1.0)
    chosen = parser.parse_args()
    pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", OUT, quant=QUANT, force=True)
    result: dict[str, Any] = {"temperature": chosen.temp, "draft_length": LENGTH}
    table = Table(title=f"bundled pair, held-out prompts, temperature {chosen.temp}, {LENGTH} drafted")
    for heading in ("", "rule", "accepted", "tokens per pass", "by place", "coupled / this"):
        table.add_column(heading, justify="left" if heading in ("", "rule") else "right", no_wrap=True)
    console = Console(stderr=True, highlight=False)
    with closing(Llama(pair.target, n_ctx=1024, n_threads=2, verbose=False)) as llm:
        for name, settings in SETTINGS.items():
            label = f"drafting, {name}"
            found = [
                each
                for seed, prompt in enumerate(track(held_out(), label, console=console, transient=True))
                for each in rows(llm, prompt, chosen.tokens, chosen.temp, settings, seed)
            ]
            hits = np.array(found)  # [positions, places, rules]
            # The bound is a probability: a product of the places before is what is accepted on average.
            accepted = np.cumprod(hits, axis=1).mean(axis=0)
            totals = accepted.mean(axis=0)
            result[name] = {"positions": len(hits)}
            for place, rule in enumerate(RULES):
                result[name][rule] = {
                    "accepted": round(float(totals[place]), 4),
                    "by_place": [round(float(each), 4) for each in hits[:, :, place].mean(axis=0)],
                }
                table.add_row(
                    name if place == 0 else "", rule, f"{totals[place]:.1%}", f"{1 + accepted[:, place].sum():.2f}",
                    " ".join(f"{each:.2f}" for each in hits[:, :, place].mean(axis=0)),
                    f"{totals[0] / totals[place]:.3f}",
                )  # fmt: skip
            result[name]["coupled_over_greedy"] = round(float(totals[0] / totals[1]), 4)
    console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
