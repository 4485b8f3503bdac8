"""Tokenizer, special tokens and chat template of a Hugging Face folder, as GGUF metadata.

The same keys and values as upstream's converter (conversion/gemma.py, `Gemma4Model.set_vocab`), without transformers.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.chat_template import chat_template
from gemma_mtp.convert.errors import MtpError, damaged, listed, warn
from gemma_mtp.convert.gguf_io.write import Array
from gemma_mtp.convert.json_file import read_json
from gemma_mtp.convert.special_tokens import Specials, read_settings, read_specials
from gguf import GGUFValueType, GGUFWriter, TokenType

# Special tokens that llama.cpp must print, so that its chat parser sees them.
VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip
# Tokens that end a turn and that llama.cpp knows by their text (src/llama-vocab.cpp, special_eog_ids).
KNOWN_ENDS = {"<eos>", "<turn|>", "<|tool_response>"}
SCORE = -1000.0
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
INNER_SPACE = chr(ord(" ") + 256)
GET_TOKENIZER = "download the tokenizer's files."
# How Gemma's tokenizer treats text before the BPE sees it, and other settings of the BPE that llama.cpp does not know.
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
USUAL: Mapping[str, Sequence[Any]] = {
    "normalizer": (NORMALIZER, {"type": "Sequence", "normalizers": [NORMALIZER]}),
    "pre_tokenizer": (None, SPLIT, {"type": "Sequence", "pretokenizers": [SPLIT]}),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}

logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells of every key it adds


@dataclass(frozen=True)
class Tokenizer:
    """tokenizer.json.

    `tokens` are in the order of their `ids`; those from `n_base` on were added to the vocabulary of the BPE, those from
    `n_used` on stand for rows of the embedding that no token has. `packed` are the same and `merges` the pairs that the
    BPE joins, as a GGUF file holds them. `added` are the tokens that a text is cut into before the BPE
    sees it, and whether they are special; `post_processor` says what is put around a text.
    """

    path: Path
    ids: Mapping[str, int]
    tokens: Sequence[str]
    n_base: int
    n_used: int
    packed: Array
    merges: Array
    added: Mapping[str, bool]
    post_processor: Any

    def padded(self, n_rows: int) -> Tokenizer:
        """The same with unused tokens up to a number of rows."""
        if n_rows == len(self.tokens):
            return self
        tokens = [*self.tokens, *(self._unused(place) for place in range(len(self.tokens), n_rows))]
        return replace(self, tokens=tokens, packed=Array.of(tokens))

    def _unused(self, place: int) -> str:
        """A name that no token has."""
        name = f"[PAD{place}]"
        while name in self.ids:
            name = f"[{name}]"
        return name


def read_tokenizer(path: Path, allowed: Collection[str] = ()) -> Tokenizer:
    """Read tokenizer.json.

    Args:
        path: of the file.
        allowed: keys that may be otherwise than in Gemma's tokenizer.

    Raises:
        MtpError: it is missing or damaged, is no BPE with byte fallback, leaves ids unused, or cuts text otherwise than
            llama.cpp does.
    """
    with no_collection():  # it makes a million objects, and nothing that could be collected
        parsed = read_json(path, GET_TOKENIZER)
    model = parsed.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise MtpError(f"{path} is not Gemma's tokenizer, BPE with byte fallback; download it again.")
    for key, usual in USUAL.items():
        if parsed.get(key, model.get(key)) not in usual and key not in allowed:
            raise MtpError(
                f"{path}: its {key} is not Gemma's, and llama.cpp would cut text into other tokens; take the "
                f"tokenizer.json of the model that this one was made of, or pass --allow-unknown {key}."
            )
    with damaged(path):
        added = parsed.get("added_tokens") or []
        ids = {**model["vocab"], **{each["content"]: int(each["id"]) for each in added}}
        tokens = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in tokens] != list(range(len(ids))):
            raise MtpError(f"{path}: token ids are not 0 to {len(ids) - 1} without gaps; download it again.")
        if len({token.partition("\0")[0] for token in tokens}) < len(tokens):
            raise MtpError(f"{path}: two tokens are the same up to a zero byte, where llama.cpp ends them; mend them.")
        merges = _merges(model.get("merges"))
        if not merges:
            raise MtpError(f"{path} has no merges, without which no text becomes tokens; download it again.")
        strips = [each["content"] for each in added if any(map(each.get, ("lstrip", "rstrip", "single_word")))]
        if strips:
            warn(f"{path}: spaces beside {listed(strips)} are kept; llama.cpp knows no lstrip, rstrip and single_word.")
        special = {each["content"]: bool(each.get("special")) for each in added}
        packed, post = Array.of(tokens), parsed.get("post_processor")
        return Tokenizer(path, ids, tokens, len(model["vocab"]), len(tokens), packed, Array.of(merges), special, post)


@contextmanager
def no_collection() -> Iterator[None]:
    """Let the garbage collector rest."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _merges(pairs: Any) -> list[str]:
    """Pairs of tokens with a space between them; a space within one is written as U+0120, as upstream does."""
    if not pairs or isinstance(pairs[0], str):  # as versions of tokenizers before 0.20 write them
        return list(pairs or ())
    merges = list(map(" ".join, pairs))
    for place, merge in enumerate(merges):
        if merge.count(" ") != 1:
            left, right = pairs[place]
            merges[place] = f"{left.replace(' ', INNER_SPACE)} {right.replace(' ', INNER_SPACE)}"
    return merges


def token_types(tokenizer: Tokenizer, specials: Specials) -> npt.NDArray[np.int32]:
    """The type of every token, [tokens]: what transformers takes for one token is one token in llama.cpp too."""
    kinds = np.full(len(tokenizer.tokens), TokenType.NORMAL, np.int32)
    kinds[tokenizer.n_base : tokenizer.n_used] = TokenType.USER_DEFINED
    kinds[tokenizer.n_used :] = TokenType.UNUSED
    for some, kind in (
        (specials.added, TokenType.USER_DEFINED),
        ([token for token, special in tokenizer.added.items() if not special], TokenType.USER_DEFINED),
        ([token for token, special in tokenizer.added.items() if special], TokenType.CONTROL),
        (specials.named, TokenType.CONTROL),
        ([token for token in tokenizer.ids if token.startswith("<0x") and BYTE.fullmatch(token)], TokenType.BYTE),
        (VISIBLE, TokenType.USER_DEFINED),
    ):
        kinds[[tokenizer.ids[token] for token in some if token in tokenizer.ids]] = kind
    return kinds


def other_ends(folder: Path, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> list[int]:
    """EOS ids of generation_config.json that llama.cpp would not find by itself; it has room for two."""
    ends = _within(folder, "eos_token_id", tokenizer, generation)
    others = [end for end in ends if tokenizer.tokens[end] not in KNOWN_ENDS]
    if len(others) > 2:
        lost = [f"{end} ({tokenizer.tokens[end]!r})" for end in others[2:]]
        warn(f"{folder / 'generation_config.json'}: a GGUF file has no place for more ends; left out: {listed(lost)}.")
    return others[:2]


def suppressed(folder: Path, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> list[int]:
    """Tokens that generation_config.json forbids (the 12B's: placeholders of images and audio)."""
    return _within(folder, "suppress_tokens", tokenizer, generation)


def _within(folder: Path, key: str, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> list[int]:
    """The ids of a list that are in the vocabulary; others are left out, and said."""
    given = generation.get(key) or []
    lost = [str(token) for token in given if token >= tokenizer.n_used]
    if lost:
        warn(f"{folder / 'generation_config.json'}: {key}: not in the vocabulary, and left out: {listed(lost)}.")
    return [token for token in given if token < tokenizer.n_used]


def add_tokenizer(
    writer: GGUFWriter, folder: Path, tokenizer: Tokenizer, generation: Mapping[str, Any], config: Mapping[str, Any],
    target: bool,
) -> None:  # fmt: skip
    """Add all metadata of the tokenizer to what is to be written.

    Suppressed tokens go into a target's file only: its sampler forbids them, whatever a drafter proposes.

    Args:
        writer: collects the metadata.
        folder: with tokenizer_config.json and the chat template.
        tokenizer: its tokenizer.json.
        generation: what is used of its generation_config.json, or {}.
        config: its config.json.
        target: whether the file is a target's.

    Raises:
        MtpError: a file is damaged.
    """
    keys, count = gguf.Keys.Tokenizer, len(tokenizer.tokens)
    settings = read_settings(folder)
    specials = read_specials(folder, settings, tokenizer.ids, tokenizer.post_processor, config)
    writer.add_tokenizer_model("gemma4")
    arrays = {
        keys.LIST: tokenizer.packed,
        keys.SCORES: Array.of(np.full(count, SCORE, np.float32)),
        keys.TOKEN_TYPE: Array.of(token_types(tokenizer, specials)),
        keys.MERGES: tokenizer.merges,
    }
    for key, array in arrays.items():
        writer.add_key_value(key, array, GGUFValueType.ARRAY)
    for part, token in specials.ids.items():
        getattr(writer, f"add_{part}_token_id")(token)
    for part, whether in specials.adds.items():
        if (add := getattr(writer, f"add_add_{part}_token", None)) is not None:  # a GGUF file has keys for three parts
            add(whether)
    template = chat_template(folder, settings)
    if template is not None:
        writer.add_chat_template(template)
    elif target:
        warn(f"{folder} has no chat template, as a base model has none; chats will be in Gemma 4's own format.")
    # llama.cpp reads two more ids that end a generation; upstream's converter does not look at this file.
    adders = (writer.add_eot_token_id, writer.add_eom_token_id)
    for end, add in zip(other_ends(folder, tokenizer, generation), adders, strict=False):
        add(end)
    if target:
        writer.add_array("tokenizer.ggml.suppress_tokens", suppressed(folder, tokenizer, generation))
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
