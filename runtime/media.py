"""Images and sounds in the messages of a chat: where they are, and their files.

A part is {"type": "image_url", "image_url": {"url": ...}} or {"type": "input_audio", "input_audio": {"data": ...}}, as
OpenAI's API and llama-server have them.
"""

from __future__ import annotations

import base64
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Types of parts, and where they say what it is: "data" is base64, "url" a URL or a path.
KINDS = {"image_url": ("url",), "input_audio": ("data", "url")}
SCHEMES = ("data:", "http:", "https:", "file:")
# What llama-server allows a file that it downloads.
MOST_BYTES, SECONDS = 10 << 20, 10.0


@dataclass(frozen=True)
class Medium:
    """An image or a sound of a message.

    Attributes:
        where: place in the messages and where it is from, for errors.
        kind: its part's type, of `KINDS`.
        data: its file.
    """

    where: str
    kind: str
    data: bytes


def message(text: str, images: Sequence[Path], sounds: Sequence[Path]) -> dict[str, Any]:
    """A user's message about files."""
    files = [("image_url", path) for path in images] + [("input_audio", path) for path in sounds]
    parts = [{"type": kind, kind: {"url": str(path.absolute())}} for kind, path in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def media_of(messages: Sequence[Mapping[str, Any]]) -> list[Medium]:
    """The images and sounds of messages, in their order, each fetched from wherever it is.

    Raises:
        ValueError: one of them is not there; names the part.
    """
    return [
        _fetched(f"messages[{place}] part {number}", part)
        for place, message in enumerate(messages)
        for number, part in _of(message)
    ]


def marked(messages: Sequence[Mapping[str, Any]], marker: str) -> list[Mapping[str, Any]]:
    """Messages of text alone: the parts of those with images or sounds are one text, as in llama-server.

    Args:
        messages: as OpenAI has them.
        marker: what stands for an image or a sound.
    """
    return [
        {**message, "content": _joined(message["content"], marker)} if _of(message) else message for message in messages
    ]


def _of(message: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """The parts of a message that are none of text, with their numbers."""
    content = message.get("content")
    parts = () if content is None or isinstance(content, str) else content
    return [(number, part) for number, part in enumerate(parts) if part["type"] in KINDS]


def _joined(parts: Sequence[Mapping[str, Any]], marker: str) -> str:
    """A line for each part, but beside images and sounds (`concat_content_parts` in llama.cpp's common/chat.cpp)."""
    text, beside = "", True
    for part in parts:
        media = part["type"] in KINDS
        text += marker if media else ("" if beside else "\n") + part["text"]
        beside = media or not text
    return text


def _fetched(where: str, part: Mapping[str, Any]) -> Medium:
    """What is in a part."""
    kind, key = part["type"], KINDS[part["type"]][0]
    given = part.get(kind)
    if isinstance(given, Mapping):
        key = next((name for name in KINDS[kind] if name in given), key)
        given = given.get(key)
    if not isinstance(given, str) or not given:
        raise ValueError(f'{where} has no {kind}; give {{"{key}": ...}} there.')
    where = f"{where} ({given if len(given) <= 80 else f'{given[:60]}...'})"
    most = MOST_BYTES if given.startswith(("http:", "https:")) else None
    try:
        if given.startswith(SCHEMES):
            with urllib.request.urlopen(given, timeout=SECONDS) as source:
                data = bytes(source.read(most and most + 1))
        else:
            data = base64.b64decode(given, validate=True) if key == "data" else Path(given).read_bytes()
    except (OSError, ValueError) as problem:
        wanted = "base64" if key == "data" else "a file's path, or a data: or http(s): URL"
        raise ValueError(f"{where} cannot be read: {problem}; give {wanted}.") from problem
    if most is not None and len(data) > most:
        raise ValueError(f"{where} has more than {most >> 20} MB; download it, and give its path.")
    return Medium(where, kind, data)
