"""Checkpoints from folders, from the Hugging Face cache, and from a hub on localhost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError, MtpWarning
from gemma_mtp.convert.hub import FIRST, fetch_checkpoint, official_drafter
from gemma_mtp.convert.naming import name_of, repository
from hub import Hub, run_against, serving
from safetensors.torch import load_file, save_file

TARGET, DRAFTER = "google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def headers(path: Path) -> int:
    """Bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.fixture
def sharded(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny target in shards, one with a header of many words."""
    folder = tmp_path / "served" / "sharded"
    shutil.copytree(tiny["target"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    placed = {name: parts[place % 3] for place, name in enumerate(sorted(weights))}
    for part in parts:
        words = {"notes": "x" * 2 * FIRST} if part == parts[0] else {}
        save_file({name: weights[name] for name in weights if placed[name] == part}, folder / part, words)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@pytest.fixture
def hub(tiny: dict[str, Path], tmp_path: Path) -> Iterator[Hub]:
    """The tiny pair under the names of an official one, with files beside it that nobody needs."""
    shutil.copytree(tiny["target"], tmp_path / "served" / "target")
    shutil.copytree(tiny["ordered"], tmp_path / "served" / "drafter")
    extra = tmp_path / "served" / "target"
    (extra / "original").mkdir()
    for name in ("pytorch_model.bin", "original/model.safetensors", "model.gguf"):
        (extra / name).write_bytes(b"not wanted")
    with serving({TARGET: extra, DRAFTER: tmp_path / "served" / "drafter"}) as server:
        yield server


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Runs a command against the hub, with a cache of its own."""
    return partial(run_against, hub, tmp_path)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_an_official_target_brings_its_drafter(run: Run, hub: Hub, tmp_path: Path) -> None:
    done = run("convert", TARGET, "--drafter", "auto", "-o", "out", "-q", "Q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile", "gemma-4-E2B-it-Q8_0.gguf", "gemma-4-E2B-it-assistant-Q8_0.gguf",
    ]  # fmt: skip
    target = tmp_path / "out" / "gemma-4-E2B-it-Q8_0.gguf"
    assert link.find_drafter(target) == tmp_path / "out" / "gemma-4-E2B-it-assistant-Q8_0.gguf"
    asked = {path for method, path, _ in hub.requests if method == "GET"}
    assert not [path for path in asked if "original" in path or path.endswith((".bin", ".gguf"))]

    hub.requests.clear()  # a second time nothing is transferred, and offline works
    done = run("convert", TARGET, "-o", "again", "-q", "Q8_0", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert (tmp_path / "again" / target.name).read_bytes() == target.read_bytes()

    snapshot = next((tmp_path / "hf" / "hub" / "models--google--gemma-4-E2B-it" / "snapshots").iterdir())
    assert repository(snapshot) == TARGET
    assert name_of(snapshot) == "gemma-4-E2B-it"
    assert official_drafter(str(snapshot)) == DRAFTER
    assert fetch_checkpoint(str(snapshot)) == snapshot


def test_a_dry_run_downloads_headers_only(run: Run, hub: Hub, sharded: Path, tmp_path: Path) -> None:
    """Of one file and of shards, with a header longer than what is asked for first; the plan is that of the folders."""
    names = "google/gemma-4-E4B-it", "google/gemma-4-E4B-it-assistant"
    hub.repositories |= {names[0]: sharded, names[1]: hub.repositories[DRAFTER]}
    for target, drafter in ((TARGET, DRAFTER), names):
        folders = hub.repositories[target], hub.repositories[drafter]
        command = "-o", "out", "-q", "Q8_0", "--dry-run", "--json", "--name", "x"
        hub.sent.clear()
        done = run("convert", target, *command)
        assert done.returncode == 0, done.stderr
        assert done.stdout == run("convert", *folders, *command).stdout
        sent = {name: size for name, size in hub.sent.items() if name.endswith(".safetensors")}
        weights = [path for folder in folders for path in folder.glob("*.safetensors")]
        assert sum(sent.values()) < sum(map(headers, weights)) + len(weights) * FIRST
        assert sum(path.stat().st_size for path in weights) > 4 * sum(sent.values())
        assert json.loads(done.stdout)["drafters"]["x-assistant-Q8_0.gguf"]["dropped"]
    assert max(map(headers, weights)) > FIRST
    assert not list((tmp_path / "hf" / "hub").rglob("*.safetensors"))
    for offline in (("resolve", TARGET), ("convert", TARGET, *command)):
        assert "HF_HUB_OFFLINE is set" in said(run(*offline, HF_HUB_OFFLINE="1"))

    assert run("convert", TARGET, "-o", "out").returncode == 0
    hub.sent.clear()  # what is in the cache is read there
    assert run("convert", TARGET, *command).returncode == 0
    assert run("convert", TARGET, *command, HF_HUB_OFFLINE="1").returncode == 0
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_a_dry_run_of_a_hub_without_ranges(run: Run, hub: Hub) -> None:
    hub.whole = True
    error = said(run("convert", TARGET, "-o", "out", "--dry-run"))
    assert "model.safetensors only as a whole" in error
    assert "leave --dry-run out" in error


def test_a_dry_run_names_outputs_after_the_repository(run: Run) -> None:
    done = run("convert", f"{TARGET}@main", DRAFTER, "-o", "out", "--dry-run", "--json")
    assert json.loads(done.stdout)["files"] == ["gemma-4-E2B-it-Q4_K_M.gguf", "gemma-4-E2B-it-assistant-Q8_0.gguf"]


def test_a_download_goes_on_where_it_stopped(run: Run, hub: Hub) -> None:
    """The connection drops in the middle of a file; what came before is not transferred again."""
    served = hub.repositories[TARGET] / "model.safetensors"
    served.write_bytes(os.urandom(24 << 20))
    hub.cut[served.name] = 12 << 20
    done = run("resolve", TARGET)
    assert done.returncode == 0, done.stderr
    ranges = [span for method, path, span in hub.requests if path.endswith(served.name) and method == "GET"]
    assert ranges == [None, f"bytes={10 << 20}-"]  # huggingface_hub writes 10 MiB at a time
    assert (Path(done.stdout.strip()) / served.name).read_bytes() == served.read_bytes()


def test_a_revision(run: Run) -> None:
    assert run("resolve", f"{TARGET}@v1").returncode == 0
    error = said(run("resolve", f"{TARGET}@v2"))
    assert "no revision 'v2'" in error


def test_a_gated_repository(run: Run, hub: Hub) -> None:
    hub.gated.add(TARGET)
    error = said(run("resolve", TARGET))
    assert f"{TARGET} is gated: accept its terms at https://huggingface.co/{TARGET}" in error
    assert run("resolve", TARGET, HF_TOKEN="let-me-in").returncode == 0


def test_a_repository_that_is_not_there(run: Run, tmp_path: Path) -> None:
    done = run("convert", "google/gemma-5", DRAFTER, "-o", "out")
    assert "no folder and no repository 'google/gemma-5'" in said(done)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_network(run: Run) -> None:
    assert "HF_HUB_OFFLINE is set" in said(run("resolve", TARGET, HF_HUB_OFFLINE="1"))
    assert "cannot be reached" in said(run("resolve", TARGET, HF_ENDPOINT="http://127.0.0.1:9"))


def test_a_hub_that_is_out_of_order(run: Run, hub: Hub) -> None:
    hub.broken = 418
    assert "answered 418" in said(run("resolve", TARGET))


def test_a_repository_without_safetensors(run: Run, hub: Hub) -> None:
    (hub.repositories[TARGET] / "model.safetensors").unlink()
    assert "no safetensors weights" in said(run("resolve", TARGET))


@pytest.mark.parametrize("source", ["nowhere", "./a/b/c", "a/../b", "/not/there", "-x/y z", "a/b/c", "google/..", ""])
def test_what_is_neither_folder_nor_repository(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MtpError, match="not a folder"):
        fetch_checkpoint(source or "x")


def test_drafters_of_official_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for size in ("E2B", "E4B", "12B", "26B-A4B", "31B"):
        for kind in ("it", "it-qat-q4_0-unquantized"):
            assert official_drafter(f"google/gemma-4-{size}-{kind}") == f"google/gemma-4-{size}-{kind}-assistant"
    assert official_drafter("google/gemma-4-31B-it@main") == "google/gemma-4-31B-it-assistant"
    (tmp_path / "gemma-4-12B-it").mkdir()
    assert official_drafter("gemma-4-12B-it") == "google/gemma-4-12B-it-assistant"
    (tmp_path / "mine").mkdir()
    for unknown in ("mine", "google/gemma-4-E2B", DRAFTER):
        with pytest.raises(MtpError, match=r"no drafter is known.* base_model.* pass the drafter\.$"):
            official_drafter(unknown)
    (tmp_path / "mine-assistant").mkdir()
    assert official_drafter("mine") == str(tmp_path / "mine-assistant")


def test_an_official_name_in_any_case_and_of_any_uploader(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name in ("google/gemma-4-e2b-it", "unsloth/gemma-4-E2B-it", "someone/Gemma-4-E2B-IT@main"):
        assert official_drafter(name) == DRAFTER
    qat = "unsloth/gemma-4-26b-a4b-it-QAT-q4_0-unquantized"
    assert official_drafter(qat) == "google/gemma-4-26B-A4B-it-qat-q4_0-unquantized-assistant"
    (tmp_path / "gemma-4-e2b-it").mkdir()
    assert official_drafter(str(tmp_path / "gemma-4-e2b-it")) == DRAFTER
    assert not recwarn


@pytest.mark.parametrize(
    ("base", "found"),
    [
        ("google/gemma-4-E2B-it", DRAFTER), ("- google/gemma-4-E2B-it", DRAFTER), ("unsloth/gemma-4-e2b-it", DRAFTER),
        ("https://huggingface.co/google/gemma-4-31B-it", "google/gemma-4-31B-it-assistant"),
        ("[someone/else, google/gemma-4-E2B-it]", DRAFTER), ("google/gemma-4-E2B", None), ("[1, null]", None),
        ("[google/gemma-4-E2B-it, google/gemma-4-E4B-it]", None), ("{a: b}", None), ("'': [", None),
    ],
)  # fmt: skip
def test_the_drafter_of_what_a_fine_tune_is_made_of(base: str, found: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "my-tune"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\ntags: [1, [2]]\nbase_model:\n  {base}\n---\nA model.\n")
    if found is None:
        with pytest.raises(MtpError, match="no drafter is known"):
            official_drafter(str(folder))
        return
    with pytest.warns(MtpWarning) as told:
        assert official_drafter(str(folder)) == found
    (warning,) = (str(each.message) for each in told)
    assert f"is made of {found.removesuffix('-assistant')}, whose drafter is taken" in warning
    assert "\n" not in warning


def test_a_fine_tune_brings_the_drafter_of_its_base(run: Run, hub: Hub, tmp_path: Path) -> None:
    """As a folder and as a repository; it is said once, and its own card decides."""
    tune = tmp_path / "tune"
    shutil.copytree(hub.repositories[TARGET], tune)
    (tune / "README.md").write_text(f"---\nbase_model: {TARGET}\n---\n")
    hub.repositories["me/tune"] = tune
    for source in (tune, "me/tune"):
        done = run("convert", source, "-o", f"out-{Path(source).name}-{source == tune}", "-q", "Q8_0")
        assert done.returncode == 0, done.stderr
        assert done.stderr == (
            f"warning: {source} is made of {TARGET}, whose drafter is taken, {DRAFTER}; a drafter trained for it would "
            "guess better: pass that if there is one.\n"
        )
    hub.repositories["me/other"] = hub.repositories[TARGET]
    assert "no drafter is known for me/other" in said(run("convert", "me/other", "-o", "out", "-q", "Q8_0"))
    assert "no repository 'me/none'" in said(run("convert", "me/none", "-o", "out", "-q", "Q8_0"))


def test_chat_templates_come_with_it(run: Run, hub: Hub, tmp_path: Path) -> None:
    """In every form that transformers knows."""
    folder = hub.repositories[TARGET]
    text = (folder / "chat_template.jinja").read_text()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert run("convert", TARGET, "-o", "out", "-q", "Q8_0").returncode == 0
    found = link.read_header(tmp_path / "out" / "gemma-4-E2B-it-Q8_0.gguf").metadata
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == (text, "tools")
    name = "someone/else"
    shutil.copytree(folder, tmp_path / "served" / "else", ignore=shutil.ignore_patterns("*.jinja"))
    (tmp_path / "served" / "else" / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    hub.repositories[name] = tmp_path / "served" / "else"
    assert run("convert", name, DRAFTER, "-o", "old", "-q", "Q8_0").returncode == 0
    assert link.read_header(tmp_path / "old" / "else-Q8_0.gguf").metadata["tokenizer.chat_template"] == "old"


def test_a_repository_of_one_file_beside_a_stale_index(run: Run, hub: Hub) -> None:
    """--dry-run sees what transformers would load."""
    folder = hub.repositories[TARGET]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.x"}}))
    done = run("convert", TARGET, "-o", "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left aside: model.safetensors.index.json") == 1


def test_a_head_that_only_the_weights_show(run: Run, hub: Hub) -> None:
    """A dry run, which downloads no weights, says what it takes for granted."""
    path = hub.repositories[TARGET] / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"] + 1
    save_file(weights, path)
    done = run("convert", TARGET, "-o", "out", "--dry-run")
    assert "'lm_head.weight' is taken for equal" in done.stderr
    assert run("convert", TARGET, "-o", "out").returncode == 0
    done = run("convert", TARGET, "-o", "out", "--dry-run")
    assert "'lm_head.weight' differs" in done.stderr


def test_a_repository_of_an_adapter(run: Run, hub: Hub) -> None:
    folder = hub.repositories[TARGET]
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-4-E2B-it"}))
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / "adapter_model.safetensors").write_bytes(b"")
        for more in ((), ("--dry-run",)):
            assert "holds an adapter of google/gemma-4-E2B-it" in said(run("convert", TARGET, "-o", "out", *more))
