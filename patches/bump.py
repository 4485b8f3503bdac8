"""The series tried on another llama.cpp: `build.py bump`. Nothing is changed but a temporary copy.

Standard library only, like all of patches/.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher, unified_diff
from itertools import groupby
from pathlib import Path

from .source import BuildError, series
from .trees import llama_tree

ABSENT = "0" * 40


@dataclass(frozen=True)
class Hunk:
    """A hunk of a patch: its place in the file's hunks (1 is the first), its first line, and the lines it replaces."""

    file: str
    number: int
    line: int
    before: list[str]


@dataclass(frozen=True)
class Offset:
    """A hunk that applies elsewhere than it says: `line` is where."""

    file: str
    hunk: int
    line: int
    offset: int


@dataclass(frozen=True)
class Failure:
    """A hunk, or where `hunk` is 0 a whole file, that does not apply.

    `line` is the first line of the file, earlier patches applied, that is not as wanted (0: nothing like the hunk is
    there), `difference` goes from what the hunk wants to what is there, as the lines of a unified diff without heading.
    """

    file: str
    hunk: int
    line: int
    reason: str
    difference: list[str]


@dataclass
class Result:
    """How one patch applies: `files` are those it changes that are not as they were at the pin."""

    patch: str
    offsets: list[Offset] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def try_series(tree: Path, patches: Sequence[Path]) -> list[Result]:
    """Apply patches one after the other to a tree, in it; of one that fails the hunks that do apply."""
    results, seen = [], set[str]()
    for patch in patches:
        text = patch.read_text()
        result = Result(patch.name)
        for file, blob in re.findall(r"^diff --git a/\S+ b/(\S+)\n(?:.*\n){0,2}?index ([0-9a-f]{40})\.\.", text, re.M):
            if file not in seen and blob not in (ABSENT, blob_id(tree / file)):
                result.changed.append(file)
            seen.add(file)
        wanted = list(hunks(text))
        before = {hunk.file: lines_of(tree / hunk.file) for hunk in wanted}
        said = _git_apply(tree, patch)
        result.offsets += _offsets(said)
        result.failures += _failures(said, wanted, before)
        if not result.failures and "error:" in said:
            raise BuildError(f"git apply could not read {patch.name}:\n{said[-500:]}")
        results.append(result)
    return results


def _git_apply(tree: Path, patch: Path) -> str:
    """What git says when it applies a patch, hunks that fail left out; in English."""
    command = ["git", "-c", "core.autocrlf=false", "apply", "--reject", "--verbose", str(patch)]
    env = {**os.environ, "LC_ALL": "C", "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout + done.stderr


def _offsets(said: str) -> Iterator[Offset]:
    file = ""
    for line in said.splitlines():
        if checking := re.fullmatch(r"Checking patch (.*)\.\.\.", line):
            file = checking[1]
        elif moved := re.fullmatch(r"Hunk #(\d+) succeeded at (\d+) \(offset (-?\d+) lines?\)\.", line):
            yield Offset(file, *map(int, moved.groups()))


def _failures(said: str, wanted: list[Hunk], before: dict[str, list[str]]) -> Iterator[Failure]:
    file = ""
    for line in said.splitlines():
        if whole := re.fullmatch(r"error: (.*): (No such file or directory|already exists in working directory)", line):
            yield Failure(whole[1], 0, 0, whole[2], [])
        elif applying := re.fullmatch(r"Applying patch (.*) with \d+ rejects?\.\.\.", line):
            file = applying[1]
        elif rejected := re.fullmatch(r"Rejected hunk #(\d+)\.", line):
            hunk = next(h for h in wanted if (h.file, h.number) == (file, int(rejected[1])))
            at, difference = compare(hunk, before[file])
            yield Failure(file, hunk.number, at, f"line {hunk.line} in the patch", difference)


def hunks(patch: str) -> Iterator[Hunk]:
    """The hunks of a patch, with the lines that each wants to find."""
    file, number, left, hunk = "", 0, 0, None
    for line in patch.split("\n"):
        if hunk and left > 0:
            if line[:1] in (" ", "-"):
                hunk.before.append(line[1:])
                left -= 1
        elif start := re.match(r"diff --git a/\S+ b/(\S+)$", line):
            file, number = start[1], 0
        elif start := re.match(r"@@ -(\d+)(?:,(\d+))? \+", line):
            number, left = number + 1, int(start[2] or 1)
            yield (hunk := Hunk(file, number, int(start[1]), []))


def compare(hunk: Hunk, lines: list[str]) -> tuple[int, list[str]]:
    """Where a file comes nearest to a hunk, and how they differ there: as `Failure` has them."""
    best, most = 0, 0.0
    telling = [(i, line) for i, line in enumerate(hunk.before) if re.search(r"\w{3}", line)]
    for at in range(-len(hunk.before), len(lines)):
        same = sum(0 <= at + i < len(lines) and lines[at + i] == line for i, line in telling)
        # of places as near as each other, the one nearest to where the hunk was
        score = same - abs(at + 1 - hunk.line) / (len(lines) + hunk.line + 1)
        if same and score > most:
            best, most = at, score
    if not most:
        return 0, []
    there = lines[max(0, best) : best + len(hunk.before)]
    opcodes = SequenceMatcher(None, hunk.before, there, autojunk=False).get_opcodes()
    first = next((begin for tag, _, _, begin, _ in opcodes if tag != "equal"), 0)
    difference = list(unified_diff(hunk.before, there, n=1, lineterm=""))[2:]
    return max(0, best) + first + 1, [line for line in difference if not line.startswith("@@")]


def lines_of(path: Path) -> list[str]:
    return path.read_text(errors="replace").split("\n") if path.exists() else []


def blob_id(path: Path) -> str:
    """The name that git gives to a file's contents."""
    if not path.exists():
        return ABSENT
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def bump(path: Path, as_json: bool = False) -> int:
    """Try the series on another tree or sdist and print how each patch applies; returns 1 if one does not, else 0.

    Raises:
        BuildError: there is no llama.cpp at the path, or no git.
    """
    if not shutil.which("git"):
        raise BuildError("missing: git. Install it with your system's package manager and run again.")
    touched = set(re.findall(r"^diff --git a/\S+ b/(\S+)$", "".join(p.read_text() for p in series()), re.M))
    with tempfile.TemporaryDirectory() as folder, llama_tree(path) as sources:
        tree = Path(folder) / "llama.cpp"
        for file in touched:
            if (sources / file).exists():
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sources / file, tree / file)
        results = try_series(tree, series())
    failed = sum(bool(result.failures) for result in results)
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        print(report(path.name, results))
    return 1 if failed else 0


def report(name: str, results: list[Result]) -> str:
    """The results as text, for a reader."""
    lines, broken = [f"{len(results)} patches on {name}", ""], dict[str, str]()
    for result in results:
        count = len(result.failures)
        verdict = f"FAILS in {count} place{'s' * (count > 1)}" if count else "applies"
        lines.append(f"{result.patch[:4]}  {verdict}{' with offsets' * bool(result.offsets)}")
        for file, moved in groupby(result.offsets, lambda o: o.file):
            by = (f"{o:+d} at {', '.join(str(m.line) for m in at)}" for o, at in groupby(moved, lambda o: o.offset))
            lines.append(f"        {file}: {'; '.join(by)}")
        for f in result.failures:
            where = f"{f.file}:{f.line}" if f.line else f.file
            what = f"hunk {f.hunk} ({f.reason})" if f.hunk else f.reason
            after = f"; a hunk of {broken[f.file]} is missing there" if f.file in broken else ""
            lines.append(f"      failed {where}: {what}{after}")
            lines += [f"          {line}" for line in f.difference if line.strip()]
            if f.hunk and not f.difference:
                lines.append("          nothing like it is in the file")
        broken |= {f.file: result.patch[:4] for f in result.failures}
    failed = [result.patch[:4] for result in results if result.failures]
    changed = sorted({file for result in results for file in result.changed})
    lines += ["", f"{', '.join(failed)} must be mended." if failed else "All apply."]
    if changed:
        lines += ["Changed since the pin, of the files that the series changes; read these changes too:"]
        lines += [f"  {file}" for file in changed]
    return "\n".join(lines)
