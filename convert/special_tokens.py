"""The parts that tokens play, from the several files that may say so."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError, damaged, warn
from gemma_mtp.convert.json_file import read_json

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
# Parts that a GGUF file has a key for, in the order of the gguf package (`SpecialVocab`).
PARTS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What transformers' GemmaTokenizer assumes where tokenizer_config.json is silent.
GEMMA_TOKENS = {f"{part}_token": f"<{part}>" for part in ("pad", "eos", "bos", "unk", "mask")}
# Keys that hold several tokens, as a list or by name.
SEVERAL = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
class Specials:
    """`named`: tokens with a part to play; `added`: others that are always one token. `ids`: by the parts of `PARTS`;
    `adds`: whether a prompt gets the token of a part."""

    named: frozenset[str]
    added: frozenset[str]
    ids: Mapping[str, int]
    adds: Mapping[str, bool]


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or {}.

    Raises:
        MtpError: it is not JSON, or no object.
    """
    path = folder / CONFIG
    return read_json(path) if path.exists() else {}


def read_specials(
    folder: Path, settings: Mapping[str, Any], ids: Mapping[str, int], post_processor: Any, config: Mapping[str, Any]
) -> Specials:
    """What the files of a folder say of special tokens; what is of another kind than expected is left out, and said.

    Args:
        folder: of the checkpoint.
        settings: its tokenizer_config.json, or {}.
        ids: of all tokens.
        post_processor: of tokenizer.json.
        config: config.json.

    Raises:
        MtpError: post_processor makes no sense.
    """
    sources = [settings]
    if "added_tokens_decoder" not in settings:  # files of transformers 4 have the one or the other
        sources.insert(0, _map(folder))
    gemma = not settings or str(settings.get("tokenizer_class", "")).startswith("Gemma")
    named = {text for text in GEMMA_TOKENS.values() if gemma and text in ids}
    named |= {text for each in sources for text in _named(folder / CONFIG, each)}
    decoder = settings.get("added_tokens_decoder")
    described = [each for each in (decoder.values() if isinstance(decoder, dict) else ()) if isinstance(each, dict)]
    named |= {text for each in described if each.get("special") and (text := _content(each))}
    added = {text for each in described if (text := _content(each))} - named
    parts = {part: text for each in sources for part in PARTS if (text := _content(each.get(f"{part}_token")))}
    if not settings:  # with one, transformers' defaults are not written, as upstream does not
        parts = {part: text for part in PARTS if (text := GEMMA_TOKENS.get(f"{part}_token")) in ids and text} | parts
    known = {part: ids[parts[part]] for part in PARTS if parts.get(part) in ids}
    for part in PARTS:
        value = _config_id(config, part)
        if part not in known and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(ids):
            known[part] = value
    with damaged(folder / "tokenizer.json"):
        adds = _adds(post_processor, parts.get("bos"), parts.get("sep"), parts.get("eos"))
    adds |= {part: value for part in PARTS if isinstance(value := settings.get(f"add_{part}_token"), bool)}
    if adds.get("eos"):
        warn(
            f"{folder}: the tokenizer ends every prompt with {parts.get('eos')!r}, as for a training; this is left out."
        )
        del adds["eos"]
    return Specials(frozenset(named), frozenset(added), known, adds)


def _map(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json, or {}."""
    try:
        return read_json(folder / MAP) if (folder / MAP).exists() else {}
    except MtpError as problem:
        warn(f"left out: {problem}")
        return {}


def _named(path: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """All tokens that some settings name: one by one, in lists, or by name."""
    lost = []
    for key, value in settings.items():
        several = key in SEVERAL
        if value is None or not (several or (key.endswith("_token") and not key.startswith("add_"))):
            continue
        given: Collection[Any] = [value]
        if several:
            given = value.values() if isinstance(value, dict) else value if isinstance(value, list) else given
        texts = [_content(each) for each in given]
        yield from (text for text in texts if text)
        if None in texts:
            lost.append(key)
    if lost:
        warn(f"{path}: no token, and left out: {', '.join(lost)}.")


def _content(value: Any) -> str | None:
    """The text of a token, which may be described by an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _config_id(config: Mapping[str, Any], part: str) -> Any:
    """An id of config.json, at its root or of its text model."""
    inner = config.get("text_config")
    found = config.get(f"{part}_token_id")
    return inner.get(f"{part}_token_id") if found is None and isinstance(inner, dict) else found


def _adds(processor: Any, bos: str | None, sep: str | None, eos: str | None) -> dict[str, bool]:
    """What a post-processor puts around a text, read as the gguf package does (gguf/vocab.py, `SpecialVocab`)."""
    found: dict[str, bool] = {}
    for each in (processor.get("processors") or [processor]) if processor else []:
        if each.get("type") != "TemplateProcessing":
            continue
        single, pair = (_specials_of(each.get(key) or []) for key in ("single", "pair"))
        first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
        if first:
            found["bos"] = first == bos
        if last:
            found["eos"] = last == eos
        inner = pair[int(bool(first) and pair[:1] == [first]) : len(pair) - int(bool(last) and pair[-1:] == [last])]
        between = inner[1:-1]
        if between and inner[0] is None and inner[-1] is None:
            found["sep"] = bool(
                (between[0] in (sep, eos) and not last) or (len(between) == 2 and between[1] in (sep, eos))
            )
    return found


def _specials_of(template: Sequence[Any]) -> list[str | None]:
    """The special token at each place of a template, None where a text stands."""
    return [place["SpecialToken"]["id"] if "SpecialToken" in place else None for place in template]
