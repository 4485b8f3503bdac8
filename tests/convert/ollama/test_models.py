"""Models with drafters in Ollama: made, attached, detached, looked at; on what stands in, and on a real Ollama."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.convert.gguf_io.read import read
from gemma_mtp.convert.integrity import verify_files
from gemma_mtp.convert.modelfile import files_of
from gemma_mtp.convert.ollama import store, trial
from gemma_mtp.convert.ollama.api import LOADING, Client
from gemma_mtp.convert.ollama.attach import published
from gemma_mtp.convert.ollama.store import stored
from gemma_mtp.convert.relink import rewrite
from gemma_mtp.convert.sizes import SIZES
from gguf import GGUFWriter
from gguf_files import finish
from ollama_standin import Answer, Model, Standin
from ollamas import Ollama, run
from prompts import held_out
from tiny import PAIR

FOLDERS = PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant"
SAID = r"{}: drafts on, up to 4 a round, \d+% accepted, \d+\.\d tokens/s\n"


def told(name: str, output: str) -> bool:
    """Whether a command ended with the line that says what the user has."""
    return re.fullmatch(SAID.format(re.escape(name)), output) is not None


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The bundled pair, its target in several files."""
    return convert_pair(*FOLDERS, tmp_path_factory.mktemp("parts"), "Q8_0", split_max_size=2_000_000)


def test_a_folder_becomes_a_model(ollama: Ollama, demo: Pair) -> None:
    done = run("ollama", "create", "mine", demo.target.parent)
    assert done.exit_code == 0, done.stderr
    assert told("mine", done.stdout)
    assert "GB at the peak" in done.stderr
    model = stored(ollama.api, "mine")
    assert (model.renderer, model.parser, model.drafts) == ("gemma4-small", "gemma4", 4)
    wanted = {"draft_num_predict": 4, "stop": "<turn|>", "temperature": 1, "top_k": 64, "top_p": 0.95}
    assert dict(model.parameters) == wanted
    assert model.drafter is not None
    assert model.drafter.read_bytes() == demo.drafter.read_bytes()
    assert model.target is not None
    found = verify_files(model.target)
    assert found["pairs"] == {str(model.target): str(model.drafter)}
    assert all(file["hashed"] == file["tensors"] for file in found["files"])


@pytest.mark.ollama
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_target_in_several_files_becomes_a_model(named: str, parts: Pair) -> None:
    done = run("ollama", "create", "parts", parts.target.parent if named == "folder" else parts.target)
    assert done.exit_code == 0, done.stderr
    assert told("parts", done.stdout)
    assert run("ollama", "doctor", "parts").stdout.count("problem") == 0


@pytest.mark.ollama
@pytest.mark.usefixtures("real")
def test_tokens_are_those_without_drafts(demo: Pair) -> None:
    """Every change of the number of drafts loads the model anew. Drawn tokens are equal on our llama-server alone."""
    assert run("ollama", "create", "mine", demo.target.parent).exit_code == 0
    api = Client()

    def texts(drafts: int) -> list[str]:
        options = {"draft_num_predict": drafts, "num_predict": 48, "temperature": 0}
        body = {"model": "mine", "raw": True, "stream": False}
        sent = [{**body, "prompt": prompt, "options": options} for prompt in held_out(10)]
        return [api.post("/api/generate", each, LOADING)["response"] for each in sent]

    assert texts(4) == texts(0)


def test_a_projector_is_a_file_of_its_own(demo: Pair, tmp_path: Path, standin: Standin) -> None:
    writer = GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    finish(writer)
    text = run("modelfile", demo.target, "--projector", tmp_path / "mmproj.gguf").stdout
    models, drafts = files_of(text, demo.target.parent)
    assert [path.resolve() for path in models] == [demo.target, tmp_path / "mmproj.gguf"]
    assert drafts == [demo.drafter]
    assert run("ollama", "create", "mine", demo.target, "--projector", tmp_path / "mmproj.gguf").exit_code == 0
    for command in (["modelfile"], ["ollama", "create", "mine"]):
        assert "is no projector" in run(*command, demo.target, "--projector", demo.drafter).stderr
        assert "names its projector itself" in run(*command, demo.target.parent, "--projector", demo.drafter).stderr
    assert len(standin.models) == 1


def test_the_modelfile_names_every_part(parts: Pair, standin: Standin) -> None:
    n_parts = len(parts.files) - 1
    models, drafts = files_of(parts.modelfile.read_text(), parts.modelfile.parent)
    assert n_parts > 2
    assert models == list(parts.files[:n_parts])
    assert drafts == [parts.drafter]
    whole = run("modelfile", parts.target).stdout
    assert files_of(whole, parts.target.parent) == (models, drafts)
    lines = parts.modelfile.read_text().splitlines(keepends=True)
    try:
        parts.modelfile.write_text("".join(lines[:1] + lines[2:]))
        done = run("ollama", "create", "mine", parts.target.parent)
    finally:
        parts.modelfile.write_text("".join(lines))
    assert f"names {n_parts - 1} of the {n_parts} parts" in done.stderr
    assert f"gemma-mtp modelfile {parts.target} > {parts.modelfile}" in done.stderr
    assert standin.models == {}


def test_a_joined_target_keeps_the_hashes_of_its_first_part(parts: Pair, tmp_path: Path) -> None:
    """As Ollama joins a split: every key of the first part but those of the split."""
    first = read(parts.target)
    kept = replace(first, spans={key: span for key, span in first.spans.items() if not key.startswith("split.")})
    rewrite(kept, {}, tmp_path / parts.target.name, lambda done, total: None)
    shutil.copy(parts.drafter, tmp_path)
    joined = tmp_path / "sha256-of-it"
    (tmp_path / parts.target.name).rename(joined)
    assert verify_files(joined)["files"][0]["hashed"] == len(first.tensors)
    data = bytearray(joined.read_bytes())
    data[next(iter(read(joined).tensors.values())).offset] ^= 1
    joined.write_bytes(data)
    with pytest.raises(link.MtpError, match="has the SHA-256"):
        verify_files(joined)


@pytest.mark.parametrize(("size", "renderer"), [("E2B", "small"), ("E4B", "small"), ("12B", "large"),
                                                ("26B-A4B", "large"), ("31B", "large")])  # fmt: skip
def test_the_renderer_is_that_of_the_size(
    size: str, renderer: str, sizes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    pair = convert_pair(*sizes[size], tmp_path, "F32", "F32")
    for text in (pair.modelfile.read_text(), run("modelfile", pair.target).stdout):
        assert f"RENDERER gemma4-{renderer}\nPARSER gemma4\nREQUIRES 0.30.10\nPARAMETER stop <turn|>\n" in text


@pytest.mark.parametrize("quant", ["Q2_0", "TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_types_that_ollama_cannot_size_are_refused_at_once(
    quant: str, role: str, standin: Standin, tmp_path: Path
) -> None:
    formats = (quant, "Q8_0") if role == "target" else ("Q8_0", quant)
    pair = convert_pair(*FOLDERS, tmp_path / "pair", *formats)
    done = run("ollama", "create", "mine", pair.modelfile.parent)
    assert done.exit_code == 1
    assert re.search(rf"in {quant}, a type that Ollama cannot size .*; convert with another format", done.stderr)
    assert standin.requests == []
    if role == "drafter":
        standin.models["base:latest"] = _model(standin, pair.target)
        assert f"in {quant}" in run("ollama", "attach", "base", "--drafter", pair.drafter).stderr
        assert not [each for each in standin.requests if "blobs" in each or "create" in each]


def _model(standin: Standin, target: Path) -> Model:
    return Model(standin.keep(target.read_bytes()))


def test_a_full_disk_is_told_before_the_first_byte(
    demo: Pair, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = 2 * demo.target.stat().st_size + demo.drafter.stat().st_size
    monkeypatch.setenv("OLLAMA_MODELS", str(standin.blobs.parent))
    free = peak - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    done = run("ollama", "create", "mine", demo.target.parent)
    assert done.exit_code == 1
    assert f"Ollama's store at {standin.blobs.parent} takes {peak / 1e9:.2f} GB" in done.stderr
    assert "OLLAMA_MODELS" in done.stderr
    assert standin.models == {}
    free = peak
    assert run("ollama", "create", "mine", demo.target.parent).exit_code == 0


def test_files_that_are_no_pair_are_refused(demo: Pair, tiny_f32: Pair, standin: Standin, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(f"FROM {demo.target}\nDRAFT {tiny_f32.drafter}\n")
    assert "was made for the target with fingerprint" in run("ollama", "create", "mine", tmp_path).stderr
    (tmp_path / "Modelfile").write_text(f"FROM {demo.target}\n")
    assert "names no drafter" in run("ollama", "create", "mine", tmp_path).stderr
    (tmp_path / "Modelfile").write_text(f"FROM {demo.target}\nDRAFT ./gone.gguf\n")
    assert "gone.gguf, which is not there" in run("ollama", "create", "mine", tmp_path).stderr
    assert standin.requests == []


def test_without_ollama_it_says_what_to_do(demo: Pair, standin: Standin, gone: Callable[[str], None]) -> None:
    standin.answers["version"] = {"version": "0.30.9"}
    for command in (["create", "mine", demo.target.parent], ["list"], ["doctor"], ["attach", "x"], ["detach", "x"]):
        old = run("ollama", *command)
        assert old.exit_code == 1
        assert re.search(r"is Ollama 0.30.9, and drafters of Gemma 4 need 0.30.10; update it: ", old.stderr)
    gone("server")
    stopped = run("ollama", "create", "mine", demo.target.parent)
    assert re.search(r"Ollama is not running at http://127.0.0.1:9; start it with ollama serve", stopped.stderr)
    gone("program")
    assert "https://ollama.com/download" in run("ollama", "list").stderr
    assert "ollama is not installed here; get it from" in run("ollama", "create", "mine", demo.target.parent).stderr
    assert standin.models == {}


def test_a_drafter_is_attached_and_detached(ollama: Ollama, demo: Pair) -> None:
    """In place: the target's file is shared, what was before stays by name, and comes back exactly."""
    ollama.bare("base", demo.target)
    before = stored(ollama.api, "base")
    assert before.drafter is None
    assert "it has no drafter; run: gemma-mtp ollama attach base" in run("ollama", "doctor", "base", "--no-run").stdout
    done = run("ollama", "attach", "base", "--drafter", demo.drafter)
    assert done.exit_code == 0, done.stderr
    assert told("base", done.stdout)
    after = stored(ollama.api, "base")
    assert after.target == before.target
    assert after.drafter is not None
    assert after.drafter.read_bytes() == demo.drafter.read_bytes()
    assert (after.renderer, after.parser, after.drafts) == ("gemma4-small", "gemma4", 4)
    assert "problem" not in run("ollama", "doctor", "base").stdout
    assert {"base:latest", "base:latest-plain"} == set(store.names(ollama.api))
    assert run("ollama", "attach", "base").exit_code == 0  # nothing to mend, and it still can be undone
    assert "as it was, without a drafter" in run("ollama", "detach", "base").stdout
    assert stored(ollama.api, "base") == before
    assert store.names(ollama.api) == ["base:latest"]
    assert "base has no drafter" in run("ollama", "detach", "base").stderr


def test_a_drafter_is_attached_under_another_name(ollama: Ollama, demo: Pair) -> None:
    """Made of the drafter's checkpoint, converted for this target; then the store's own is found by itself."""
    ollama.bare("base", demo.target)
    before = stored(ollama.api, "base")
    done = run("ollama", "attach", "base", "--as", "fast", "--drafter", FOLDERS[1], "--drafter-quant", "Q4_0")
    assert done.exit_code == 0, done.stderr
    assert told("fast", done.stdout)
    assert stored(ollama.api, "base") == before
    drafter = stored(ollama.api, "fast").drafter
    assert drafter is not None
    header = link.read_header(drafter)
    assert header.metadata[link.KEY_TARGET] == link.read_header(demo.target).metadata[link.KEY_SOURCE]
    assert {tensor.type.name for tensor in header.tensors.values()} >= {"Q4_0"}
    assert run("ollama", "attach", "base").exit_code == 0
    assert stored(ollama.api, "base").drafter == drafter
    listed = json.loads(run("ollama", "list", "--json").stdout)
    assert {each["name"]: each["drafts"] for each in listed} == {
        "fast:latest": 4, "base:latest": 4, "base:latest-plain": 0,
    }  # fmt: skip
    assert run("ollama", "detach", "fast").exit_code == 0
    assert stored(ollama.api, "fast").drafter is None


def test_a_drafter_of_others_is_linked(ollama: Ollama, demo: Pair, tmp_path: Path) -> None:
    header = link.read_header(demo.drafter)
    ours = {key for key in header.spans if key.startswith("mtp.") and key not in link_free(header)}
    kept = replace(header, spans={key: span for key, span in header.spans.items() if key not in ours})
    rewrite(kept, {}, tmp_path / "theirs.gguf", lambda done, total: None)
    ollama.bare("base", demo.target)
    done = run("ollama", "attach", "base", "--drafter", tmp_path / "theirs.gguf")
    assert done.exit_code == 0, done.stderr
    model = stored(ollama.api, "base")
    assert model.drafter is not None
    wanted = link.weights_identity(link.read_header(demo.target))
    assert link.read_header(model.drafter).metadata[link.KEY_TARGET] == wanted


def link_free(header: link.Header) -> set[str]:
    """Keys of the ordered head, which are no part of the link."""
    return {key for key in header.metadata if key.startswith("mtp.ordered.")}


def test_a_model_made_with_its_drafter_is_switched_off_and_on(ollama: Ollama, demo: Pair) -> None:
    assert run("ollama", "create", "mine", demo.target.parent).exit_code == 0
    assert "drafts off" in run("ollama", "detach", "mine").stdout
    done = run("ollama", "doctor", "mine")
    assert "its drafts are off" in done.stdout
    assert "drafts off, " in done.stdout
    assert told("mine", run("ollama", "attach", "mine").stdout)


def test_what_fails_leaves_nothing_behind(demo: Pair, standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    base = standin.models["base:latest"] = _model(standin, demo.target)
    monkeypatch.setattr(Answer, "create", lambda self, name, asked: self.say({"error": "no space left on device"}, 500))
    done = run("ollama", "attach", "base", "--drafter", demo.drafter)
    assert done.exit_code == 1
    assert "the disk of Ollama's store is full" in done.stderr
    assert standin.models == {"base:latest": base}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("qat", ["", "-qat-q4_0-unquantized"])
def test_the_published_drafter_is_known_by_the_shape(size: str, qat: str) -> None:
    shape = {"embedding_length": SIZES[size].n_embd, "block_count": SIZES[size].target["num_hidden_layers"]}
    values = {f"gemma4.{key}": value for key, value in shape.items()} | {"general.name": f"Mine {qat}"}
    header = link.Header(Path("t.gguf"), "gemma4", values, {})
    assert published(header) == f"google/gemma-4-{size}-it{qat}-assistant"


def test_another_targets_drafter_is_refused(demo: Pair, tiny_f32: Pair, standin: Standin) -> None:
    for pair, name in ((demo, "demo"), (tiny_f32, "tiny")):
        standin.models[f"{name}:latest"] = _model(standin, pair.target)
    done = run("ollama", "attach", "demo", "--drafter", tiny_f32.drafter)
    assert done.exit_code == 1
    assert "was made for the target with fingerprint" in done.stderr
    assert "is a 'gemma4' model, not a drafter" in run("ollama", "attach", "demo", "--drafter", demo.target).stderr
    assert not [each for each in standin.requests if "blobs" in each or "create" in each]
    assert "no drafter was published for a target of" in run("ollama", "attach", "tiny").stderr
    assert "model 'none:latest' not found" in run("ollama", "attach", "none").stderr


def test_a_second_drafter_takes_the_place_of_the_first(ollama: Ollama, demo: Pair, tmp_path: Path) -> None:
    other = convert_pair(*FOLDERS, tmp_path / "other", "Q8_0", "Q4_0").drafter
    ollama.bare("base", demo.target)
    for drafter in (demo.drafter, other):
        assert run("ollama", "attach", "base", "--drafter", drafter).exit_code == 0
        found = stored(ollama.api, "base").drafter
        assert found is not None
        assert found.read_bytes() == drafter.read_bytes()
    assert run("ollama", "detach", "base").exit_code == 0
    assert run("ollama", "create", "made", demo.target.parent).exit_code == 0
    done = run("ollama", "attach", "made", "--drafter", other)
    assert told("made", done.stdout)
    assert "made with another drafter, which stays in it unused" in done.stderr


def test_a_runner_with_another_drafter_is_ended(ollama: Ollama, demo: Pair, tmp_path: Path) -> None:
    """Ollama keeps a loaded drafter for every model of the same target, and does not look whose it is."""
    other = convert_pair(*FOLDERS, tmp_path / "other", "Q8_0", "Q4_0").drafter
    ollama.bare("base", demo.target)
    for name, drafter in (("one", demo.drafter), ("two", other)):
        done = run("ollama", "attach", "base", "--as", name, "--drafter", drafter)
        assert done.stderr == ""  # the drafter that answered is the model's own
        assert told(name, done.stdout)


def test_renderer_and_parser_are_mended(demo: Pair, standin: Standin) -> None:
    """Models that are pulled from elsewhere have neither, and the 12B of the library the small models' renderer."""
    assert run("ollama", "create", "mine", demo.target.parent).exit_code == 0
    for renderer, parser in (("", ""), ("gemma4", "gemma4"), ("gemma4-large", "")):
        standin.models["mine:latest"] = replace(standin.models["mine:latest"], renderer=renderer, parser=parser)
        said = run("ollama", "doctor", "mine", "--no-run").stdout
        assert "gemma4-small is right for its size; run: gemma-mtp ollama attach mine" in said
        assert ("it has no parser" in said) == (parser == "")
        assert run("ollama", "attach", "mine").exit_code == 0
        assert "problem" not in run("ollama", "doctor", "mine").stdout
    standin.models["mine:latest"] = replace(standin.models["mine:latest"], renderer="mine-own")
    assert "problem" not in run("ollama", "doctor", "mine").stdout


def test_the_doctor_looks_at_all_models(demo: Pair, standin: Standin) -> None:
    assert "no Gemma 4 model" in run("ollama", "doctor").stdout
    assert "no Gemma 4 model" in run("ollama", "list").stdout
    assert run("ollama", "create", "mine", demo.target.parent).exit_code == 0
    standin.models["base:latest"] = _model(standin, demo.target)
    standin.running.clear()
    said = json.loads(run("ollama", "doctor", "--json").stdout)
    assert said["version"] == "0.33.0"
    problems = {each["name"]: [found["mend"] for found in each["problems"]] for each in said["models"]}
    assert problems["mine:latest"] == []
    assert set(problems["base:latest"]) == {"gemma-mtp ollama attach base:latest"}
    assert standin.running == {}  # none was loaded for it
    tried = json.loads(run("ollama", "doctor", "mine", "--json").stdout)["models"][0]["trial"]
    attached = json.loads(run("ollama", "attach", "mine", "--json").stdout)
    assert (attached["name"], attached["trial"]) == ("mine", tried)
    counted, chat = standin.answers["completion"]["timings"], standin.answers["chat"]
    assert tried["acceptance"] == counted["draft_n_accepted"] / counted["draft_n"]
    assert tried["tokens_per_second"] == pytest.approx(chat["eval_count"] / chat["eval_duration"] * 1e9)
    assert tried["engine"] == "/lib/llama-server"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_command_lines_of_this_machine() -> None:
    ours = Path("/proc/self/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    assert ours in trial._command_lines()


def test_where_processes_are_not_seen_acceptance_is_not_told(
    demo: Pair, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_mtp.convert.ollama.trial._command_lines", lambda: iter(()))
    done = run("ollama", "create", "mine", demo.target.parent)
    assert "mine: drafts on, up to 4 a round, acceptance not to be seen from here" in done.stdout


def test_an_answer_of_one_token_has_no_rate(demo: Pair, standin: Standin) -> None:
    standin.answers["chat"] |= {"eval_count": 1, "eval_duration": 1000}
    done = run("ollama", "create", "mine", demo.target.parent)
    assert re.fullmatch(r"mine: drafts on, up to 4 a round, \d+% accepted, too short an answer to time\n", done.stdout)


def test_a_model_that_does_not_start_says_why(demo: Pair, standin: Standin) -> None:
    """The words of a real Ollama where a processor lacks an instruction, as the user reads them."""
    said = ("llama-server process has terminated: llama_init_from_model: failed to initialize the context: "
            "Gemma4Assistant requires ctx_other to be set")  # fmt: skip
    standin.answers["chat"] = {"error": said}
    done = run("ollama", "create", "mine", demo.target.parent)
    assert done.exit_code == 1
    assert "Ollama shows this line for any failure at the start" in done.stderr
    assert "mine is there, and did not answer" in done.stderr


def test_a_blob_that_cannot_be_read(demo: Pair, standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    standin.models["mine:latest"] = _model(standin, demo.target)
    shown = {**standin.show("mine:latest"), "modelfile": "FROM /somewhere/blobs/sha256-0\n"}
    monkeypatch.setattr(standin, "show", lambda _: shown)
    done = run("ollama", "attach", "mine", "--drafter", demo.drafter)
    assert "is not on this machine: it runs in a container or elsewhere" in done.stderr
