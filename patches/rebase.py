"""The series as commits to work on, and back: `build.py edit` and `build.py export`.

Standard library only, like all of patches/.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from .source import HERE, IDENTITY, VENDORED, BuildError, commit_series, git, say, series, unpack, upstream
from .trees import llama_tree

FORM = ("--zero-commit", "--no-signature", "--no-numbered", "--full-index", f"--relative={VENDORED}")
MARK = "gemma-mtp.edit"


def edit(into: Path, onto: Path | None = None) -> None:
    """Make a work tree with the series as commits over the tag `base`: the pin, or another tree of llama.cpp.

    Args:
        into: the folder to make; it must not exist, or be empty.
        onto: a tree or sdist that the commits are rebased onto; the pin is the tag `pin` then.

    Raises:
        BuildError: the folder holds something, or a commit does not apply and the rebase waits there to be mended.
    """
    if not shutil.which("git"):
        raise BuildError("missing: git. Install it with your system's package manager and run again.")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise BuildError(f"{into} holds something already; name a folder that does not exist.")
    into = into.absolute()
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}-") as folder:
        tree = unpack(Path(folder))
        commit_series(tree)
        for name, value in (*(pair.split("=", 1) for pair in IDENTITY[1::2]), ("merge.conflictStyle", "diff3")):
            git(tree, "config", name, value)
        git(tree, "config", MARK, upstream().llama_cpp)
        if onto:
            _commit_tree(tree, onto)
        if into.exists():
            into.rmdir()
        tree.rename(into)
    if onto:
        _rebase(into, onto)
    say(
        f"{into / VENDORED} has {len(series())} patches as commits over the tag `base`. Change, amend or reorder them, "
        f"then:\n    python patches/build.py export {into}"
    )


def _commit_tree(tree: Path, onto: Path) -> None:
    """Commit another llama.cpp over the pin, off the branch of the series, and move the tag `base` there."""
    branch = git(tree, "branch", "--show-current").strip()
    git(tree, "tag", "pin", "base")
    git(tree, "checkout", "--quiet", "--detach", "pin")
    with llama_tree(onto) as sources:
        shutil.rmtree(tree / VENDORED)
        shutil.copytree(sources, tree / VENDORED, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    git(tree, "add", "--force", "--all", VENDORED)
    git(tree, "commit", "--quiet", "--no-verify", "--allow-empty", "-m", f"llama.cpp of {onto.name}")
    git(tree, "tag", "--force", "base")
    git(tree, "checkout", "--quiet", branch)


def _rebase(tree: Path, onto: Path) -> None:
    try:
        git(tree, "rebase", "--quiet", "--committer-date-is-author-date", "--onto", "base", "pin")
    except BuildError:
        if not _rebasing(tree):
            raise
        files = git(tree, "diff", "--name-only", "--diff-filter=U").split()
        subject = git(tree, "log", "-1", "--format=%s", "REBASE_HEAD").strip()
        raise BuildError(
            f'"{subject}" does not apply to {onto.name} in {", ".join(files)}. In {tree} mend it, git add, '
            "git rebase --continue, and so on to the last commit."
        ) from None


def _rebasing(tree: Path) -> bool:
    return any((tree / ".git" / state).exists() for state in ("rebase-merge", "rebase-apply"))


def exported(tree: Path) -> dict[str, bytes]:
    """The commits of a tree over the tag `base` as files of patches/: name -> contents."""
    with tempfile.TemporaryDirectory() as folder:
        git(tree, "format-patch", "--quiet", *FORM, "-o", folder, "base")
        # git prints the summaries of new files from the root of the repository, whatever --relative says
        return {p.name: p.read_bytes().replace(f" {VENDORED}/".encode(), b" ") for p in sorted(Path(folder).iterdir())}


def export(tree: Path) -> None:
    """Write the commits of a tree that `edit` made to patches/, each with the pin as its `Upstream-Base:`.

    Raises:
        BuildError: the tree is not of `edit`, holds changes that no commit has, or commits that are no patches of
            llama.cpp; patches/ is as it was.
    """
    tree = tree.absolute()
    _refuse(tree)
    base = f"Upstream-Base: {upstream().llama_cpp}".encode()
    new = {name: re.sub(rb"(?m)^Upstream-Base: .*$", base, text, count=1) for name, text in exported(tree).items()}
    commits = git(tree, "rev-list", "base..HEAD").split()
    if len(new) != len(commits):
        raise BuildError(f"{len(commits)} commits of {tree} make {len(new)} patches: one is a merge; rebase it.")
    if empty := [name for name, text in new.items() if _diff(text) == text]:
        raise BuildError(f"commits of {tree} that change nothing: {', '.join(empty)}; drop them.")
    old = {patch.name: patch.read_bytes() for patch in series()}
    changes = describe(old, new)
    _write(old, new)
    for line in changes or ["patches/ is as it was"]:
        say(line)
    if old.keys() != new.keys():
        say("Name the files in patches/README.md and docs/architecture.md as well.")


def _refuse(tree: Path) -> None:
    """Raise unless a tree is one of `edit`, with every change committed below vendor/llama.cpp."""
    try:
        git(tree, "config", "--local", MARK)
        git(tree, "merge-base", "--is-ancestor", "base", "HEAD")
    except (BuildError, OSError):
        raise BuildError(f"{tree} was not made by build.py edit, or the tag `base` is not below its commits.") from None
    if _rebasing(tree):
        raise BuildError(f"{tree} is in the middle of a rebase; git rebase --continue or --abort first.")
    if dirty := git(tree, "status", "--porcelain", "--", VENDORED).splitlines():
        raise BuildError(f"{tree} holds changes that are in no commit:\n" + "\n".join(dirty[:10]))
    touched = git(tree, "diff", "--name-only", "base", "HEAD", "--", ".", f":!{VENDORED}").split()
    if touched:
        raise BuildError(f"commits of {tree} change files outside {VENDORED}: {', '.join(touched[:10])}")


def describe(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """A line for each file that an export adds, changes, renames or removes; `old` and `new` are name -> contents."""
    gone = [name for name in old if name not in new]
    lines = []
    for name, text in new.items():
        if name in old:
            lines += [] if old[name] == text else [f"changed  {name}"]
            continue
        # the same subject under another number, or the same change under another subject
        same = (was for was in gone if was[4:] == name[4:] or _diff(old[was]) == _diff(text))
        if was := next(same, None):
            gone.remove(was)
            lines.append(f"renamed  {was} -> {name}")
        else:
            lines.append(f"added    {name}")
    return lines + [f"removed  {name}" for name in gone]


def _diff(patch: bytes) -> bytes:
    """What a patch changes; all of it where it changes nothing."""
    return patch[max(0, patch.find(b"\ndiff --git ")) :]


def _write(old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """Replace the files of the series: all are written beside it before the first takes its place."""
    different = {name: text for name, text in new.items() if old.get(name) != text}
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".export-") as folder:
        for name, text in different.items():
            (Path(folder) / name).write_bytes(text)
        for name in different:
            (Path(folder) / name).replace(HERE / name)
    for name in old.keys() - new.keys():
        (HERE / name).unlink()
