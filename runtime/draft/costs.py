"""What a target pass and a draft step cost on this machine, learned from those made anyway, kept between runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import weakref
from ctypes import byref, c_double, c_int32
from pathlib import Path
from typing import Any

from gemma_mtp.patches import source
from gemma_mtp.runtime import native

FORMAT = 1
STEP = 0  # the place of a draft step in the table; places from 1 on are target passes over so many tokens


class Costs:
    """Seconds of a target pass over n tokens and of a draft step: `llama_mtp_costs` of include/llama-mtp.h.

    Without ours in libllama nothing is learned.

    Args:
        most: largest number of tokens in a pass.

    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lib, self._saved = native.choices(), 0
        self._held: list[int] = []
        if self._lib is not None:
            self._held.append(self._lib.llama_mtp_costs_init(most))
            weakref.finalize(self, _free, self._lib, self._held)

    @property
    def handle(self) -> int | None:
        """What the library knows it by; None where there is none, or none any more."""
        return self._held[0] if self._held else None

    def observe(self, place: int, seconds: float) -> None:
        """Note what a pass over `place` tokens took, or with STEP what a draft step took."""
        if self.handle is not None:
            self._lib.llama_mtp_costs_observe(self.handle, place, seconds)

    def seen(self, place: int) -> int:
        """How often a cost was observed."""
        return int(self._lib.llama_mtp_costs_seen(self.handle, place)) if self.handle is not None else 0

    def pass_seconds(self, n: int) -> float:
        """Seconds of a target pass over n tokens: measured, a little less while measured rarely, or else hoped for."""
        return float(self._lib.llama_mtp_costs_seconds(self.handle, n)) if self.handle is not None else 0.0

    def save(self, path: Path) -> None:
        """Write the table, if much was learned since; a folder that cannot be written to is left alone."""
        if self.handle is None:
            return
        factor, seen, speed = (c_double * (self.most + 1))(), (c_int32 * (self.most + 1))(), c_double()
        self._lib.llama_mtp_costs_get(self.handle, factor, seen, byref(speed))
        if sum(seen) < 2 * self._saved + 8:
            return
        self._saved = sum(seen)
        text = json.dumps({"format": FORMAT, "factor": [*factor], "seen": [*seen], "speed": speed.value})
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
                costs._know(factor, [min(count, 8) for count in seen], float(kept["speed"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return costs

    def _know(self, factor: list[float], seen: list[int], speed: float) -> None:
        """Go on from what an earlier run learned: today's measurements count more, as few of its are."""
        if self.handle is not None:
            width = self.most + 1
            self._lib.llama_mtp_costs_set(self.handle, (c_double * width)(*factor), (c_int32 * width)(*seen), speed)
            self._saved = sum(seen)


def _free(library: Any, held: list[int]) -> None:
    """Free a table. A stream that is collected along with it still asks it, in the end."""
    while held:
        library.llama_mtp_costs_free(held.pop())


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
