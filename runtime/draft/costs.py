"""What a target pass and a draft step cost on this machine, learned from the passes that are made anyway."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from gemma_mtp.patches import source

FORMAT = 1
STEP = 0  # the place of a draft step in the table; places from 1 on are target passes over so many tokens
GROWTH = 0.05  # how much a pass is hoped to grow with each further token, before it has been measured


class Costs:
    """Seconds of a target pass over n tokens and of a draft step.

    A cost is a factor of its own times the speed of the machine at the moment, both followed in logarithms, so that a
    slow phase does not look like a dear batch size.

    Args:
        most: largest number of tokens in a pass.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._factor = [0.0] * (most + 1)
        self._seen = [0] * (most + 1)
        self._speed = 0.0
        self._saved = 0

    def observe(self, place: int, seconds: float) -> None:
        """Note what a pass over `place` tokens took, or with STEP what a draft step took."""
        if place > self.most or seconds <= 0:
            return
        value = math.log(seconds)
        wrong = value - self._factor[place] - self._speed
        if self._seen[place] < 2:
            # The first two: the smaller, as a hiccup must not make a batch size look dear for good.
            self._factor[place] += min(wrong, 0.0) if self._seen[place] else wrong
        else:
            wrong = min(max(wrong, -0.5), 0.3)
            self._factor[place] += wrong / min(self._seen[place] + 1, 20)
            if place != STEP and self._seen[place] >= 3:
                self._speed += 0.1 * wrong
        self._seen[place] += 1

    def seen(self, place: int) -> int:
        """How often a cost was observed."""
        return self._seen[place] if place <= self.most else 0

    def step_seconds(self) -> float:
        """Seconds of one draft step; 0.0 before the first."""
        return math.exp(self._factor[STEP] + self._speed) if self._seen[STEP] else 0.0

    def pass_seconds(self, n: int) -> float:
        """Seconds of a target pass over n tokens: measured, a little less while measured rarely, or else hoped for."""
        if self._seen[n]:
            return math.exp(self._factor[n] + self._speed) * (1 - 0.15 / self._seen[n] ** 2)
        known = [place for place in range(1, self.most + 1) if self._seen[place]]
        if not known:
            return 1.0 + GROWTH * (n - 1)
        nearest = min(known, key=lambda place: (abs(place - n), place))
        # Beyond what is measured a pass costs at least its share of the largest one measured.
        grown = (1 + GROWTH * (n - 1)) / (1 + GROWTH * (nearest - 1))
        return math.exp(self._factor[nearest] + self._speed) * (grown if n > nearest else min(grown, 1.0))

    def save(self, path: Path) -> None:
        """Write the table, if much was learned since; a folder that cannot be written to is left alone."""
        if sum(self._seen) < 2 * self._saved + 8:
            return
        self._saved = sum(self._seen)
        text = json.dumps({"format": FORMAT, "factor": self._factor, "seen": self._seen, "speed": self._speed})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
            with os.fdopen(handle, "w") as file:
                file.write(text)
            Path(name).replace(path)
        except OSError:
            return  # measuring again next time is all that is lost

    @classmethod
    def load(cls, path: Path, most: int) -> Costs:
        """The table kept at a path; an empty one if there is none, or not a sound one."""
        costs = cls(most)
        try:
            kept = json.loads(path.read_text())
            factor, seen = [float(x) for x in kept["factor"]], [int(x) for x in kept["seen"]]
            sound = kept["format"] == FORMAT and len(factor) == len(seen) == most + 1
            if sound and all(map(math.isfinite, [*factor, kept["speed"]])) and min(seen) >= 0:
                costs._factor, costs._speed = factor, float(kept["speed"])
                costs._seen = [min(count, 8) for count in seen]  # today's measurements count more than kept ones
                costs._saved = sum(costs._seen)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return costs


def costs_path(**what: Any) -> Path:
    """Where the table of a model under certain settings on this machine is kept.

    Args:
        what: everything that the costs depend on.
    """
    machine = {"node": platform.node(), "machine": platform.machine(), "cores": os.cpu_count()}
    key = hashlib.sha256(json.dumps(what | machine, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return costs_dir() / f"{key}.json"


def costs_dir() -> Path:
    """The folder of all tables."""
    return source.cache_dir() / "costs"
