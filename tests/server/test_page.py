"""What a browser shows of `gemma-mtp serve`: llama.cpp's page, and ours where that was not built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, chromium
from encoders import make
from gemma_mtp.convert import Pair, convert_pair
from gemma_mtp.patches.ui import built_ui
from serves import Served, served
from tiny import make_drafter

PHONE: dict[str, Any] = {"width": 390, "height": 844, "phone": True}
SEND = "[...document.querySelectorAll('button')].find(button => button.innerText.trim() === 'Send')"
# llama.cpp's page asks for the server's own tools, which are off.
OFF = re.compile(r"status of 403 \(Forbidden\) \S+/tools")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium here; install it, or name it in CHROMIUM")
    with browser(program, tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def files() -> Path:
    """The files of llama.cpp's page."""
    found = built_ui()
    if found is None:
        pytest.skip("llama.cpp's page was not built; make ui builds it")
    return found


@pytest.fixture(scope="module")
def chatting(demo: Pair, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ("--", "--path", files, "--predict", 64, "--temp", 0)
    with served(demo.target, tmp_path_factory.mktemp("chatting"), *flags) as found:
        yield found


def wrong(page: Page) -> list[str]:
    return [each for each in page.errors if not OFF.search(each)]


def fits(page: Page) -> bool:
    """Whether nothing stands out of it at the side."""
    return bool(page.run("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat(scheme: str, page: Page, chatting: Served) -> None:
    """What is typed is answered as a request is, in the colors of the device."""
    page.open(chatting.root, scheme=scheme)
    page.until("document.querySelector('textarea')?.offsetWidth > 0")
    page.run("document.querySelector('textarea').focus()")
    page.type("import os")
    answer = chatting.chat("import os", max_tokens=64).json["choices"][0]["message"]["content"]
    word = max(re.findall(r"[a-z]+", answer), key=len)
    assert word not in "import os"
    page.until(f"document.body.innerText.includes({json.dumps(word)})")
    page.until(f"document.body.innerText.includes({json.dumps(chatting.facts['model'])})")
    assert page.run("document.documentElement.classList.contains('dark')") is (scheme == "dark")
    assert fits(page)
    assert wrong(page) == []


def test_a_picture_sent_from_a_phone(page: Page, files: Path, tmp_path: Path) -> None:
    """To a model that hears as well: there the page would show a microphone in place of the button to send."""
    target, drafter = make("E2B", tmp_path / "target"), make_drafter(tmp_path / "drafter", ordered=True)
    pair = convert_pair(target, drafter, tmp_path / "out", "F16", "F16", mmproj="F16")
    picture = next(files.glob("pwa-64x64.png"))
    with served(pair.target, tmp_path, "--", "--path", files, "--predict", 16) as found:
        page.open(found.root, **PHONE)
        page.until("document.querySelector('textarea')?.offsetWidth > 0")
        page.until("document.body.innerText.includes('Record audio')")
        page.attach(picture)
        page.run("document.querySelector('textarea').focus()")
        page.ask("Input.insertText", text="What is this?")
        page.until(f"{SEND}?.disabled === false")
        page.run(f"{SEND}.click()")
        page.until("/[0-9] tokens/.test(document.body.innerText)")
        assert page.run("document.querySelectorAll('img[src^=data]').length") > 0
        assert fits(page)
    assert wrong(page) == []


@pytest.mark.parametrize("device", [{}, PHONE], ids=["desktop", "phone"])
def test_where_it_was_not_built(device: dict[str, Any], page: Page, demo: Pair, tmp_path: Path) -> None:
    with served(demo.target, tmp_path) as found:
        page.open(found.root, **device)
        assert "gemma-mtp build --ui" in page.run("document.body.innerText")
        assert page.run("document.title") == "gemma-mtp"
        assert fits(page)
    assert page.errors == []
