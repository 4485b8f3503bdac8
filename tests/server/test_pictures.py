"""Requests with pictures in llama-server: the text after them is drafted and the same, and none of them ends it."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from children import GUARD, post, serving
from encoders import make, png, written
from gemma_mtp.convert import Pair, convert_pair
from prompts import PROMPT

SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
PNG = base64.b64encode(b"\x89PNG\r\n").decode()[:-1]


@pytest.fixture(scope="module")
def seeing(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random target with a vision encoder, its projector, and a drafter."""
    folder = make("26B", tmp_path_factory.mktemp("seeing") / "target")
    return convert_pair(folder, tiny["ordered"], tmp_path_factory.mktemp("files"), "F32", "F32", mmproj="F32")


@pytest.fixture(scope="module")
def server(seeing: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(seeing, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def running(pair: Pair, log: Path, *options: object) -> Any:
    projector = next(pair.target.parent.glob("*mmproj*"))
    files = "-m", pair.target, "--mmproj", projector
    return serving(SERVER, log, *files, "-c", 4096, "-np", 3, "--spec-draft-adaptive", "off", *options)


def chat(url: str, seed: int = 1, **more: Any) -> dict[str, Any]:
    """An answer to a question about a picture."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(seed)}"}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}]
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "seed": 7, **more}
    return post(f"{url}/v1/chat/completions", body)


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_text_after_a_picture_is_drafted_and_the_same(seeing: Pair, server: str, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"seed": 1, "temperature": 1.0}]
    drafted = [chat(server, **each) for each in asked]
    assert all(answer["timings"]["draft_n"] > 0 for answer in drafted)
    with running(seeing, tmp_path / "log", "--spec-draft-model", "none") as url:
        plain = [chat(url, **each) for each in asked]
    assert [texts(answer) for answer in drafted] == [texts(answer) for answer in plain]
    # as far as it pays, from the text on both sides of the picture too
    with running(seeing, tmp_path / "auto", "--spec-draft-adaptive", "on") as url:
        assert [texts(chat(url, **each)) for each in asked] == [texts(answer) for answer in plain]
    assert "draft_n" not in plain[0]["timings"]


def test_several_answers_to_a_picture(server: str) -> None:
    alone = texts(chat(server))
    assert texts(chat(server, n=3)) == alone * 3
    assert len(texts(chat(server, n=3, temperature=1.0))) == 3


LARGE = written(12_000, 1, 0, bytes(1501) * 12_000)  # 18 kB that say 432 MB


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", base64.b64decode(png(1))[:90], LARGE, b"RIFF\0\0\0\0WAVE", b"\xff\xfb" * 99, b"GIF89a\xff" * 99],
    ids=["nothing", "text", "part", "large", "sound", "noise", "animation"],
)
def test_what_is_no_picture_is_refused(data: bytes, server: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    with pytest.raises(urllib.error.HTTPError) as told:
        post(f"{server}/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 4})
    assert told.value.code == 400
    assert json.load(told.value)["error"]["type"] == "invalid_request_error"
    assert texts(chat(server))


def completed(url: str, *parts: str) -> dict[str, Any]:
    """An answer to a prompt of texts and, where a part is a picture, pictures."""
    with urllib.request.urlopen(f"{url}/props", timeout=GUARD) as told:
        marker = json.load(told)["media_marker"]
    pictures = [part for part in parts if part.startswith(PNG)]
    text = "".join(marker if part in pictures else part for part in parts)
    body = {"prompt": {"prompt_string": text, "multimodal_data": pictures}, "n_predict": 8, "temperature": 0}
    return post(f"{url}/completion", {**body, "ignore_eos": True, "cache_prompt": False})


def test_a_prompt_may_end_in_a_picture(seeing: Pair, server: str, tmp_path: Path) -> None:
    """Also while the slots beside it are busy, whose rows it could take."""
    prompts = [png(1)], ["See ", png(1)], ["See ", png(1), png(2)], ["See ", png(1), " and ", png(2), "."], ["import"]
    with running(seeing, tmp_path / "log", "--spec-draft-model", "none") as url:
        wanted = [completed(url, *parts)["content"] for parts in prompts]
    assert [completed(server, *parts)["content"] for parts in prompts] == wanted
    with ThreadPoolExecutor() as threads:
        together = list(threads.map(lambda parts: completed(server, *parts), prompts))
    assert all(answer["tokens_predicted"] == 8 for answer in together)


def test_each_of_several_answers_begins_with_its_own_draft(demo: Pair, tmp_path: Path) -> None:
    """Greedy answers are one, and so is what is accepted of their first drafts, which begin with the prompt's row."""

    def accepted(url: str, n: int) -> int:
        before = counted(url)
        body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "n": n, "cache_prompt": False, "ignore_eos": True}
        assert len(post(f"{url}/v1/completions", body)["choices"]) == n
        return counted(url) - before

    def counted(url: str) -> int:
        with urllib.request.urlopen(f"{url}/metrics", timeout=GUARD) as told:
            lines = told.read().decode().splitlines()
        return sum(int(line.split()[1]) for line in lines if "accepted_tokens_total" in line and line[0] != "#")

    options = "-c", 2048, "-np", 3, "--metrics", "--spec-draft-adaptive", "off"
    with serving(SERVER, tmp_path / "log", "-m", demo.target, *options) as url:
        alone = accepted(url, 1)
        assert alone > 0
        assert accepted(url, 3) == 3 * alone
