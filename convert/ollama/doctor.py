"""What is wrong with a model of Ollama, and the one command that mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.ollama.api import Client
from gemma_mtp.convert.ollama.attach import PLAIN, chosen_renderer
from gemma_mtp.convert.ollama.installation import installation, running_program
from gemma_mtp.convert.ollama.probe import fault
from gemma_mtp.convert.ollama.store import Stored, names, stored
from gemma_mtp.convert.ollama.trial import Trial, trial
from gemma_mtp.convert.pipeline import type_counts


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and the command that mends it."""

    problem: str
    mend: str


@dataclass(frozen=True)
class Report:
    """A model, what its two files hold (type of tensor to number), what is wrong with it, and a short answer of it."""

    model: Stored
    target: link.Header | None = None
    drafter: link.Header | None = None
    findings: tuple[Finding, ...] = ()
    trial: Trial | None = field(default=None)

    def types(self) -> dict[str, dict[str, int]]:
        headers = {"target": self.target, "drafter": self.drafter}
        return {role: type_counts(each.tensors.values()) for role, each in headers.items() if each is not None}


@dataclass(frozen=True)
class Host:
    """The engine of a running Ollama, in a line, and what is wrong with it."""

    about: str
    findings: tuple[Finding, ...] = ()


def host(api: Client) -> Host | None:
    """What the Ollama that answers runs its models with; None where its files are not on this machine.

    Its own llama-server is tried with a tiny model: on some processors it ends with an illegal instruction.
    """
    if not api.is_here or not sys.platform.startswith(("linux", "darwin")):
        return None
    from gemma_mtp.convert.ollama import dispatch, shadow

    served = shadow.running()
    if served is not None and served.url == api.url:
        return Host(f"{served.engine}, by gemma-mtp ollama serve")
    try:
        found = installation(running_program())
    except MtpError:
        return None
    state = dispatch.status(found)
    problem = fault(state.original)
    findings = () if problem is None else (Finding(f"Ollama's own llama-server {problem}", ""),)
    return Host(dispatch.about(found, state), findings)


def gemma4_models(api: Client) -> list[Stored]:
    """The Gemma 4 models of the store."""
    return [model for model in (stored(api, name) for name in names(api)) if model.is_gemma4]


def examine(api: Client, name: str, *, run: bool) -> Report:
    """Look at a model of the store; with `run` have it answer as well.

    Raises:
        MtpError: there is no such model, or Ollama is not there.
    """
    model = stored(api, name)
    findings: list[Finding] = []
    target, drafter = None, None
    try:
        target, drafter = model.read_target(), model.read_drafter()
        if target.arch == link.TARGET_ARCH:
            findings += _findings(model, target, drafter)
        else:
            findings.append(Finding(f"it is a {target.arch!r} model, for which nothing drafts here", ""))
    except MtpError as problem:
        findings.append(Finding(str(problem), ""))
    tried = None
    if run:
        try:
            tried = trial(api, model)
        except MtpError as problem:
            findings.append(Finding(str(problem), ""))
        else:
            findings += _seen(model, tried)
    return Report(model, target, drafter, tuple(findings), tried)


def _findings(model: Stored, target: link.Header, drafter: link.Header | None) -> Iterator[Finding]:
    """What its files and settings show."""
    mend = f"gemma-mtp ollama attach {model.name}"
    if drafter is None and not model.name.endswith(PLAIN):
        yield Finding("it has no drafter", mend)
    elif drafter is not None:
        try:
            link.check(target, drafter)
        except MtpError as problem:
            yield Finding(str(problem), f"{mend} --drafter FILE")
        if not model.drafts:
            yield Finding("its drafts are off (draft_num_predict is 0)", mend)
    wanted = chosen_renderer(model, target)
    if model.renderer != wanted:
        yield Finding(f"its renderer is {model.renderer or 'missing'}, and {wanted} is right for its size", mend)
    if not model.parser:
        yield Finding("it has no parser, so thinking and tool calls stay in the text", mend)


def _seen(model: Stored, tried: Trial) -> Iterator[Finding]:
    """What its answer showed."""
    if model.drafts and tried.drafting is False:
        yield Finding("it runs without its drafter", f"ollama stop {model.name}")
    if tried.stale:
        yield Finding("another model's drafter runs with it, for Ollama tells runners apart by target alone",
                      f"ollama stop {model.name}")  # fmt: skip
