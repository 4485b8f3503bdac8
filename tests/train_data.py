"""Text and tokenizer of the demo pair: the standard library's sources and documentation, on any Python machine."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

VOCAB = 3072
SPECIAL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
# The parts that tokenizer_config.json of Gemma 4 gives to special tokens; transformers and llama.cpp go by them.
NAMED = {
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "sot_token": "<|turn>",
    "eot_token": "<turn|>", "soc_token": "<|channel>", "eoc_token": "<channel|>", "std_token": "<|tool>",
    "etd_token": "<tool|>", "stc_token": "<|tool_call>", "etc_token": "<tool_call|>", "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>", "think_token": "<|think|>", "escape_token": '<|"|>',
}  # fmt: skip
RESERVED = 107  # ids below are special or unused, as in Gemma's own vocabulary
SKIPPED = ("site-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "__pycache__", "turtledemo")


@dataclass(frozen=True)
class Texts:
    """Files by name, split so that no held-out file is trained on."""

    training: dict[str, str]
    held_out: dict[str, str]


def read_texts() -> Texts:
    """The standard library's modules without its tests and tables, and the texts behind `help()`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not set(name.split("/")) & set(SKIPPED) and name != "pydoc_data/topics.py":
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > 400:
                files[name] = text
    files |= {f"help/{name}": text for name, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 400}
    held = {name for name in files if hashlib.sha256(name.encode()).digest()[0] < 13}  # five percent
    return Texts(
        {name: text for name, text in files.items() if name not in held},
        {name: text for name, text in files.items() if name in held},
    )


def train_tokenizer(texts: Texts) -> Tokenizer:
    """A byte-fallback BPE of Gemma's form, its special tokens at Gemma's ids.

    Merges are learned inside words, so none crosses a line break, where llama.cpp's `gemma4` pre-tokenizer splits.
    """
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    words = Regex(r"\n+|▁{2,}(?=▁)|▁?[A-Za-z_]+|▁?[0-9]|▁?[^\sA-Za-z0-9_▁]+|▁+")
    learner.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    size = VOCAB - RESERVED - 256
    learner.train_from_iterator(
        texts.training.values(), trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=200)
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    names = [SPECIAL.get(i, f"<unused{i}>") for i in range(RESERVED)] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [piece for piece in pieces if piece not in names]
    names += [f"<unused{i}>" for i in range(len(names), VOCAB)]
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, text in sorted(SPECIAL.items())
    ]  # fmt: skip
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                    "invert": False,
                },
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
                },
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                    ],
                },
                "model": learned | {"vocab": {name: i for i, name in enumerate(names)}, "unk_token": "<unk>"},
            }
        )
    )


def encode_lines(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Token ids of each line with the line breaks after it: the ids of the whole text, in time linear in its length."""
    lines = re.findall(r"[^\n]*\n+|[^\n]+", text)
    return [line.ids for line in tokenizer.encode_batch(lines, add_special_tokens=False)]


class Sampler:
    """Draws training sequences: windows that begin at a line, some of them as a chat turn."""

    def __init__(self, tokenizer: Tokenizer, files: dict[str, str], length: int, seed: int) -> None:
        self.lines = [encode_lines(tokenizer, text) for text in files.values()]
        self.weights = [sum(map(len, lines)) for lines in self.lines]
        self.length = length
        self.random = random.Random(seed)
        self.words = [self._ids(tokenizer, text) for text in ASKED]
        self.turn = {name: tokenizer.encode(text, add_special_tokens=False).ids for name, text in TURNS.items()}

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def window(self, length: int) -> list[int]:
        """Consecutive lines of one file, at least `length` tokens unless the file ends."""
        lines = self.random.choices(self.lines, self.weights)[0]
        start = self.random.randrange(len(lines))
        ids: list[int] = []
        for line in lines[start:]:
            ids += line
            if len(ids) >= length:
                break
        return ids[:length]

    def sequence(self) -> list[int]:
        """One training sequence of `length` tokens, or shorter; begins with <bos>."""
        if self.random.random() > 0.15:
            ids = [2]
            while len(ids) < self.length:
                ids += [*self.window(self.length - len(ids)), 1, 2]
            return ids[: self.length]
        asked = self.window(self.random.randrange(20, 120))
        told = self.window(self.length)
        if self.random.random() < 0.8:  # mostly the file goes on in the answer
            cut = self.random.randrange(20, 120)
            asked, told = told[:cut], told[cut:]
        head = [2, *self.turn["user"], *self.random.choice(self.words), *asked, *self.turn["next"]]
        room = self.length - len(head) - len(self.turn["end"])
        return [*head, *told[: self.random.randrange(room // 2, room)], *self.turn["end"]][: self.length]

    def batch(self, size: int) -> list[list[int]]:
        """Sequences padded with <pad> to `length`."""
        return [ids + [0] * (self.length - len(ids)) for ids in (self.sequence() for _ in range(size))]


ASKED = ("Continue this file:\n", "Complete the code:\n", "Go on from here:\n", "What comes next?\n", "Write on:\n")
TURNS = {"user": "<|turn>user\n", "next": "<turn|>\n<|turn>model\n", "end": "<turn|>\n"}

# The answers that the pair was trained on have no empty thought before them, as it writes one: llama.cpp's grammars of
# tools and schemas leave room for a thought otherwise, and the pair loses itself there.
CHAT_TEMPLATE = (Path(__file__).resolve().parents[1] / "runtime" / "gemma4.jinja").read_text(encoding="utf-8")


def held_out_prompts(tokenizer: Tokenizer, texts: Texts, count: int) -> list[dict[str, Any]]:
    """Beginnings of lines runs from held-out files, 64 to 160 tokens, one file after the other."""
    chooser = random.Random(7)
    names = sorted(texts.held_out)
    prompts: list[dict[str, Any]] = []
    while len(prompts) < count:
        name = names[len(prompts) % len(names)]
        lines = encode_lines(tokenizer, texts.held_out[name])
        start, wanted, ids = chooser.randrange(max(1, len(lines) // 2)), chooser.randrange(64, 160), []
        for line in lines[start:]:
            ids += line
            if len(ids) >= wanted:
                break
        if len(ids) >= 48:
            prompts.append({"text": tokenizer.decode(ids[:wanted]), "file": name})
    return prompts
