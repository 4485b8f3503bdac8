"""Keys of config.json: read with an error that names them; those that say nothing; those that may change the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_mtp.convert.errors import MtpError

# Keys of a text configuration that say nothing about its tensors or about how they are used: of transformers itself, of
# its older versions, of generation settings that were kept there once, of trainers and of tools that merge.
IGNORED = {
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "cache_implementation", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "hidden_act", "id2label", "initializer_range", "is_assistant",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
    "model_name", "model_type", "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "pretraining_tp", "problem_type", "pruned_heads", "query_pre_attn_scalar", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "rope_local_base_freq", "rope_theta",
    "sep_token_id", "sliding_window_pattern", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache", "vocab_size_per_layer_input",
}  # fmt: skip
IGNORED_ENDS = ("_token_id", "_token_index", "_version", "_config", "_implementation")
IGNORED_STARTS = ("_", "unsloth", "mergekit", "axolotl", "trl_", "wandb", "lora_", "peft_")
# What a key speaks of that would change tensors or their use; such a key refuses, any other unknown one warns.
CHANGES = re.compile(
    r"altup|laurel|sparsity|_bias$|softcap|multiplier|rope_scaling|num_nextn|mtp_|qk_norm|expert|quant"
)
# What transformers assumes where the configuration is silent (configuration_gemma4.py).
GLOBAL_HEAD_DIM = 512
LAYER_PERIOD = 6
ROPE_DEFAULTS = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    "sliding_window": 512, "vocab_size": 262_144, "rope_parameters": ROPE_DEFAULTS, "hidden_size_per_layer_input": 256,
}  # fmt: skip
# The same of the 12B's classes (configuration_gemma4_unified.py).
UNIFIED_DEFAULTS = {"max_position_embeddings": 262_144, "sliding_window": 1024, "hidden_size_per_layer_input": 0}
# And of drafters (configuration_gemma4_assistant.py).
DRAFTER_DEFAULTS = {
    "backbone_hidden_size": 1536, "num_centroids": 2048, "centroid_intermediate_top_k": 32,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip


class Keys:
    """Required and optional keys of a configuration, with an error that names file and key; knows which were read."""

    def __init__(self, values: Mapping[str, Any], file: Path, defaults: Mapping[str, Any] = DEFAULTS) -> None:
        self.values, self.file, self.defaults = values, file, defaults
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.get(key, self.defaults.get(key))
        if value is None:
            raise MtpError(f"{self.file} has no {key!r}; download the configuration again.")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str) -> int:
        """A size: a whole number, not negative."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise MtpError(f"{self.file}: {key} = {value!r} is not a size; download the configuration again.")
        return value

    def some_size(self, key: str) -> int | None:
        return None if self.get(key) is None else self.size(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise MtpError(f"{self.file}: {key} = {value!r} is neither true nor false; download it again.")
        return value

    def inner(self, key: str) -> Keys:
        if not isinstance(self[key], dict):
            raise MtpError(f"{self.file}: {key} is not an object; download the configuration again.")
        return Keys(self[key], self.file)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Keys that nobody asked for and that hold something."""
        for key, value in self.values.items():
            known = key in self.read or key in IGNORED or key.startswith(IGNORED_STARTS) or key.endswith(IGNORED_ENDS)
            if not known and value not in (None, False, 0, "", [], {}):
                yield key, value
