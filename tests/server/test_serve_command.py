"""The command serve: what it starts, finds, says and refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from children import environment
from click.testing import CliRunner
from encoders import make
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.convert.relink import rewrite
from gemma_mtp.patches import source
from gemma_mtp.runtime import programs, serving
from gemma_mtp.runtime.cli.main import main
from library_file import write_library_file
from ollamas import keep
from serves import Served, command, served
from tiny import make_drafter

KEY = "s3cret"


@pytest.fixture(scope="module")
def running(demo: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The folder that a conversion wrote, with nothing said but the port."""
    with served(demo.target.parent, tmp_path_factory.mktemp("running")) as found:
        yield found


def refused(*arguments: object) -> str:
    """The line that the command ends with."""
    done = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    assert done.exit_code in (1, 2), done.output
    return done.output.splitlines()[-1]


def test_a_folder_is_served_with_its_drafter(running: Served, demo: Pair) -> None:
    assert running.facts["target"] == str(demo.target)
    assert running.facts["drafter"] == str(demo.drafter)
    assert running.facts["model"] == link.read_header(demo.target).metadata["general.name"]
    assert running.ask("/health").status == 200
    assert [model["id"] for model in running.ask("/v1/models").json["data"]] == [running.facts["model"]]
    assert running.facts["draft"] == "auto"
    running.chat(max_tokens=32)  # while this is answered plain passes are measured for the first time
    assert running.chat(max_tokens=32).json["timings"]["speedup"] > 0


def test_the_context_is_no_longer_than_the_model_was_trained_for(running: Served, demo: Pair) -> None:
    trained = link.read_header(demo.target).of_arch("context_length")
    assert running.facts["context"] == min(serving.CONTEXT, trained)


def test_sampling_is_that_of_the_file(running: Served, demo: Pair) -> None:
    """As `run`, `chat` and Ollama have it, not llama.cpp's own."""
    found = running.ask("/props").json["default_generation_settings"]["params"]
    wanted = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0}
    assert {name: round(found[name], 6) for name in wanted} == wanted


def test_thinking_is_off_unless_asked_for(running: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    plain = running.ask("/apply-template", {"messages": messages}).json["prompt"]
    assert "<|think|>" not in plain
    wishes: list[tuple[dict[str, Any], bool]] = [
        ({"chat_template_kwargs": {"enable_thinking": True}}, True), ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False), ({"reasoning_effort": None}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
    ]  # fmt: skip
    for wish, thinks in wishes:
        prompt = running.ask("/apply-template", {"messages": messages, **wish}).json["prompt"]
        assert ("<|think|>" in prompt) is thinks, wish


def test_pages_of_other_origins_are_told_nothing(running: Served) -> None:
    """Nor are those whose names only begin like this machine's."""
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        for method in ("GET", "OPTIONS"):
            answer = running.ask("/v1/models", method=method, Origin=origin)
            assert "Access-Control-Allow-Origin" not in answer.headers
    for origin in ("http://localhost:3000", "http://127.0.0.1:8080"):
        assert running.ask("/v1/models", Origin=origin).headers["Access-Control-Allow-Origin"] == origin


def test_metrics_are_served_where_asked_for(running: Served) -> None:
    assert running.ask("/metrics").status == 501


def test_everything_said_otherwise(demo: Pair, tmp_path: Path) -> None:
    """One server with all that is off by default, or that its options, variables and flags of its own set."""
    log = tmp_path / "log"
    arguments = ["--no-mtp", "-c", 512, "-np", 2, "--alias", "mine", "--metrics", "--cors", "https://chat.example"]
    arguments += ["--think", "--log", log, "-v", "--flash-attn", "on", "--", "--api-prefix", "/llm"]
    variables = {"GEMMA_MTP_API_KEY": KEY, "LLAMA_ARG_TOP_K": "7", "LLAMA_ARG_SPEC_DRAFT_MODEL": str(demo.drafter)}
    with served(demo.target, tmp_path, *arguments, **variables) as found:
        assert found.root.endswith("/llm")
        assert found.ask("/v1/models", Authorization="Bearer wrong").status == 401
        assert [found.ask(path).status for path in ("/", "/index.html", "/page.html", "/props")] == [200, 200, 401, 401]
        bearer = {"Authorization": f"bearer {KEY}"}
        assert found.ask("/v1/models", Origin="https://evil.example", **bearer).status == 403
        answer = found.ask("/v1/models", Origin="https://chat.example", **bearer)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert answer.json["data"][0]["id"] == found.facts["model"] == "mine"
        assert (found.facts["context"], found.facts["drafter"]) == (256, None)
        body = {"prompt": "import os\n", "n_predict": 16, "temperature": 0}
        assert "draft_n" not in found.ask("/completion", body, **bearer).json["timings"]
        assert "llamacpp:" in found.ask("/metrics", **bearer).text
        assert found.ask("/props", **bearer).json["default_generation_settings"]["params"]["top_k"] == 7
        prompt = found.ask("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}, **bearer).json[
            "prompt"
        ]
        assert "<|think|>" in prompt
        line = Path(f"/proc/{found.facts['pid']}/cmdline")
        assert not line.exists() or KEY not in line.read_text()
    told = log.read_text()
    assert "listening on" in told
    assert set(told.splitlines()) <= set(found.errors.read_text().splitlines())


def test_what_options_stand_for_may_be_variables(demo: Pair, tmp_path: Path) -> None:
    variables = {"LLAMA_ARG_CTX_SIZE": "512", "LLAMA_ARG_ALIAS": "other", "LLAMA_ARG_SPEC_DRAFT_N_MAX": "2"}
    with served(demo.target, tmp_path, **variables) as found:
        assert [found.facts[name] for name in ("context", "model", "draft")] == [512, "other", 2]
        assert "warn" not in found.errors.read_text()


def test_what_is_said_when_it_is_ready(demo: Pair, tmp_path: Path) -> None:
    """The line for curl works as it stands; where no drafter is beside the target that is said."""
    alone = Path(shutil.copy(demo.target, tmp_path))
    words = command(alone, "--port", 0, "-t", 1)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment(tmp_path)) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            told = dict(process.stdout.readline().rstrip().split(maxsplit=1) for _ in range(5))
            assert told["drafts"].startswith(f"none: no linked drafter beside {alone}")
            assert told["images"] == "no projector"
            assert told["page"].startswith("none to chat in; gemma-mtp build --ui")
            assert "http://127.0.0.1:" in told["serving"]
            if shutil.which("curl"):
                line = told["try"].replace('"messages"', '"max_tokens": 4, "messages"')
                answer = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
                assert json.loads(answer.stdout)["usage"]["completion_tokens"] <= 4
        finally:
            process.terminate()


@pytest.mark.parametrize("built", [False, True])
def test_the_page(built: bool, demo: Pair, tmp_path: Path) -> None:
    """llama.cpp's where it was built, else one that says how."""
    page = tmp_path / "ui" / source.upstream().sha256[:16] / "index.html"
    if built:
        page.parent.mkdir(parents=True)
        page.write_text("<p>chat</p>")
    with served(demo.target, tmp_path) as found:
        assert found.facts["page"] == (f"{found.root}/" if built else None)
        assert ("<p>chat</p>" if built else "gemma-mtp build --ui") in found.ask("/").text


def test_a_projector_is_found_by_its_width(demo: Pair, tmp_path: Path) -> None:
    """And one that the target itself holds, as files of Ollama's library do; files of another width are not taken."""
    folder = make("E4B", tmp_path / "target")
    pair = convert_pair(
        folder, make_drafter(tmp_path / "drafter", ordered=True), tmp_path / "out", "BF16", mmproj="F16"
    )
    assert pair.projector is not None
    found = serving.served(str(pair.target.parent), "auto", None, True, None)
    assert found.projector == pair.projector
    assert found.flags(3, {})[-1] != "--no-mmproj"
    assert serving.served(str(pair.target), None, None, False, None).projector is None
    other = {"clip.vision.projection_dim": 128, "clip.audio.projection_dim": 128}
    rewrite(link.read_header(pair.projector), other, tmp_path / "other.gguf", lambda done, total: None)
    beside = Path(shutil.copy(pair.target, tmp_path))
    assert serving.served(str(beside), None, None, True, None).projector is None
    whole = write_library_file(tmp_path / "whole.gguf", pair.target, pair.projector)
    assert serving.served(str(whole), None, None, True, None).projector == whole
    assert "is no projector" in refused(beside, "--mmproj", demo.drafter)


def test_files_without_settings_get_gemmas(demo: Pair, tmp_path: Path) -> None:
    """Of sampling, and the format of a chat: files of Ollama's library have none."""
    bare = write_library_file(tmp_path / "bare.gguf", demo.target)
    flags = serving.served(str(bare), None, None, True, None).flags(3, {"LLAMA_ARG_TOP_P": "0.5"})
    given = dict(pairwise(flags))
    assert (given["--temp"], given["--top-k"], given["--min-p"]) == ("1.0", "64", "0.0")
    assert "--top-p" not in flags
    with served(bare, tmp_path) as found:
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        prompt = found.ask("/apply-template", asked).json["prompt"]
        assert prompt == "<|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
        assert found.ask("/props").json["default_generation_settings"]["params"]["top_k"] == 64


def test_types_of_drafts_of_the_environment_are_added(demo: Pair) -> None:
    found = serving.served(str(demo.target), "auto", None, True, None)

    def types(given: str) -> str:
        flags = found.flags(3, {"LLAMA_ARG_SPEC_TYPE": given})
        return flags[flags.index("--spec-type") + 1]

    assert [types(each) for each in ("", "none", "ngram-simple", "draft-mtp")] == [
        "draft-mtp", "draft-mtp", "ngram-simple,draft-mtp", "draft-mtp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--host", "127.0.0.1,::"], "can be reached from other machines"),
        (["--", "--host", "0.0.0.0"], "--host is not passed on"),
        (["--", "--api_key", "x"], "--api_key is not passed on"),
        (["--api-key", "schlüssel"], "cannot be sent in an HTTP header"),
        (["--api-key", ""], "cannot be sent in an HTTP header"),
        (["--api-key-file", "{tmp}/empty"], "holds no API key"),
        (["--api-key-file", "{tmp}/wrong"], "line 2 of"),
        (["--draft", "16"], "15 at most"),
        (["--foo"], "No such option '--foo'"),
        (["more"], "llama-server's flags stand behind --"),
        (["--", "--foo"], "invalid argument: --foo"),
        (["--", "-ctk", "foo"], "Unsupported cache type: foo"),
        (["--drafter", "{target}"], "not a drafter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_refusal_is_one_line(arguments: list[str], said: str, demo: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n\n")
    (tmp_path / "wrong").write_text("right\nwith space\n")
    given = [each.format(tmp=tmp_path, target=demo.target) for each in arguments]
    assert said in refused(demo.target, "--port", 0, *given)


def test_a_target_that_is_none(demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert "does not exist" in refused(tmp_path / "none.gguf")
    assert "neither as a file nor as a model" in refused("none:1b")
    assert "is a drafter" in refused(demo.drafter)
    assert "must hold one target" in refused(tmp_path)


def test_a_port_that_is_taken(running: Served, demo: Pair) -> None:
    port = running.root.rpartition(":")[2]
    assert f"cannot listen at 127.0.0.1:{port} (Address already in use)" in refused(demo.target, "--port", port)


def test_without_llama_server(demo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    assert refused(demo.target).endswith("gemma-mtp build")


def test_an_ollama_model_is_served_by_its_name(demo: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the drafter and the projector that it has, though others lie in the same folder."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    library = "registry.ollama.ai/library/"
    layers = {"model": demo.target, "draft": demo.drafter, "projector": demo.target}
    blobs = keep(tmp_path, library + "gemma4/e4b", **layers)
    keep(tmp_path, library + "plain/latest", model=demo.target)
    found = serving.served("gemma4:e4b", "auto", None, True, None)
    assert (found.name, found.drafter, found.projector) == ("gemma4:e4b", blobs["draft"], blobs["projector"])
    assert serving.served("plain", None, None, True, None).projector is None


def test_lines_of_the_log_are_told_apart() -> None:
    lines = [
        "0.00.026.132 I srv    operator(): cleaning up", "0.39.914.020 E srv    load_model: failed to load",
        "0.01.237.557 E llama_init_from_model: failed (this message is normal during memory fitting)",
        "/x/ggml.c:12: GGML_ASSERT(false) failed",
    ]  # fmt: skip
    found = [programs.read_line(line) for line in lines]
    assert [line.wrong for line in found] == [False, True, False, True]
    assert found[1].text == "failed to load"
