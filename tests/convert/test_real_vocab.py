"""Gemma 4's own vocabulary through a conversion: cut into the same tokens as by Hugging Face's tokenizers."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import llama_cpp
import numpy as np
from gemma_mtp.convert import convert_pair, link
from real_vocab import make_folders, vocabulary
from tokenizers import Tokenizer

# First and last character of scripts and kinds of symbols.
SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x58A),
    (0x5D0, 0x5EA), (0x600, 0x6FF), (0x700, 0x74F), (0x900, 0x97F), (0x980, 0x9FF), (0xA00, 0xA7F), (0xB80, 0xBFF),
    (0xC00, 0xC7F), (0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF),
    (0x1100, 0x11FF),
    (0x1200, 0x137F), (0x13A0, 0x13F5), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x2000, 0x206F), (0x20A0, 0x20BF),
    (0x2100, 0x214F), (0x2190, 0x22FF), (0x2500, 0x27BF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xA000, 0xA48C), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x10330, 0x1034A), (0x12000, 0x12399),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0020, 0xE007F), (0x1, 0x1F), (0x7F, 0x9F),
]  # fmt: skip
GLUE = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "", "", "▁", ".", ", ", "'", "\u200d", "<", ">", "0", "12", "\u00a0"]
N_TEXTS = 5500


def texts(tokens: list[str], seed: int) -> list[str]:
    """Strings of one script or of several, of words of the vocabulary, and with special tokens among them."""
    draw = random.Random(seed)
    special = [token for token in tokens[:300] if token.startswith("<") and token.endswith(">")]
    found = []
    for place in range(N_TEXTS):
        kind = place % 5
        parts = []
        script = draw.choice(SCRIPTS)
        for _ in range(draw.randint(1, 12)):
            if kind == 0:
                parts.append("".join(chr(draw.randint(*script)) for _ in range(draw.randint(1, 12))))
            elif kind == 1:
                parts.append("".join(chr(draw.randint(*draw.choice(SCRIPTS))) for _ in range(draw.randint(1, 6))))
            elif kind == 2:
                parts.append(draw.choice(tokens).replace("▁", " "))
            elif kind == 3:
                parts.append(draw.choice(tokens) + draw.choice(special) * (draw.random() < 0.3))
            else:
                parts.append(
                    draw.choice(["a", "the", "The", "x = y", "def f(x):", "3.14", "Zürich", "東京", "Ünïcödé"])
                )
        found.append("".join(part + draw.choice(GLUE) for part in parts))
    return found


def test_texts_become_the_tokens_of_hugging_face(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "real")
    made = convert_pair(*folders, tmp_path / "out", "Q8_0")
    header, known = link.read_header(made.target), vocabulary()
    for key in ("tokens", "merges"):
        assert list(header.metadata[f"tokenizer.ggml.{key}"]) == list(known[f"tokenizer.ggml.{key}"]), key
    assert np.array_equal(header.metadata["tokenizer.ggml.token_type"], known["tokenizer.ggml.token_type"])
    theirs = Tokenizer.from_file(str(folders[0] / "tokenizer.json"))
    given = texts(list(header.vocabulary), seed=1)
    assert len(set(given)) >= 5000
    wanted = theirs.encode_batch(given, add_special_tokens=False)
    with closing(llama_cpp.Llama(str(made.target), vocab_only=True, verbose=False)) as llm:
        differ = [
            text for text, each in zip(given, wanted, strict=True)
            if llm.tokenize(text.encode(), add_bos=False, special=True) != each.ids
        ]  # fmt: skip
    assert differ == []
