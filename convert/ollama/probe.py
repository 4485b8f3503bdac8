"""Whether a llama-server works on this CPU, tried with a tiny model.

Seen: a libggml built by a compiler that gets the tile configuration of AMX wrong ends with an illegal instruction at
the first product of two rows, and Ollama reports the last line of its log instead.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

from gemma_mtp.convert.gguf_io.read import FLOAT32
from gemma_mtp.convert.gguf_io.types import Type, padded
from gemma_mtp.convert.gguf_io.write import TensorInfo, entry, header

# Seconds that it may take.
PATIENCE = 60.0
WIDTH, TOKENS = 256, 64
# A model of one layer in Q8_0, one of the types that AMX takes; its shapes are such as AMX takes.
TENSORS = {
    "token_embd.weight": (TOKENS, WIDTH), "output.weight": (TOKENS, WIDTH), "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (WIDTH, WIDTH), "blk.0.attn_v.weight": (WIDTH, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH), "blk.0.ffn_gate.weight": (WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (WIDTH, WIDTH), "blk.0.ffn_down.weight": (WIDTH, WIDTH), "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,), "blk.0.ffn_norm.weight": (WIDTH,),
}  # fmt: skip


def fault(server: Path) -> str | None:
    """What is wrong with a llama-server on this CPU, with the way out; None if it loads a model and generates.

    Args:
        server: the program, with its libraries beside it.
    """
    if not os.access(server, os.X_OK):
        return f"{server} is not there, or no program; install Ollama again"
    around = {**os.environ, "LD_LIBRARY_PATH": str(server.parent)}
    with tempfile.TemporaryDirectory(prefix="gemma-mtp-") as folder:
        model = Path(folder) / "tiny.gguf"
        _write(model)
        command = [server, "--model", model, "--host", "127.0.0.1", "--port", "0", "-c", "64", "-t", "1", "-ngl", "0"]
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=around, text=True, errors="replace", **options) as process:  # type: ignore[call-overload]
            guard = threading.Timer(PATIENCE, process.kill)
            guard.start()
            try:
                last = _generate(process)
                return None if last is None else _told(process, last)
            finally:
                guard.cancel()
                process.kill()


def _generate(process: subprocess.Popen[str]) -> str | None:
    """Have a server generate; its last line if it ended instead, else None."""
    assert process.stdout is not None
    last = "it says nothing"
    for line in process.stdout:
        last = line.strip() or last
        if found := re.search(r"listening on (http://\S+)", line):
            body = json.dumps({"prompt": list(range(3, 11)), "n_predict": 2}).encode()
            request = urllib.request.Request(f"{found[1]}/completion", body, {"Content-Type": "application/json"})
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with suppress(OSError, http.client.HTTPException), opener.open(request, timeout=PATIENCE) as answer:
                if answer.status == http.client.OK:
                    return None
            break
    return last


def _told(process: subprocess.Popen[str], last: str) -> str:
    """How a server ended."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    code = process.poll()
    if code == -signal.SIGILL:
        return ("ends with an illegal instruction on this CPU (seen with AMX); gemma-mtp ollama serve runs without "
                "it, and without lib/ollama/libggml-cpu-sapphirerapids.so it chooses other kernels")  # fmt: skip
    if code is not None and code < 0:
        return f"is ended by {signal.Signals(-code).name} on this CPU; see its last words: {last}"
    return f"does not load a tiny model: {last}"


def _write(path: Path) -> None:
    """A model of one layer with weights of 0."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(ord("!") + place) for place in range(TOKENS - 3))]
    keys = {"context_length": 128, "embedding_length": WIDTH, "feed_forward_length": WIDTH, "block_count": 1,
            "attention.head_count": 4, "rope.dimension_count": WIDTH // 4}  # fmt: skip
    entries = [
        entry("general.architecture", "llama"),
        *(entry(f"llama.{key}", value) for key, value in keys.items()),
        entry("llama.attention.layer_norm_rms_epsilon", 1e-5, FLOAT32),
        entry("tokenizer.ggml.model", "llama"),
        entry("tokenizer.ggml.tokens", tokens),
        entry("tokenizer.ggml.scores", [0.0] * TOKENS),
        entry("tokenizer.ggml.token_type", [2, 3, 3, *[1] * (TOKENS - 3)]),
        entry("tokenizer.ggml.bos_token_id", 1),
        entry("tokenizer.ggml.eos_token_id", 2),
    ]
    kinds = {name: Type.F32 if len(shape) == 1 else Type.Q8_0 for name, shape in TENSORS.items()}
    tensors = [TensorInfo(name, shape, kinds[name]) for name, shape in TENSORS.items()]
    path.write_bytes(header(entries, tensors) + b"".join(bytes(padded(tensor.n_bytes)) for tensor in tensors))
