"""Commands are given names of Ollama's models, of which the store is read; no Ollama runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gemma_mtp.convert import Pair, link
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io import blobs
from gemma_mtp.convert.gguf_io.blobs import find_model, owner_of, parts_of
from gemma_mtp.convert.gguf_io.folder import contents
from gemma_mtp.convert.modelfile import files_of
from gguf import GGUFWriter
from gguf_files import finish
from ollamas import LIBRARY, keep, run


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gemma4", (*LIBRARY.split("/"), "gemma4", "latest")), ("gemma4:e4b", (*LIBRARY.split("/"), "gemma4", "e4b")),
        ("me/mine:1.2b", ("registry.ollama.ai", "me", "mine", "1.2b")),
        ("hf.co/unsloth/gemma-4:Q4_K_M", ("hf.co", "unsloth", "gemma-4", "Q4_K_M")),
        ("https://hf.co/a/b", ("hf.co", "a", "b", "latest")),
        ("localhost:5000/a/b", ("localhost:5000", "a", "b", "latest")),
        ("../a", None), ("/a/b", None), ("a/b/c/d", None), ("a b", None), ("", None), ("a:", None), ("./a", None),
    ],
)  # fmt: skip
def test_a_name_is_read_as_ollama_reads_it(name: str, parts: tuple[str, ...] | None) -> None:
    assert parts_of(name) == parts


def test_a_model_is_found_by_its_name(demo: Pair, store: Path) -> None:
    kept = keep(store, f"{LIBRARY}/gemma4/E4B", model=demo.target, draft=demo.drafter)
    other = keep(store, "hf.co/unsloth/gemma/Q8_0", model=demo.drafter)
    for name in ("gemma4:E4B", "Gemma4:e4b", "library/gemma4:e4b", "registry.ollama.ai/library/gemma4:e4b"):
        found = find_model(name)
        assert found is not None
        assert (found.target, found.drafter, found.projectors) == (kept["model"], kept["draft"], ())
    found = find_model("hf.co/unsloth/gemma:q8_0")
    assert found is not None
    assert (found.target, found.drafter) == (other["model"], None)
    assert find_model("gemma4") is find_model("hf.co/unsloth/gemma") is find_model("../gemma4") is None
    assert owner_of(kept["model"]) == "gemma4:E4B"
    assert owner_of(other["model"]) == "hf.co/unsloth/gemma:Q8_0"
    assert owner_of(demo.target) is None


def test_the_stores_are_those_that_ollama_takes(
    demo: Pair, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(blobs, "FOLDERS", ("~/.ollama/models", str(store)))
    kept = keep(store, f"{LIBRARY}/one/latest", model=demo.target)
    mine = keep(tmp_path / ".ollama" / "models", f"{LIBRARY}/two/latest", model=demo.target)
    for name, blob in (("one", kept["model"]), ("two", mine["model"])):
        found = find_model(name)
        assert found is not None
        assert found.target == blob


def test_commands_take_a_name(demo: Pair, store: Path) -> None:
    kept = keep(store, f"{LIBRARY}/mine/latest", model=demo.target, draft=demo.drafter)
    shown = json.loads(run("inspect", "mine", "--json").stdout)
    assert (shown["file"], shown["link"]["drafter"], shown["problem"]) == (
        str(kept["model"]), str(kept["draft"]), None,
    )  # fmt: skip
    checked = json.loads(run("verify", "mine:latest", "--json").stdout)
    assert checked["pairs"] == {str(kept["model"]): str(kept["draft"])}
    assert files_of(run("modelfile", "mine").stdout, store) == ([kept["model"]], [kept["draft"]])


def test_a_projector_of_the_model_is_taken(demo: Pair, store: Path, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    finish(writer)
    layers = {"model": demo.target, "projector": tmp_path / "mmproj.gguf", "draft": demo.drafter}
    kept = keep(store, f"{LIBRARY}/eyes/latest", **layers)
    models, _ = files_of(run("modelfile", "eyes").stdout, store)
    assert models == [kept["model"], kept["projector"]]


def test_a_file_of_the_name_comes_first(demo: Pair, store: Path) -> None:
    keep(store, f"{LIBRARY}/mine/latest", model=demo.drafter)
    shutil.copy(demo.target, "mine")
    assert json.loads(run("inspect", "mine", "--json").stdout)["file"] == "mine"


def test_what_is_neither_is_told_in_one_line(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = (["inspect"], ["verify"], ["modelfile"], ["run", "-p", "x"], ["chat"], ["serve"], ["bench"])
    for command in commands:
        done = run(*command, "nothing:1")
        assert done.exit_code == 1
        assert done.stderr == (
            "error: nothing:1 does not exist, neither as a file nor as a model of Ollama's store; see gemma-mtp ollama "
            "list.\n"
        )
    assert run("inspect", "out/x.gguf").stderr == "error: out/x.gguf does not exist; name a GGUF file.\n"
    monkeypatch.setattr(blobs, "_closed", lambda folder: folder == store)
    assert f"{store}, where Ollama keeps models, may not be read by this user" in run("inspect", "nothing").stderr


def test_a_drafter_that_is_not_the_models_own(demo: Pair, tiny_f32: Pair, store: Path) -> None:
    keep(store, f"{LIBRARY}/wrong/latest", model=demo.target, draft=tiny_f32.drafter)
    for command in ("verify", "modelfile"):
        assert "was made for the target with fingerprint" in run(command, "wrong").stderr
    assert "was made for the target" in json.loads(run("inspect", "wrong", "--json").stdout)["problem"]


def test_without_a_drafter_a_linked_one_of_the_store_is_taken(demo: Pair, store: Path) -> None:
    kept = keep(store, f"{LIBRARY}/bare/latest", model=demo.target)
    keep(store, f"{LIBRARY}/bare/latest-plain", model=demo.target)
    done = run("verify", "bare")
    assert done.stderr == (
        "error: Ollama's store has no linked drafter for bare:latest; run gemma-mtp ollama attach bare:latest, or name "
        "one with drafter= (--drafter).\n"
    )
    other = keep(store, f"{LIBRARY}/other/latest", model=demo.target, draft=demo.drafter)
    assert json.loads(run("verify", "bare", "--json").stdout)["pairs"] == {str(kept["model"]): str(other["draft"])}


def test_nothing_is_written_into_a_store(demo: Pair, store: Path, tmp_path: Path) -> None:
    """A blob's name is its hash, and Ollama removes what else lies there."""
    kept = keep(store, f"{LIBRARY}/mine/latest", model=demo.target, draft=demo.drafter)
    before = {path: path.read_bytes() for path in contents(store / "blobs")}
    for target, drafter, *rest in (
        ("mine", demo.drafter), (kept["model"], demo.drafter), (demo.target, kept["draft"], "--in-place"),
        ("mine", demo.drafter, "-o", store / "blobs" / "linked.gguf"),
    ):  # fmt: skip
        done = run("link", target, drafter, *rest)
        assert done.exit_code == 1
        assert "belongs to Ollama, and files there must stay as they are; run gemma-mtp ollama attach" in done.stderr
    assert {path: path.read_bytes() for path in contents(store / "blobs")} == before
    done = run("link", "mine", demo.drafter, "--force", "-o", tmp_path / "linked.gguf")
    assert done.stdout == f"{tmp_path / 'linked.gguf'} drafts for mine\n"
    assert f"gemma-mtp ollama attach mine:latest --drafter {tmp_path / 'linked.gguf'}" in done.stderr
    link.check(link.read_header(demo.target), link.read_header(tmp_path / "linked.gguf"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is damaged; get the model again with ollama pull mine"),
        ('{"layers": [{"mediaType": 1}]}', "is damaged"),
        ('{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]}', "is damaged"),
        (
            '{"layers": [{"mediaType": "application/vnd.ollama.image.tensor", "digest": "sha256:' + "0" * 64 + '"}]}',
            "mine holds no GGUF file",
        ),
        (
            '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:' + "0" * 64 + '"}]}',
            "is not on this machine",
        ),
    ],
)
def test_a_store_that_makes_no_sense(text: str, told: str, store: Path) -> None:
    manifest = store / "manifests" / LIBRARY / "mine" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(text)
    with pytest.raises(MtpError, match=told):
        find_model("mine")
