"""Folders as people have them: the logits of their files are those of transformers on the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faulty import Folders, edit_config, edit_weights, experts_apart
from gemma_mtp.convert import convert_pair
from gemma_mtp.convert.errors import MtpWarning
from reference import CLOSE, Logits, by_llama_cpp, by_transformers, furthest
from safetensors.torch import save_model
from tiny import VOCAB, edit_json, make_drafter, save
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.gemma4_unified import Gemma4UnifiedForCausalLM

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]
Sizes = dict[str, tuple[Path, Path]]
START, HEAD = "model.language_model.", "lm_head.weight"
EMBEDDING = f"{START}embed_tokens.weight"
# Another model's logits are this far away at least.
FAR = 10 * CLOSE
PADDING = 64

pytestmark = pytest.mark.filterwarnings("ignore::gemma_mtp.convert.errors.MtpWarning")


class Folder(NamedTuple):
    """What is done to a folder, and whether it makes another model of it."""

    change: Callable[[Path], object]
    moves: bool = False


def of_config(change: Callable[[Config], object]) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, change)


def with_text(change: Callable[[Config], object]) -> Callable[[Path], object]:
    return of_config(lambda config: change(config["text_config"]))


def another_head(folder: Path) -> None:
    torch.manual_seed(4)
    noise = torch.randn(VOCAB, 256).mul_(0.05)
    edit_weights(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING] + noise.bfloat16()}))


def with_head(**tie: bool | None) -> Callable[[Path], object]:
    """Another output matrix; tie_word_embeddings of the outer and of the text configuration, absent if not given."""

    def change(config: Config) -> None:
        for place, part in (("outer", config), ("inner", config["text_config"])):
            part.pop("tie_word_embeddings", None)
            part.update({"tie_word_embeddings": tie[place]} if place in tie else {})

    def both(folder: Path) -> None:
        another_head(folder)
        edit_config(folder, change)

    return both


def padded(*parts: str) -> Callable[[Path], object]:
    """More rows than tokens in some of the embeddings."""

    def longer(weights: Weights) -> None:
        for part in parts:
            rows = weights[f"{START}{part}.weight"]
            weights[f"{START}{part}.weight"] = torch.cat([rows, rows[:PADDING] / 2])

    sizes = {"embed_tokens": "vocab_size", "embed_tokens_per_layer": "vocab_size_per_layer_input"}

    def both(folder: Path) -> None:
        edit_weights(folder, longer)
        with_text(lambda text: text.update({sizes[part]: VOCAB + PADDING for part in parts}))(folder)

    return both


def saved_again(change: Callable[[Any], Any] = lambda model: model, **options: Any) -> Callable[[Path], object]:
    """What transformers makes of the folder when it loads and saves it."""

    def resave(folder: Path) -> None:
        model = change(AutoModelForCausalLM.from_pretrained(folder))
        for part in ("model.safetensors", "config.json"):
            (folder / part).unlink()
        model.save_pretrained(folder, **options)

    return resave


def text_only(model: Any) -> Any:
    alone = Gemma4ForCausalLM(model.config.text_config).bfloat16()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.tie_weights()
    return alone


def whole_configuration(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def one_name_of_two(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), {"format": "pt"})


def renamed(folder: Path, start: str) -> None:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(START)]:
            weights[start + name.removeprefix(START)] = weights.pop(name)

    edit_weights(folder, change)


def of_transformers_4(folder: Path, start: str = "language_model.") -> None:
    """Names and keys as transformers 4 wrote them for Gemma 3; of the latter Gemma 4's class reads none."""

    def text(values: Config) -> None:
        for key in ("rope_parameters", "per_layer_config", "dtype", "layer_types"):
            values.pop(key, None)
        values.update(
            rope_theta=5000.0, rope_local_base_freq=777.0, sliding_window_pattern=2, torch_dtype="bfloat16",
            query_pre_attn_scalar=256, cache_implementation="hybrid", global_head_dim=128,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        )  # fmt: skip

    renamed(folder, start)
    with_text(text)(folder)
    edit_config(folder, lambda config: config.update(torch_dtype="bfloat16", transformers_version="4.57.0"))
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"boi_token": "<|image>"}))


def no_softcap(folder: Path) -> None:
    """And larger logits: a cap of 30, which llama.cpp has by default, would take some units off them."""
    with_text(lambda text: text.update(final_logit_softcapping=None))(folder)
    edit_weights(folder, lambda weights: weights[f"{START}norm.weight"].mul_(3))


def rope(kind: str, remove: str = "", **values: Any) -> Callable[[Path], object]:
    def change(text: Config) -> None:
        text["rope_parameters"][kind].pop(remove, None)
        text["rope_parameters"][kind].update(values)

    return with_text(change)


FOLDERS = {
    "another head, tied": Folder(with_head(outer=True, inner=True), moves=True),
    "another head, nothing said": Folder(with_head(), moves=True),
    "another head, the text configuration unties": Folder(with_head(inner=False), moves=True),
    "another head, untied": Folder(with_head(outer=False, inner=True), moves=True),
    "no head, the text configuration unties": Folder(with_text(lambda text: text.update(tie_word_embeddings=False))),
    "save_model": Folder(one_name_of_two),
    "padded": Folder(padded("embed_tokens", "embed_tokens_per_layer")),
    "padded, but not per layer": Folder(padded("embed_tokens")),
    "padded per layer alone": Folder(padded("embed_tokens_per_layer")),
    "saved again in shards of F16": Folder(saved_again(lambda model: model.half(), max_shard_size="1MB")),
    "saved again as F64": Folder(saved_again(lambda model: model.double())),
    "Gemma4ForCausalLM": Folder(saved_again(text_only)),
    "Gemma4TextModel": Folder(saved_again(lambda model: model.model.language_model)),
    "the whole configuration": Folder(whole_configuration),
    "transformers 4": Folder(of_transformers_4),
    "no softcap": Folder(no_softcap, moves=True),
    "the last layer slides": Folder(with_text(lambda text: text["layer_types"].__setitem__(-1, "sliding_attention"))),
    "no share of the head": Folder(rope("full_attention", "partial_rotary_factor"), moves=True),
    "no rope_type": Folder(rope("full_attention", "rope_type"), moves=True),
    "a share of sliding heads": Folder(rope("sliding_attention", partial_rotary_factor=0.5)),
}


@pytest.fixture(scope="module")
def unchanged(tiny: dict[str, Path]) -> Logits:
    """transformers' logits of the folder that is changed here."""
    return by_transformers(tiny["target"])


def assert_close(ours: Logits, theirs: Logits) -> None:
    assert ours.shape == theirs.shape
    difference = furthest(ours, theirs)
    print(f"logits differ by {difference:.5f} at most, spread {theirs.std():.2f}")
    assert difference < CLOSE


@pytest.mark.parametrize("name", FOLDERS)
def test_what_transformers_loads(name: str, pair: Folders, unchanged: Logits, tmp_path: Path) -> None:
    FOLDERS[name].change(pair[0])
    theirs = by_transformers(pair[0])
    assert (furthest(theirs[:, :VOCAB], unchanged) > FAR) == FOLDERS[name].moves
    made = convert_pair(*pair, tmp_path / "out", "F32", "F32")
    assert_close(by_llama_cpp(made.target), theirs)


def test_tie_word_embeddings_that_is_null(pair: Folders, tmp_path: Path) -> None:
    """transformers 5.22 refuses it, and loads the same folder without the key."""
    with_head()(pair[0])
    theirs = by_transformers(pair[0])
    edit_json(pair[0] / "config.json", tie_word_embeddings=None)
    with pytest.warns(MtpWarning, match="differs"):
        made = convert_pair(*pair, tmp_path / "out", "F32", "F32")
    assert_close(by_llama_cpp(made.target), theirs)


def test_the_prefix_of_transformers_4(pair: Folders, unchanged: Logits, tmp_path: Path) -> None:
    """transformers 5.22 does not find these tensors; they are those of the folder with its own names."""
    of_transformers_4(pair[0], "language_model.model.")
    made = convert_pair(*pair, tmp_path / "out", "F32", "F32")
    assert_close(by_llama_cpp(made.target), unchanged)


def test_experts_one_by_one(sizes: Sizes, tmp_path: Path) -> None:
    """transformers 5.22 does not find them in Gemma 4's folders; they are those of the folder that has them stacked."""
    target, drafter = sizes["26B-A4B"]
    apart = shutil.copytree(target, tmp_path / "apart")
    edit_weights(apart, experts_apart)
    made = convert_pair(apart, drafter, tmp_path / "out", "F32", "F32")
    assert_close(by_llama_cpp(made.target), by_transformers(target))


def test_the_text_model_of_the_12b(sizes: Sizes, tmp_path: Path) -> None:
    target, drafter = sizes["12B"]
    whole = AutoModelForCausalLM.from_pretrained(target)
    alone = Gemma4UnifiedForCausalLM(whole.config.text_config).bfloat16()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.tie_weights()
    folder = shutil.copytree(target, tmp_path / "text")
    alone.save_pretrained(folder)
    made = convert_pair(folder, drafter, tmp_path / "out", "F32", "F32")
    ours, theirs = by_llama_cpp(made.target), by_transformers(folder)
    # the last two are suppressed in llama.cpp, by generation_config.json
    assert_close(ours[:, : VOCAB - 2], theirs[:, : VOCAB - 2])


def test_a_configuration_that_leaves_all_it_can_to_defaults(tmp_path: Path) -> None:
    torch.manual_seed(6)
    silent = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": VOCAB,
              "vocab_size_per_layer_input": VOCAB}  # fmt: skip
    model = Gemma4ForCausalLM(Gemma4TextConfig(**silent, initializer_range=0.1))
    folder = save(model, tmp_path / "target", torch.bfloat16, "gemma-4-demo", "1GB")
    said = silent | {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
    (folder / "config.json").write_text(json.dumps(said))
    kept = {"num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512}
    drafter = make_drafter(tmp_path / "drafter", ordered=True, backbone=128, hidden_size=64, **kept)
    made = convert_pair(folder, drafter, tmp_path / "out", "F32", "F32")
    assert_close(by_llama_cpp(made.target), by_transformers(folder))
