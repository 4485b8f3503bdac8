"""Small files that somebody or something has changed: converted into what loads, or refused in one line."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result
from faulty import Folders
from gemma_mtp.convert.integrity import verify_files
from gemma_mtp.runtime.cli.main import main

SEED, N_MUTATIONS = 16, 300
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "README.md")
CARD = {"license": "gemma", "language": ["en", "de"], "tags": ["a", "b"], "base_model": "google/gemma-4-E2B-it",
        "model_name": "Mine", "author": "me", "datasets": [{"name": "d", "organization": "o"}],
        "library_name": "transformers", "model-index": [{"name": "x", "results": []}]}  # fmt: skip
OTHERS: list[Any] = [None, [], [1], {}, {"a": 1}, "", "text", 0, -1, 7, 2.5, 1e30, True, False, ["x", None], "\ud800"]
GONE = object()
# Loads each file that stdin names, and says which, should llama.cpp end the process.
LOADS = """
import sys, llama_cpp
for path in sys.stdin.read().splitlines():
    print(path, flush=True)
    llm = llama_cpp.Llama(path, n_ctx=64, n_batch=32, n_threads=1, verbose=False)
    assert len(llm.tokenize(b"Hello, world")) > 1
    llm.eval(llm.tokenize(b"Hello"))
    llm.close()
"""


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Paths to the values within a value; of long lists and maps to the first few."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    listed = list(inner)
    for key, each in listed if len(listed) < 100 else listed[:3]:
        yield (key,)
        yield from ((key, *rest) for rest in places(each))


def changed(values: Any, path: tuple[Any, ...], to: Any) -> Any:
    """A copy with another value at one place, or without that place."""
    copy = dict(values) if isinstance(values, dict) else list(values)
    if len(path) > 1:
        copy[path[0]] = changed(copy[path[0]], path[1:], to)
    elif to is GONE:
        del copy[path[0]]
    else:
        copy[path[0]] = to
    return copy


def mutations(folder: Path) -> list[tuple[str, str, str]]:
    """File, what was changed, and its new text."""
    draw, found = random.Random(SEED), []
    whole = {name: CARD if name == "README.md" else json.loads((folder / name).read_text()) for name in FILES}
    spots = {name: list(places(values)) for name, values in whole.items()}
    for place in range(N_MUTATIONS):
        name = FILES[place % len(FILES)]
        path = draw.choice(spots[name])
        to = draw.choice([GONE, *OTHERS])
        values = changed(whole[name], path, to)
        text = f"---\n{yaml.safe_dump(values)}---\n\n# Mine\n" if name == "README.md" else json.dumps(values)
        found.append((name, f"{'.'.join(map(str, path))} -> {'gone' if to is GONE else json.dumps(to)}", text))
    return found


def agree(done: Result, pair: Folders, said: str) -> None:
    """A dry run, and `inspect` of either folder, end as the conversion did and say the same."""
    dry = CliRunner().invoke(main, ["convert", *map(str, pair), "-o", "x", "-q", "Q4_0", "--name", "x", "--dry-run"])
    assert (dry.exit_code, dry.stderr) == (done.exit_code, done.stderr), said
    shown = [CliRunner().invoke(main, ["inspect", str(folder)]) for folder in pair]
    lines = {line for each in shown for line in each.stderr.splitlines()}
    if done.exit_code == 0:
        assert [each.exit_code for each in shown] == [0, 0], said
        assert lines == set(done.stderr.splitlines()), said
    elif "drafter" not in done.stderr.splitlines()[-1]:  # which speaks of both
        assert 1 in [each.exit_code for each in shown], said
        assert done.stderr.splitlines()[-1] in lines, said


def test_300_mutations(pair: Folders, tmp_path: Path) -> None:
    kept: dict[str, Path] = {}
    ends: Counter[str] = Counter()
    for number, (name, what, text) in enumerate(mutations(pair[0])):
        was = (pair[0] / name).read_bytes() if (pair[0] / name).exists() else None
        (pair[0] / name).write_text(text, encoding="utf-8")
        out = tmp_path / f"out{number}"
        done = CliRunner().invoke(main, ["convert", *map(str, pair), "-o", str(out), "-q", "Q4_0", "--name", "x"])
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        said = f"{name}: {what}: {done.output}"
        assert "report it" not in done.stderr, said
        if done.exit_code == 0:
            assert not lines, said
            verify_files(out)
            digest = hashlib.sha256((out / "x-Q4_0.gguf").read_bytes()).hexdigest()
            if kept.setdefault(digest, out / "x-Q4_0.gguf").parent != out:
                shutil.rmtree(out)
        else:
            assert (done.exit_code, len(lines), lines[0][:7], out.exists()) == (1, 1, "error: ", False), said
            assert str(pair[0]) in lines[0] or name in lines[0] or "drafter" in lines[0], said
            assert ".gemma-mtp-" not in lines[0], said
        if number % 3 == 0:
            agree(done, pair, said)
        ends["converted" if done.exit_code == 0 else "refused"] += 1
        (pair[0] / name).unlink() if was is None else (pair[0] / name).write_bytes(was)
    assert min(ends.values()) > 20, ends
    command = [sys.executable, "-c", LOADS]
    loaded = subprocess.run(command, input="\n".join(map(str, kept.values())), capture_output=True, text=True)
    assert loaded.returncode == 0, (loaded.stdout.splitlines()[-1:], loaded.stderr[-2000:])
