"""Tokenizer, special tokens and chat template of a Hugging Face folder, as GGUF metadata.

The same keys and values as upstream's converter (conversion/gemma.py, `Gemma4Model.set_vocab`), without transformers.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gemma_mtp.convert.errors import MtpError, damaged
from gemma_mtp.convert.gguf_io.write import Array
from gemma_mtp.convert.json_file import read_json
from gguf import GGUFValueType, GGUFWriter, TokenType

# Special tokens that llama.cpp must print, so that its chat parser sees them.
VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip
# Tokens that end a turn and that llama.cpp knows by their text (src/llama-vocab.cpp, special_eog_ids).
KNOWN_ENDS = {"<eos>", "<turn|>", "<|tool_response>"}
SCORE = -1000.0
INNER_SPACE = chr(ord(" ") + 256)
ADVICE = "download the tokenizer's files."
# What tells of special tokens beside tokenizer.json.
READ_BY_GGUF = (
    "tokenizer_config.json", "config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip
# What transformers' GemmaTokenizer assumes where tokenizer_config.json is silent.
GEMMA_TOKENS = {f"{part}_token": f"<{part}>" for part in ("pad", "eos", "bos", "unk", "mask")}

logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells of every key it adds


@dataclass(frozen=True)
class Tokenizer:
    """tokenizer.json.

    `tokens` are in the order of their ids, those from `n_base` on were added to the vocabulary of the BPE; `packed` are
    the same and `merges` the pairs that it joins, as a GGUF file holds them. `rest` is what is said of special tokens.
    """

    path: Path
    tokens: Sequence[str]
    n_base: int
    packed: Array
    merges: Array | None
    rest: Mapping[str, Any]


def read_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json.

    Raises:
        MtpError: it is missing or damaged, is no BPE with byte fallback, or leaves ids unused.
    """
    parsed = read_json(path, ADVICE)
    model = parsed.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise MtpError(f"{path} is not Gemma's tokenizer, BPE with byte fallback; download it again.")
    with damaged(path):
        base: dict[str, int] = dict(model["vocab"])
        ids = {**base, **{added["content"]: int(added["id"]) for added in parsed.get("added_tokens", [])}}
        tokens = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in tokens] != list(range(len(ids))):
            raise MtpError(f"{path}: token ids are not 0 to {len(ids) - 1} without gaps; download it again.")
        merges = [_merge(each) for each in model.get("merges") or ()]
        rest: dict[str, Any] = {key: parsed[key] for key in ("added_tokens", "post_processor") if key in parsed}
        return Tokenizer(path, tokens, len(base), Array.of(tokens), Array.of(merges) if merges else None, rest)


def _merge(pair: str | Sequence[str]) -> str:
    """Two tokens with a space between them; a space within one is written as U+0120, as upstream does."""
    if isinstance(pair, str):
        return pair
    left, right = pair
    return f"{left.replace(' ', INNER_SPACE)} {right.replace(' ', INNER_SPACE)}"


def _named_specials(folder: Path) -> set[str]:
    """What transformers calls special tokens: those that tokenizer_config.json or its class gives a part to play."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path, ADVICE) if path.exists() else {}
    if str(settings.get("tokenizer_class", "")).startswith("Gemma"):
        settings = GEMMA_TOKENS | settings
    named = [value for key, value in settings.items() if key.endswith("_token")]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named += list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    return {value["content"] if isinstance(value, Mapping) else value for value in named if value}


def token_types(tokenizer: Tokenizer, specials: Container[str]) -> npt.NDArray[np.int32]:
    """The type of every token, [tokens]; `specials` are those with a part to play."""
    kinds = np.full(len(tokenizer.tokens), TokenType.NORMAL, np.int32)
    kinds[tokenizer.n_base :] = TokenType.USER_DEFINED
    for place, token in enumerate(tokenizer.tokens):
        if token in VISIBLE:
            kinds[place] = TokenType.USER_DEFINED
        elif token.startswith("<0x") and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            kinds[place] = TokenType.BYTE
        elif token in specials:
            kinds[place] = TokenType.CONTROL
    return kinds


def other_ends(folder: Path, tokens: Sequence[str], generation: Mapping[str, Any]) -> list[int]:
    """EOS ids of generation_config.json that llama.cpp would not find by itself."""
    named = generation.get("eos_token_id", [])
    ends = [named] if isinstance(named, int) else list(named)
    for end in ends:
        if not isinstance(end, int) or not 0 <= end < len(tokens):
            raise MtpError(f"{folder / 'generation_config.json'}: eos_token_id {end!r} is not in the vocabulary.")
    return [end for end in ends if tokens[end] not in KNOWN_ENDS]


def suppressed(folder: Path, generation: Mapping[str, Any]) -> list[int]:
    """Tokens that generation_config.json forbids (the 12B's: placeholders of images and audio)."""
    tokens = generation.get("suppress_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise MtpError(f"{folder / 'generation_config.json'}: suppress_tokens is no list of token ids.")
    return tokens


def add_tokenizer(
    writer: GGUFWriter, folder: Path, tokenizer: Tokenizer, generation: Mapping[str, Any], target: bool
) -> None:
    """Add all metadata of the tokenizer to what is to be written.

    Suppressed tokens go into a target's file only: its sampler forbids them, whatever a drafter proposes.

    Args:
        writer: collects the metadata.
        folder: with tokenizer_config.json and the chat template.
        tokenizer: its tokenizer.json.
        generation: its generation_config.json, or {}.
        target: whether the file is a target's.

    Raises:
        MtpError: a file is damaged, or names a token that is not there.
    """
    keys, count = gguf.Keys.Tokenizer, len(tokenizer.tokens)
    writer.add_tokenizer_model("gemma4")
    arrays = {
        keys.LIST: tokenizer.packed,
        keys.SCORES: Array.of(np.full(count, SCORE, np.float32)),
        keys.TOKEN_TYPE: Array.of(token_types(tokenizer, _named_specials(folder))),
        keys.MERGES: tokenizer.merges,
    }
    for key, array in arrays.items():
        if array is not None:
            writer.add_key_value(key, array, GGUFValueType.ARRAY)
    _special_tokens(folder, tokenizer.rest).add_to_gguf(writer, quiet=True)
    # llama.cpp reads two more ids that end a generation; upstream's converter does not look at this file.
    adders = (writer.add_eot_token_id, writer.add_eom_token_id)
    for end, add in zip(other_ends(folder, tokenizer.tokens, generation), adders, strict=False):
        add(end)
    if target:
        writer.add_array("tokenizer.ggml.suppress_tokens", suppressed(folder, generation))
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def _special_tokens(folder: Path, rest: Mapping[str, Any]) -> gguf.SpecialVocab:
    """The gguf package's reading of special tokens and chat template.

    It reads a folder, and would parse the whole tokenizer.json again: here it gets one without the vocabulary.
    """
    with tempfile.TemporaryDirectory(prefix="gemma-mtp-") as work:
        for name in READ_BY_GGUF:
            if (folder / name).exists():
                Path(work, name).symlink_to((folder / name).absolute())
        Path(work, "tokenizer.json").write_text(json.dumps({"added_tokens": [], **rest}), encoding="utf-8")
        return gguf.SpecialVocab(work)
