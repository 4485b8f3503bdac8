"""Where Ollama listens, and what its answers mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.modelfile import files_of
from gemma_mtp.convert.ollama.api import Client, OllamaError, address, numbers
from gemma_mtp.convert.ollama.store import parameters, tagged
from ollama_standin import Standin


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("", "http://127.0.0.1:11434"), ("0.0.0.0", "http://127.0.0.1:11434"), (":8080", "http://127.0.0.1:8080"),
        ("10.0.0.3:1234", "http://10.0.0.3:1234"), ("box", "http://box:11434"), ("http://box", "http://box:80"),
        ("https://box/", "https://box:443"), ("[::1]:99", "http://[::1]:99"), ("::1", "http://[::1]:11434"),
        (' "box:1" ', "http://box:1"),
    ],
)  # fmt: skip
def test_the_address_is_read_as_ollama_reads_it(setting: str, wanted: str) -> None:
    assert address(setting).geturl() == wanted


def test_an_address_that_is_none() -> None:
    with pytest.raises(MtpError, match="OLLAMA_HOST is 'box:port'"):
        address("box:port")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ('tensor "blk.0.attn_k.weight" size overflow', "convert with another -q"),
        ('split GGUF "x-00001-of-00003.gguf" has 1 shards, expected 3', "gemma-mtp modelfile"),
        ("llama-server process has terminated: signal: illegal instruction", "sapphirerapids"),
        ("context type MTP requested but model doesn't contain MTP layers", "its drafter is none"),
        ("requires ctx_other to be set", "any failure at the start"),
        ("failed to validate GGUF with llama-quantize without compatibility patches", "update it"),
        ('model "x" not found', "ollama list"),
        ("something else", "Ollama says: something else."),
    ],
)
def test_what_ollama_says_gets_a_next_step(said: str, meant: str) -> None:
    told = str(OllamaError(said, 500))
    assert said in told
    assert meant in told
    assert "\n" not in told


def test_a_line_that_ollama_repeats_is_told_once() -> None:
    said = "llama-server process has terminated: exit status 1\nerror loading model: x\nerror loading model: x"
    assert str(OllamaError(said, 500)).count("error loading model") == 1


def test_versions_compare_by_their_numbers() -> None:
    assert numbers("0.30.9") < numbers("0.30.10") < numbers("v0.33.0-rc2") < numbers("1.0")
    assert numbers("nightly") == ()


def test_what_answers_and_is_not_ollama(standin: Standin) -> None:
    for said in ("hello", {"hello": "world"}, None):
        standin.answers["version"] = said
        with pytest.raises(MtpError, match="is not Ollama; set OLLAMA_HOST"):
            Client().version()
    standin.answers["version"] = {"version": "0.0.0"}  # of a build without a version
    assert Client().version() == "0.0.0"


def test_a_name_has_a_tag() -> None:
    assert tagged("gemma4") == "gemma4:latest"
    assert tagged("hf.co/unsloth/gemma-4:Q4_K_M") == "hf.co/unsloth/gemma-4:Q4_K_M"
    assert tagged("localhost:5000/gemma4") == "localhost:5000/gemma4:latest"


def test_parameters_are_read_as_show_tells_them() -> None:
    text = (
        'stop                           "<turn|>"\nstop                           "x y"\ntop_p      0.95\nnum_ctx 8192'
    )
    assert parameters(text) == {"stop": ["<turn|>", "x y"], "top_p": 0.95, "num_ctx": 8192}


def test_files_of_a_modelfile() -> None:
    """Text in quotes over several lines names none, whatever it says."""
    text = (
        'FROM /a b/t.gguf\nDRAFT "/a b/d.gguf"\nFROM ./p.gguf\nTEMPLATE """\nFROM /x\nDRAFT /y\n"""\n'
        "# FROM /c\nPARAMETER stop FROM\n"
    )
    found = files_of(text, Path("/here"))
    assert found == ([Path("/a b/t.gguf"), Path("/here/p.gguf")], [Path("/a b/d.gguf")])
