"""What it takes to tell which tokens of Gemma 4's vocabulary (262144) a grammar allows, along texts that it allows.

The vocabulary is llama.cpp's own test file of the pinned sdist. Milliseconds of this thread's CPU time: the first mask,
with which the tree of all texts is made, and of the others median, 90th percentile and most. The last line on stdout
is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gemma_mtp.patches import source
from llama_cpp import LlamaGrammar
from llama_cpp import llama_cpp as lib
from mtp_library import allowed

VOCAB = "vendor/llama.cpp/models/ggml-vocab-gemma-4.gguf"
STRING = {"type": "string"}
PLACE = {"type": "object", "properties": {"street": STRING, "city": STRING}, "required": ["street", "city"]}
SHORT = {"type": "string", "maxLength": 40}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "text": (
        {"type": "object", "properties": {"text": STRING, "place": PLACE}, "required": ["text", "place"]},
        {
            "text": 'It was a dark and stormy night; the rain "fell" in torrents — 暴风雨之夜 — for some intervals.',
            "place": {"street": "Long Street 5", "city": "München"},
        },
    ),
    "structure": (
        {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "boolean"}, {"enum": ["red", "green"]}]}},
        [1, 2.5, -30, True, "red", 417, False, 0.001, "green", 8] * 4,
    ),
    "bounded text": (
        {"type": "object", "properties": {"title": SHORT, "name": SHORT}, "required": ["title", "name"]},
        {"title": "A history of the decline and fall", "name": "the second of all volumes"},
    ),
}


def along(vocab: Any, rules: str, text: str) -> list[float]:
    """Milliseconds for the mask before each token of a text."""
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    tokens = (lib.llama_token * (len(text.encode()) + 8))()
    count = lib.llama_tokenize(vocab, text.encode(), len(text.encode()), tokens, len(tokens), False, True)
    made = lib.llama_sampler_init_grammar(vocab, rules.encode(), b"root")
    took = []
    for token in tokens[:count]:
        begin = time.thread_time()
        mask = allowed(made, n_vocab)
        took.append(1e3 * (time.thread_time() - begin))
        assert mask[token], f"{text!r} is not what {rules} allows"
        lib.llama_sampler_accept(made, token)
    lib.llama_sampler_free(made)
    return took


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = source.unpack(Path(folder), VOCAB) / VOCAB
        params = lib.llama_model_default_params()
        params.vocab_only = True
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        found = {}
        for name, (schema, value) in CASES.items():
            rules = LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)._grammar
            first, *rest = along(lib.llama_model_get_vocab(model), rules, json.dumps(value, ensure_ascii=False))
            median, tenth, most = (float(np.quantile(rest, q)) for q in (0.5, 0.9, 1.0))
            found[name] = {"first": first, "median": median, "90 %": tenth, "most": most, "tokens": len(rest) + 1}
        lib.llama_model_free(model)
    print(json.dumps({name: {key: round(n, 3) for key, n in each.items()} for name, each in found.items()}))


if __name__ == "__main__":
    main()
