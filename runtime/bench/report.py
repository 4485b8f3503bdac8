"""The tables and the picture of a measurement."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {"patched-server": "our build"}  # others are called what they were asked for as
OURS, OTHERS = "#1f6feb", ("#d97706", "#7c3aed")


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    machine, flags = result["machine"], result["flags"]
    read = machine["read_gb_per_s"]
    console.print(
        f"{result['target']} ({result['layers']} layers) with {result['drafter']}; weights {result['weights']}\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
        f"{'' if read is None else f' reading {read:g} GB/s'}; llama-cpp-python {result['versions']['llama_cpp']}; "
        f"context {result['ctx_filled']}, medians of {flags['repeat']} visits",
        highlight=False, markup=False,
    )  # fmt: skip
    console.print(_costs(result, "target_pass_ms", "one target pass over n tokens", "n"))
    console.print(_costs(result, "draft_round_ms", "drafting K tokens", "K"))
    if "prompt" in result:
        console.print(_prompts(result))
    if not flags["passes"]:
        console.print(_speeds(result))
        console.print(_auto(result))
        for who, other in result.get("against", {}).items():
            console.print(_server(who, other["server"]))
        for name, found in result.get("ollama", {}).items():
            console.print(_ollama(name, found))
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


def _costs(result: Mapping[str, Any], key: str, title: str, letter: str) -> Table:
    """A row a number of tokens, columns for ours and for each other library."""
    table = Table(title=title, title_justify="left")
    others = {who: other for who, other in result.get("against", {}).items() if key in other}
    headings = [letter, "ms", *(["over n = 1"] if letter == "n" else [])]
    for heading in headings + [text for who in others for text in (f"{who}, ms", f"{who} / ours")]:
        table.add_column(heading, justify="right")
    for n, value in result[key].items():
        row = [n, f"{value:.1f}", *([f"{value / result[key]['1']:.2f}"] if letter == "n" else [])]
        for other in others.values():
            row += [f"{other[key][n]:.1f}", f"{other['ratio'][key][n]:.2f}"]
        table.add_row(*row)
    return table


def _prompts(result: Mapping[str, Any]) -> Table:
    """A row a length, columns for `Llama`, our llama-server and each other."""
    table = Table(title="prompt of n tokens: tokens per second, seconds to the first token", title_justify="left")
    others = {who: other for who, other in result.get("against", {}).items() if "prompt_speedup" in other}
    engines = {"Llama": result["prompt"]} | ({"our server": result["prompt_server"]} if others else {})
    for heading in ("n", *(text for who in [*engines, *others] for text in (f"{_name(who)}, tokens/s", "s"))):
        table.add_column(heading, justify="right")
    for who in others:
        table.add_column(f"our server / {_name(who)}", justify="right")
    for n in result["prompt"]:
        row = [n]
        for read in [*engines.values(), *(other["prompt"] for other in others.values())]:
            row += [f"{read[n]['tokens_per_s']:.0f}", f"{read[n]['first_token_ms'] / 1e3:.2f}"]
        table.add_row(*row, *(f"{other['prompt_speedup'][n]:.2f}" for other in others.values()))
    return table


def _speeds(result: Mapping[str, Any]) -> Table:
    """Ours: a row a case, plain, each acceptance, the drafter's own tokens."""
    table = Table(title="tokens per second", title_justify="left")
    for heading in ("acceptance", "tokens/s", "over plain", "drafted", "accepted"):
        table.add_column(heading, justify="left" if heading == "acceptance" else "right")
    table.add_row("plain", f"{result['tokens_per_s']['plain']:.1f}", "1.00", "", "")
    for name, rate in result["tokens_per_s"]["mtp"].items():
        table.add_row(
            _case(name), f"{rate:.1f}", f"{result['speedup'][name]:.2f}",
            str(result["draft_length"][name]), f"{result['acceptance'][name]:.3f}",
        )  # fmt: skip
    return table


def _auto(result: Mapping[str, Any]) -> Table:
    """The draft length "auto": the same cases, over plain and over the best fixed length, and in the warm-up."""
    warm = result["flags"]["warm_tokens"]
    table = Table(title=f'draft length "auto", after {warm} tokens that teach it', title_justify="left")
    headings = ("acceptance", "tokens/s", "over plain", "over best fixed", "drafted", *(["learning"] if warm else []))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "acceptance" else "right")
    for name, found in result["auto"].items():
        table.add_row(
            _case(name), f"{found['tokens_per_s']:.1f}", f"{found['speedup']:.2f}",
            f"{found['over_best_fixed']:.2f} ({found['best_fixed'] or 'plain'})", f"{found['drafted_per_round']:.1f}",
            *([f"{found['learning']:.2f}"] if "learning" in found else []),
        )  # fmt: skip
    return table


def _server(who: str, server: Mapping[str, Any]) -> Table:
    """A llama-server: the same cases, and ours over it."""
    table = Table(title=f"tokens per second, llama-server ({_name(who)})", title_justify="left")
    for heading in ("acceptance", "tokens/s", "over its plain", "drafted", "ours / it"):
        table.add_column(heading, justify="left" if heading == "acceptance" else "right")
    over = server["ours_over_it"]
    table.add_row("plain", f"{server['plain']:.1f}", "1.00", "", f"{over['plain']:.2f}")
    for name, rate in server["mtp"].items():
        table.add_row(
            _case(name), f"{rate:.1f}", f"{server['speedup'][name]:.2f}", str(server["draft_length"][name]),
            f"{over[name]:.2f}",
        )  # fmt: skip
    return table


def _ollama(name: str, found: Mapping[str, Any]) -> Table:
    """Through Ollama: a row a case, of Ollama's own engine and of ours."""
    engines = found["engines"]
    title = f"{name}, through its API, a prompt of {found['prompt_tokens']} tokens"
    table = Table(title=title, title_justify="left")
    for heading in ("engine", "drafts", "tokens/s", "over Ollama's plain", "accepted", "first token, ms", "memory, MB"):
        table.add_column(heading, justify="left" if heading in ("engine", "drafts") else "right")
    base = next(iter(engines.values()))["cases"]["plain"]["tokens_per_s"]
    for who, each in engines.items():
        for case, values in each["cases"].items():
            rate, accepted = values["tokens_per_s"], values.get("acceptance")
            table.add_row(
                who, case, f"{rate:.1f}", f"{rate / base:.2f}", "" if accepted is None else f"{accepted:.0%}",
                f"{values['first_token_ms']:,}", f"{values['memory_mb']:,}",
            )  # fmt: skip
    return table


def _name(who: str) -> str:
    return NAMES.get(who, Path(who).name if os.sep in who else who)


def _case(name: str) -> str:
    return "the drafter's own" if name == "own" else name


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of how the figures came about."""
    lines = [f"prompt: {result['prompt_tokens_per_s']:.0f} tokens/s"]
    for who, other in result.get("against", {}).items():
        if "prompt_tokens_per_s" in other:
            lines[0] += f"; {who} {other['prompt_tokens_per_s']:.0f}"
    for who, other in result.get("against", {}).items():
        if other.get("left_out"):
            lines.append(f"{_name(who)} does not know {', '.join(other['left_out'])}: left out")
    if result["flags"]["passes"]:
        return lines
    for name, by_length in result["speedup_by_length"].items():
        if len(by_length) > 1:
            each = ", ".join(f"{length}: {value:.2f}" for length, value in by_length.items())
            lines.append(f"over plain at acceptance {name} by draft length: {each}")
    if over := result["overhead"]:
        share, spent = over["share"], over["ms_per_round"]
        lines.append(f"overhead: {share:.1%} of a round ({spent:.2f} ms) outside llama_decode and drafting")
    if result["replayed"]:
        lines.append(
            f"replayed at {', '.join(result['replayed'])}: drafts were taken from a recorded continuation with that "
            "chance per token; the drafter ran and is paid for, its tokens were thrown away, and so was what the text "
            "so far had to offer"
        )
        if result.get("against"):
            lines.append(
                "llama-server accepted at random (--spec-synth-rates); its tokens/s are the tokens expected of a round "
                "over the measured time of one, greedy, backend sampling off, at its best of 1 to 4 drafted"
            )
    if "identical" in result:
        lines.append(f"same tokens with MTP as without: {'yes' if result['identical'] else 'no'}")
    return lines


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw speed-up over acceptance and target pass over n, ours and the others'.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_speedup(left, result)
    _plot_passes(right, result)
    machine = result["machine"]
    figure.suptitle(
        f"{result['target']}, weights {result['weights']}; {machine['cpu']}, {machine['threads']} threads, "
        f"context {result['ctx_filled']}",
        fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _points(values: Mapping[str, float], result: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Acceptance and value of each case, in order; the drafter's own at the acceptance it had, and none that switch."""
    steady = {k: value for k, value in values.items() if "/" not in k}
    pairs = sorted((result["acceptance"][k] if k == "own" else float(k), value) for k, value in steady.items())
    return [x for x, _ in pairs], [y for _, y in pairs]


def _plot_speedup(axes: Any, result: Mapping[str, Any]) -> None:
    curves = [("gemma-mtp", result["speedup"], OURS)]
    for (who, other), colour in zip(result.get("against", {}).items(), OTHERS, strict=False):
        curves.append((f"llama-server, {_name(who)}", other["server"]["speedup"], colour))
    for label, values, colour in curves:
        x, y = _points(values, result)
        if not x:  # a llama-server that cannot draft
            continue
        axes.plot(x, y, marker="o", color=colour, label=label)
        # Ours above the point and the others' below, so that close curves stay readable.
        place = (0, 7) if colour == OURS else (0, -14)
        for at, value in zip(x, y, strict=True):
            axes.annotate(f"{value:.2f}", (at, value), textcoords="offset points", xytext=place, ha="center",
                          color=colour, fontsize=8)  # fmt: skip
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle="--")
    axes.set(xlabel="chance that a drafted token is accepted", ylabel="tokens/s over plain", title="Speed-up with MTP")
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _plot_passes(axes: Any, result: Mapping[str, Any]) -> None:
    curves = [("gemma-mtp", result["target_pass_ms"], OURS)]
    for (who, other), colour in zip(result.get("against", {}).items(), OTHERS, strict=False):
        if "target_pass_ms" in other:
            curves.append((f"{_name(who)} libllama", other["target_pass_ms"], colour))
    for label, values, colour in curves:
        axes.plot([int(n) for n in values], list(values.values()), marker="o", color=colour, label=label)
    axes.set(xlabel="tokens in the pass", ylabel="ms", title="One target pass")
    axes.set_xticks([int(n) for n in result["target_pass_ms"]])
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
