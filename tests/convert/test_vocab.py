"""What a folder says of its tokens, beside transformers: types, ends, padded and grown vocabularies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from faulty import Folders, edit_config, edit_weights, refused
from gemma_mtp.convert import convert_pair, link, plan_pair
from gemma_mtp.convert.errors import MtpWarning, PairError
from gemma_mtp.runtime import Llama
from safetensors.torch import load_file
from tiny import VOCAB
from transformers import AutoTokenizer

EMBEDDING = "model.language_model.embed_tokens.weight"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
Edit = Callable[[dict[str, Any]], Any]


def edit(path: Path, change: Edit) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def converted(pair: Folders, out: Path, **options: Any) -> tuple[link.Header, llama_cpp.Llama]:
    """Header and tokenizer of the target's file."""
    made = convert_pair(*pair, out, "Q8_0", **options)
    return link.read_header(made.target), llama_cpp.Llama(str(made.target), vocab_only=True, verbose=False)


def generated(target: Path, prompt: list[int], **options: Any) -> tuple[list[int], int]:
    """40 tokens, and how many were drafted."""
    with closing(Llama(target, n_ctx=256, verbose=False, n_threads=1, **options)) as llm:
        tokens = [
            token for token, _ in zip(llm.generate(prompt, temp=0.0, repeat_penalty=1.0), range(40), strict=False)
        ]
        return tokens, llm.stats.drafted


def ids(llm: llama_cpp.Llama, text: str) -> list[int]:
    return list(llm.tokenize(text.encode(), add_bos=False, special=True))


def words(folder: Path, *places: int) -> list[str]:
    """Tokens of tokenizer.json that are words, by their places among those."""
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    found = sorted(token for token in vocab if token.isascii() and token.isalpha() and len(token) > 4)
    return [found[place] for place in places]


def as_added(folder: Path, token: str, special: bool) -> None:
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"].append(
            {"id": values["model"]["vocab"][token], "content": token, "special": special, **ADDED}
        )

    edit(folder / "tokenizer.json", change)


def test_added_tokens_within_the_vocabulary_are_one_token(pair: Folders, tmp_path: Path) -> None:
    one, other = words(pair[0], 3, 90)
    as_added(pair[0], one, special=True)
    as_added(pair[0], other, special=False)
    header, llm = converted(pair, tmp_path / "out")
    text = f"x{one}y{other}z"
    with closing(llm):
        assert ids(llm, text) == AutoTokenizer.from_pretrained(pair[0])(text, add_special_tokens=False)["input_ids"]
        types = header.metadata["tokenizer.ggml.token_type"]
        assert [types[ids(llm, token)[0]] for token in (one, other)] == [CONTROL, USER_DEFINED]


@pytest.mark.parametrize("given", [None, {}])
def test_without_tokenizer_config(given: dict[str, Any] | None, pair: Folders, tmp_path: Path) -> None:
    """Turns are one token, the template is there, and so are the ids of special tokens."""
    path = pair[0] / "tokenizer_config.json"
    path.unlink() if given is None else path.write_text(json.dumps(given))
    header, llm = converted(pair, tmp_path / "out")
    text = "<|turn>user\nhi<turn|>\n"
    with closing(llm):
        assert ids(llm, text) == AutoTokenizer.from_pretrained(pair[0])(text, add_special_tokens=False)["input_ids"]
    assert "<|turn>" in header.metadata["tokenizer.chat_template"]
    parts = ("bos", "eos", "unknown", "padding")
    assert [header.metadata[f"tokenizer.ggml.{part}_token_id"] for part in parts] == [2, 1, 3, 0]


@pytest.mark.parametrize(
    "name",
    [
        "extra_special_tokens",
        "additional_special_tokens",
        "model_specific_special_tokens",
        "added_tokens_decoder",
        "special_tokens_map.json",
    ],
)
def test_wherever_special_tokens_are_named(name: str, pair: Folders, tmp_path: Path) -> None:
    one, other, last = words(pair[0], 3, 90, 200)
    files: dict[str, Edit] = {
        "extra_special_tokens": lambda c: c.update(extra_special_tokens=[one, {"content": other}],
                                                   additional_special_tokens=[last]),
        "additional_special_tokens": lambda c: c.update(additional_special_tokens={"a": one, "b": other, "c": last}),
        "model_specific_special_tokens": lambda c: c.update(
            model_specific_special_tokens={"a_token": one, "b_token": other, "c_token": last}),
        "added_tokens_decoder": lambda c: c.update(
            added_tokens_decoder={n: {"content": each, "special": True} for n, each in enumerate((one, other, last))}),
    }  # fmt: skip
    if name in files:
        edit(pair[0] / "tokenizer_config.json", files[name])
    else:
        values = {"additional_special_tokens": [one, {"content": other, "lstrip": False}], "sep_token": last}
        (pair[0] / name).write_text(json.dumps(values))
    header, llm = converted(pair, tmp_path / "out")
    with closing(llm):
        for token in (one, other, last):
            assert header.metadata["tokenizer.ggml.token_type"][ids(llm, token)[0]] == CONTROL


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens"),
        ("tokenizer_config.json", {"additional_special_tokens": [["a"]]}, "additional_special_tokens"),
        ("tokenizer_config.json", {"eos_token": {}}, "eos_token"),
        ("special_tokens_map.json", [], "special_tokens_map.json"),
        ("generation_config.json", {"eos_token_id": [1, 99999]}, "eos_token_id: .* 99999"),
        ("generation_config.json", {"suppress_tokens": [5, VOCAB]}, f"suppress_tokens: .* {VOCAB}"),
        ("generation_config.json", {"eos_token_id": [1, 300, 300, 301, 302]}, "no place for more ends.* 302 "),
    ],
)
def test_what_is_no_token_is_left_out_and_said(
    file: str, change: Any, message: str, pair: Folders, tmp_path: Path
) -> None:
    path = pair[0] / file
    was = json.loads(path.read_text()) if path.exists() and isinstance(change, dict) else {}
    path.write_text(json.dumps(was | change if isinstance(change, dict) else change))
    with pytest.warns(MtpWarning, match=message) as said:
        convert_pair(*pair, tmp_path / "out", "Q8_0")
    assert len([each for each in said if str(path) in str(each.message)]) == 1


def test_an_end_that_a_trainer_put_behind_every_prompt(pair: Folders, tmp_path: Path) -> None:
    def ended(values: dict[str, Any]) -> None:
        processor = values["post_processor"]
        for key in ("single", "pair"):
            processor[key].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
        processor["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}

    edit(pair[0] / "tokenizer.json", ended)
    edit(pair[0] / "tokenizer_config.json", lambda c: c.update(add_eos_token=True))
    with pytest.warns(MtpWarning, match="ends every prompt with '<eos>'"):
        header, llm = converted(pair, tmp_path / "out")
    with closing(llm):
        assert header.metadata.get("tokenizer.ggml.add_eos_token", False) is False
        assert llm.tokenize(b"hi")[-1] != 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda t: t.update(normalizer=None), "normalizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
    ],
)
def test_text_that_is_cut_otherwise(change: Edit, message: str, pair: Folders, tmp_path: Path) -> None:
    for folder in pair:
        edit(folder / "tokenizer.json", change)
    refused(*pair, tmp_path / "out", "tokenizer.json", f"--allow-unknown {message}")
    plan_pair(*pair, allow_unknown=[message])


def test_a_tokenizer_without_merges(pair: Folders, tmp_path: Path) -> None:
    edit(pair[0] / "tokenizer.json", lambda t: t["model"].update(merges=[]))
    refused(*pair, tmp_path / "out", "tokenizer.json has no merges")


def grown(folder: Path, rows: int, *, drafter: bool = False) -> None:
    """More rows in the embedding, as `resize_token_embeddings` makes them."""

    def larger(weights: dict[str, torch.Tensor]) -> None:
        for name, value in list(weights.items()):
            if name.endswith(("embed_tokens.weight", "embed_tokens_per_layer.weight")):
                weights[name] = torch.cat([value, value[: rows - len(value)]])

    def sizes(config: dict[str, Any]) -> None:
        config["text_config"] |= {"vocab_size": rows, "vocab_size_per_layer_input": rows}

    edit_weights(folder, larger)
    edit_config(folder, sizes)


def test_a_padded_target_and_the_drafter_of_its_base(pair: Folders, tmp_path: Path) -> None:
    """Rows without a token get unused ones, in both files; drafts are as good as before, tokens the target's own."""
    before = convert_pair(*pair, tmp_path / "before", "Q8_0")
    grown(pair[0], VOCAB + 64)
    with pytest.warns(MtpWarning, match="64 rows") as said:
        made = convert_pair(*pair, tmp_path / "out", "Q8_0")
    assert len([each for each in said if each.category is MtpWarning]) == 2
    header, drafter = link.read_header(made.target), link.read_header(made.drafter)
    link.check(header, drafter)
    assert header.vocabulary[VOCAB - 1 :] == [header.vocabulary[VOCAB - 1], *(f"[PAD{VOCAB + n}]" for n in range(64))]
    assert set(header.metadata["tokenizer.ggml.token_type"][VOCAB:]) == {UNUSED}
    assert len(drafter.metadata[link.KEY_ORDERING]) == VOCAB
    prompt = [2, 10, 20, 30]
    assert generated(made.target, prompt, draft_length=3) == generated(before.target, prompt, draft_length=3)
    assert generated(made.target, prompt, drafter=None) == generated(before.target, prompt, drafter=None)


def with_new_tokens(folder: Path, *tokens: str) -> None:
    def change(values: dict[str, Any]) -> None:
        for place, token in enumerate(tokens):
            values["added_tokens"].append({"id": VOCAB + place, "content": token, "special": True, **ADDED})

    edit(folder / "tokenizer.json", change)


def test_a_token_with_the_name_of_an_unused_one(pair: Folders, tmp_path: Path) -> None:
    with_new_tokens(pair[0], f"[PAD{VOCAB + 1}]")
    grown(pair[0], VOCAB + 3)
    header, llm = converted(pair, tmp_path / "out", drafter_vocab="extend")
    llm.close()
    assert list(header.vocabulary[VOCAB:]) == [f"[PAD{VOCAB + 1}]", f"[[PAD{VOCAB + 1}]]", f"[PAD{VOCAB + 2}]"]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_tokens_that_were_added(
    copied: bool, ordered: bool, tiny: dict[str, Path], pair: Folders, tmp_path: Path
) -> None:
    """They are named as the reason; the drafter takes them on request, whichever tokenizer lies beside it."""
    if not ordered:
        shutil.rmtree(pair[1])
        shutil.copytree(tiny["dense"], pair[1])
    with_new_tokens(pair[0], "<tool_a>", "<tool_b>")
    grown(pair[0], VOCAB + 2)
    if copied:
        shutil.copy(pair[0] / "tokenizer.json", pair[1])
    refused(*pair, tmp_path / "out", "2 tokens", "<tool_a>, <tool_b>", "--drafter-vocab extend")
    made = convert_pair(*pair, tmp_path / "out", "Q8_0", "F32", drafter_vocab="extend")
    header, drafter = link.read_header(made.target), link.read_header(made.drafter)
    link.check(header, drafter)
    assert list(drafter.vocabulary[VOCAB:]) == ["<tool_a>", "<tool_b>"]
    raw = made.drafter.read_bytes()
    tensor = drafter.tensors["token_embd.weight"]
    rows = torch.frombuffer(bytearray(raw[tensor.offset : tensor.offset + tensor.size]), dtype=torch.float32)
    rows = rows.reshape(VOCAB + 2, -1)
    name = next(name for name in load_file(pair[1] / "model.safetensors") if name.endswith("embed_tokens.weight"))
    assert torch.equal(rows[:VOCAB], load_file(pair[1] / "model.safetensors")[name].float())
    ours = load_file(pair[0] / "model.safetensors")[EMBEDDING].float()
    fitted = torch.linalg.lstsq(ours[:VOCAB].double(), rows[:VOCAB].double()).solution
    assert torch.allclose(rows[VOCAB:].double(), ours[VOCAB:].double() @ fitted, atol=2e-3)
    prompt = [2, VOCAB, 20, VOCAB + 1]
    tokens, drafted = generated(made.target, prompt, draft_length=3)
    assert drafted > 0
    assert tokens == generated(made.target, prompt, drafter=None)[0]


def test_unused_tokens_that_got_names(pair: Folders, tmp_path: Path) -> None:
    """A fine-tune that names them has its base's drafter still."""
    old = words(pair[0], 7)[0]

    def renamed(to: str) -> Edit:
        def change(values: dict[str, Any]) -> None:
            vocab = values["model"]["vocab"]
            values["model"]["vocab"] = {to if token == old else token: place for token, place in vocab.items()}
            values["model"]["merges"] = [each for each in values["model"]["merges"] if old not in "".join(each)]

        return change

    edit(pair[0] / "tokenizer.json", renamed("<my_tool>"))
    refused(*pair, tmp_path / "out", "'<my_tool>' in", f"'{old}' in", "published for this target")
    with pytest.raises(PairError, match="my_tool"):
        plan_pair(*pair, drafter_vocab="extend")  # it was a word
    edit(pair[1] / "tokenizer.json", renamed("<unused9999>"))
    refused(*pair, tmp_path / "out", "'<unused9999>' in", "--drafter-vocab extend")
    made = convert_pair(*pair, tmp_path / "out", "Q8_0", drafter_vocab="extend")
    link.check(link.read_header(made.target), link.read_header(made.drafter))


def test_a_token_without_a_row(pair: Folders, tmp_path: Path) -> None:
    """In the embedding, or in that of the layers, where transformers fails at the token."""
    with_new_tokens(pair[0], "<forgotten>")
    refused(*pair, tmp_path / "out", "'<forgotten>'", "resize_token_embeddings")
    grown(pair[0], VOCAB + 1)
    name = EMBEDDING.replace("tokens", "tokens_per_layer")
    edit_weights(pair[0], lambda weights: weights.update({name: weights[name][:VOCAB].clone()}))
    refused(*pair, tmp_path / "out", "'<forgotten>'", name, f"{VOCAB} rows", "resize_token_embeddings")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights, name: weights.pop(name), ("lacks token_embd.weight",)),
        (
            lambda weights, name: weights.update({name: weights[name][:-5].contiguous()}),
            (f"{VOCAB - 5 + 64}", f"{VOCAB + 64}"),
        ),
    ],
)
def test_a_damaged_drafter_for_a_padded_target(
    change: Callable[[dict[str, torch.Tensor], str], Any], words: tuple[str, ...], pair: Folders, tmp_path: Path
) -> None:
    grown(pair[0], VOCAB + 64)
    name = next(name for name in load_file(pair[1] / "model.safetensors") if name.endswith("embed_tokens.weight"))
    edit_weights(pair[1], lambda weights: change(weights, name))
    refused(*pair, tmp_path / "out", *words)
