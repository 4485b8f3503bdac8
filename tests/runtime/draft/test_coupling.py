"""What coupled drafts bring at a temperature; `make check-coupling` measures it on all held-out prompts."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
from coupling import LENGTH, SETTINGS, rows
from demo import held_out
from gemma_mtp.convert import Pair
from gemma_mtp.runtime import Llama


def test_coupled_drafts_are_accepted_more_often_than_greedy_ones(demo: Pair) -> None:
    """At least 1.1 times, as far as all before them are; and no rule exceeds sum min(p, q) but by chance."""
    settings = SETTINGS["top_k 64, top_p 0.95"]
    with closing(Llama(demo.target, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)) as llm:
        found = [each for seed, text in enumerate(held_out()[:6]) for each in rows(llm, text, 40, 1.0, settings, seed)]
    hits = np.array(found, float)
    assert hits.shape[1:] == (LENGTH, 3) and len(hits) > 150
    coupled, greedy, bound = np.cumprod(hits, axis=1).mean(axis=(0, 1))
    print(json.dumps({"coupled": round(coupled, 3), "greedy": round(greedy, 3), "bound": round(bound, 3)}))
    assert coupled > 1.1 * greedy
    # The noise is one draw of what the bound averages: four standard errors.
    spread = hits[:, 0, 0].std() / len(hits) ** 0.5
    assert hits[:, 0, 0].mean() < hits[:, 0, 2].mean() + 4 * spread
