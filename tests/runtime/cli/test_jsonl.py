"""`gemma-mtp run --jsonl`: every line has one answer, whatever happened on the way."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from children import MAIN, Terminal, ended, environment, started, until
from click.testing import CliRunner
from gemma_mtp.convert import Pair
from gemma_mtp.runtime.cli.main import main
from gemma_mtp.runtime.many.lines import Answers, Prompts
from prompts import PROMPT

OPTIONS = ["-t", "1", "-c", "512", "--seed", "7", "-n", "8"]


def written(path: Path, items: list[Any]) -> Path:
    """A file of lines; a text is a line as it is."""
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in items))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def holds(path: Path, least: int) -> bool:
    """Whether there are so many lines."""
    return path.exists() and path.read_bytes().count(b"\n") >= least


def command(demo: Pair, source: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(demo.target), "--jsonl", str(source), "--out", str(out), *OPTIONS, *more]


def test_lines_in_their_place(demo: Pair, tmp_path: Path) -> None:
    """Prompts and chats, options of a line before those of all, what is wrong, and a second time nothing to do."""
    source = written(
        tmp_path / "in.jsonl",
        [
            {"prompt": PROMPT, "id": "first"},
            "{broken",
            "",
            {"messages": [{"role": "user", "content": "import os"}], "id": 2, "max_tokens": 5},
            {"prompt": PROMPT, "seed": 8, "grammar": 'root ::= "yes" | "no"'},
            {"prompt": PROMPT, "colour": "red"},
            {"id": 3},
            {"prompt": PROMPT * 200},
            {"prompt": PROMPT, "temperature": 0, "stop": "("},
        ],
    )
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(main, command(demo, source, out))
    assert result.exit_code == 1, result.output
    assert "8 of 8 lines, 4 failed" in result.stderr
    assert f'4 lines failed: they have "error" in {out}' in result.stderr
    found = answers(out)
    assert [each["line"] for each in found] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [each.get("id") for each in found] == ["first", None, 2, None, None, 3, None, None]
    kinds = [each.get("error", {}).get("type") for each in found]
    assert kinds == [None, "ValueError", None, None, "TypeError", "ValueError", "ValueError", None]
    assert "not JSON" in found[1]["error"]["message"]
    assert found[0]["seed"] == 7
    assert found[0]["usage"]["completion_tokens"] == 8
    assert found[2]["message"]["role"] == "assistant"
    assert found[2]["usage"]["completion_tokens"] == 5
    assert found[3]["text"] in ("yes", "no")
    assert "(" not in found[-1]["text"]
    kept = out.read_bytes()
    again = CliRunner().invoke(main, command(demo, source, out))
    assert again.exit_code == 0
    assert "has an answer to each of the 8 lines" in again.stderr
    assert out.read_bytes() == kept
    alone = CliRunner().invoke(main, ["run", str(demo.target), "-p", PROMPT, "--json", *OPTIONS])
    assert json.loads(alone.stdout)["text"] == found[0]["text"]


def test_a_prompt_is_a_message_with_chat(demo: Pair, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": "import os"}])
    assert CliRunner().invoke(main, command(demo, source, tmp_path / "out.jsonl", "--chat")).exit_code == 0
    [answer] = answers(tmp_path / "out.jsonl")
    assert answer["message"]["content"]


def test_killed_twice(demo: Pair, tmp_path: Path) -> None:
    """And what it was writing then is there once."""
    items = [{"prompt": f"{PROMPT}{i}", "id": i, "seed": i} for i in range(40)]
    source, out, whole = written(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    program = [sys.executable, "-c", MAIN]
    for least in (6, 20):
        with started([*program, *command(demo, source, out)], env=environment(tmp_path), stderr=PIPE) as process:
            until(partial(holds, out, least), process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(out.read_bytes().splitlines()) < len(items)
        with out.open("ab") as file:  # a line that the kill cut off
            file.write(b'{"line": 39, "text": "cut')
    with started([*program, *command(demo, source, out)], env=environment(tmp_path), stderr=PIPE) as process:
        status, _, err = ended(process)
    assert status == 0, err
    assert "40 of 40 lines" in err
    assert [each["id"] for each in answers(out)] == list(range(40))
    assert CliRunner().invoke(main, command(demo, source, whole)).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_ctrl_c_says_how_to_go_on(demo: Pair, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": f"{PROMPT}{i}"} for i in range(500)])
    out = tmp_path / "out.jsonl"
    program = [sys.executable, "-c", MAIN, *command(demo, source, out)]
    with started(program, env=environment(tmp_path), stderr=PIPE) as process:
        until(partial(holds, out, 3), process)
        status, _, err = ended(process, signal.SIGINT)
    assert status == 130
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert out.read_bytes().endswith(b"\n")


def test_a_terminal_shows_how_far_it_is(demo: Pair, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": f"{PROMPT}{i}"} for i in range(5)])
    program = [sys.executable, "-c", MAIN, *command(demo, source, tmp_path / "out.jsonl")]
    ours, theirs = pty.openpty()
    try:
        with started(program, env=environment(tmp_path), stderr=theirs):
            terminal = Terminal(ours)
            terminal.until("1 of 5 lines, ")
            terminal.until("5 of 5 lines, 40 tokens in ")
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Prompts, Path]:
    return Prompts(written(tmp_path / "in.jsonl", [{"prompt": "a"}, "", {"prompt": "b"}]), {"n": 1}), tmp_path / "out"


def test_what_is_cut_off_is_removed(files: tuple[Prompts, Path]) -> None:
    prompts, out = files
    with Answers(out, prompts) as found:
        assert [(number, line) for number, line in found.left()] == [(1, b'{"prompt": "a"}'), (3, b'{"prompt": "b"}')]
        found.write(3, b'{"prompt": "b"}', {"id": "\ud800", "text": "naïve"})
    whole = out.read_bytes()
    assert "naïve" in json.loads(whole)["text"]
    for cut in range(len(whole)):
        out.write_bytes(whole + whole[:cut])
        with Answers(out, prompts) as found:
            assert found.done == {3}
            assert found.total == 2
            assert [number for number, _ in found.left()] == [1]
        assert out.read_bytes() == whole


def test_answers_to_something_else(files: tuple[Prompts, Path], tmp_path: Path) -> None:
    """Other settings, another file, no answers at all, the prompts themselves."""
    prompts, out = files
    with Answers(out, prompts) as found:
        found.write(3, b'{"prompt": "b"}', {})
    kept = out.read_bytes()
    for other in (
        Prompts(prompts.path, {"n": 2}),
        Prompts(written(tmp_path / "short.jsonl", [{"prompt": "a"}]), {"n": 1}),
        Prompts(written(tmp_path / "other.jsonl", [{"prompt": "a"}, "", {"prompt": "c"}]), {"n": 1}),
    ):
        with pytest.raises(ValueError, match=r"other prompts, or made with other settings \(line 3\)"):
            Answers(out, other)
    assert out.read_bytes() == kept
    out.write_text("notes\n")
    with pytest.raises(ValueError, match="is no file of answers"):
        Answers(out, prompts)
    assert out.read_text() == "notes\n"
    with pytest.raises(ValueError, match="holds the prompts"):
        Answers(prompts.path, prompts)


def test_one_program_at_a_time(files: tuple[Prompts, Path]) -> None:
    prompts, out = files
    with Answers(out, prompts), pytest.raises(RuntimeError, match="another program writes"):
        Answers(out, prompts)
    Answers(out, prompts).close()


def test_a_full_disk(files: tuple[Prompts, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a line is written, then none: the next run removes it."""
    prompts, out = files
    real = os.write

    def write(file: int, data: bytes) -> int:
        if len(data) < 30:
            raise OSError(28, "No space left on device")
        return real(file, data[:20])

    with Answers(out, prompts) as found:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "write", write)
            found.write(1, b'{"prompt": "a"}', {"text": "x" * 100})
        assert out.read_bytes()
    with Answers(out, prompts) as found:
        assert not found.done
    assert not out.read_bytes()


@pytest.mark.parametrize(
    "wrong", [["-p", "x", "--jsonl", "{}", "--out", "out"], ["--jsonl", "{}"], ["--out", "x", "-p", "x"], [],
              ["--jsonl", "{}", "--out", "out", "--json"]]
)  # fmt: skip
def test_what_does_not_go_together(tmp_path: Path, wrong: list[str]) -> None:
    source = str(written(tmp_path / "in.jsonl", [{"prompt": "a"}]))
    result = CliRunner().invoke(main, ["run", "model.gguf", *(each.replace("{}", source) for each in wrong)])
    assert result.exit_code == 2
    assert "give either -p/--prompt, or --jsonl and --out" in result.stderr or "leave them out" in result.stderr
