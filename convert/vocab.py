"""Tokenizer, special tokens and chat template of a Hugging Face folder, as GGUF metadata.

The same keys and values as upstream's converter (conversion/gemma.py, `Gemma4Model.set_vocab`), without transformers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gemma_mtp.convert.errors import MtpError, damaged
from gguf import GGUFWriter, TokenType

# Special tokens that llama.cpp must print, so that its chat parser sees them.
VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip
# Tokens that end a turn and that llama.cpp knows by their text (src/llama-vocab.cpp, special_eog_ids).
KNOWN_ENDS = {"<eos>", "<turn|>", "<|tool_response>"}
SCORE = -1000.0
# What transformers' GemmaTokenizer assumes where tokenizer_config.json is silent.
GEMMA_TOKENS = {f"{part}_token": f"<{part}>" for part in ("pad", "eos", "bos", "unk", "mask")}

logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells of every key it adds


def _read(path: Path) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise MtpError(f"{path}: {problem.strerror}; download the tokenizer's files.") from None
    except (ValueError, RecursionError) as problem:
        raise MtpError(f"{path} is not JSON ({problem}); download it again.") from None
    return parsed


def _named_specials(folder: Path) -> set[str]:
    """What transformers calls special tokens: those that tokenizer_config.json or its class gives a part to play."""
    path = folder / "tokenizer_config.json"
    settings = _read(path) if path.exists() else {}
    if str(settings.get("tokenizer_class", "")).startswith("Gemma"):
        settings = GEMMA_TOKENS | settings
    named = [value for key, value in settings.items() if key.endswith("_token")]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named += list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    return {value["content"] if isinstance(value, Mapping) else value for value in named if value}


class Vocabulary:
    """The tokens of a folder in the order of their ids, with their types.

    Raises:
        MtpError: tokenizer.json is missing or damaged, is no BPE with byte fallback, or leaves ids unused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        parsed = _read(path)
        model = parsed.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
            raise MtpError(f"{path} is not Gemma's tokenizer, BPE with byte fallback; download it again.")
        with damaged(path):
            base: dict[str, int] = dict(model["vocab"])
            ids = {**base, **{added["content"]: int(added["id"]) for added in parsed.get("added_tokens", [])}}
        self.tokens = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in self.tokens] != list(range(len(ids))):
            raise MtpError(f"{path}: token ids are not 0 to {len(ids) - 1} without gaps; download it again.")
        self.ids = ids
        specials = _named_specials(folder)
        self.types = [self._type(token, specials, ids[token] >= len(base)) for token in self.tokens]

    @staticmethod
    def _type(token: str, specials: set[str], added: bool) -> TokenType:
        if token in VISIBLE:
            return TokenType.USER_DEFINED
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return TokenType.BYTE
        if token in specials:
            return TokenType.CONTROL
        return TokenType.USER_DEFINED if added else TokenType.NORMAL

    def other_ends(self, generation: Mapping[str, Any]) -> list[int]:
        """EOS ids of generation_config.json that llama.cpp would not find by itself."""
        named = generation.get("eos_token_id", [])
        ends = [named] if isinstance(named, int) else list(named)
        for end in ends:
            if not isinstance(end, int) or not 0 <= end < len(self.tokens):
                raise MtpError(
                    f"{self.folder / 'generation_config.json'}: eos_token_id {end!r} is not in the vocabulary."
                )
        return [end for end in ends if self.tokens[end] not in KNOWN_ENDS]

    def suppressed(self, generation: Mapping[str, Any]) -> list[int]:
        """Tokens that generation_config.json forbids (the 12B's: placeholders of images and audio)."""
        tokens = generation.get("suppress_tokens") or []
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise MtpError(f"{self.folder / 'generation_config.json'}: suppress_tokens is no list of token ids.")
        return tokens

    def write(self, writer: GGUFWriter, generation: Mapping[str, Any], target: bool) -> None:
        """Add all metadata of the tokenizer to a GGUF file that is being written.

        Suppressed tokens go into a target's file only: its sampler forbids them, whatever a drafter proposes.
        """
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list([token.encode() for token in self.tokens])
        writer.add_token_scores([SCORE] * len(self.tokens))
        writer.add_token_types(self.types)
        special = gguf.SpecialVocab(self.folder, load_merges=True)
        special.add_to_gguf(writer, quiet=True)
        # llama.cpp reads two more ids that end a generation; upstream's converter does not look at this file.
        adders = (writer.add_eot_token_id, writer.add_eom_token_id)
        for end, add in zip(self.other_ends(generation), adders, strict=False):
            add(end)
        if target:
            writer.add_array("tokenizer.ggml.suppress_tokens", self.suppressed(generation))
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(True)
