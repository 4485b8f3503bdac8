"""Stands in for vLLM and SGLang: their arguments, their HTTP interface, their counters, and no model.

What it shall do wrong stands in ENGINE_DOES: "die" at start, stay "silent", be "stubborn" at SIGTERM. Into the file
ENGINE_NOTES it writes its arguments, its process and that of its worker. Every completion is ten rounds of drafting.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = Path(sys.argv[0]).name
ROUNDS, ACCEPTED = 10, (8, 6)  # rounds of a completion, and in how many the first and the second token were accepted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(NAME)
    serve = parser.add_subparsers(required=True).add_parser("serve")
    flags = ["--host", "--port", "--api-key", "--revision"]
    if NAME == "vllm":
        serve.add_argument("model")
        flags += ["--speculative-config", "--max-model-len"]
    else:
        flags += ["--model-path", "--speculative-algorithm", "--speculative-draft-model-path"]
        flags += ["--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens", "--tp-size"]
    for flag in flags:
        serve.add_argument(flag)
    return parser.parse_args()


class Answer(BaseHTTPRequestHandler):
    completions = 0
    key: str | None = None
    model = ""
    drafted = 0

    def log_message(self, *_: object) -> None:
        pass

    def say(self, body: str, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        if self.path == "/crash":
            print("the GPU has fallen off the bus", flush=True)
            os._exit(7)
        Answer.completions += 1
        self.say("{}")

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.say("")
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            return self.say("no", 401)
        if self.path == "/v1/models":
            return self.say(json.dumps({"data": [{"id": self.model}]}))
        if self.path == "/metrics" and NAME == "vllm":
            return self.say(self.metrics())
        if self.path == "/server_info" and NAME == "sglang":
            state = {"avg_spec_accept_length": 1 + sum(ACCEPTED) / ROUNDS} if self.completions else {}
            return self.say(json.dumps({"version": "0", "internal_states": [state]}))
        return self.say("no such path", 404)

    def metrics(self) -> str:
        """As prometheus_client writes them, for two engines of which one has nothing to do."""
        lines = ["# TYPE vllm:spec_decode_num_drafts counter"]
        values = {"drafts": ROUNDS, "draft_tokens": ROUNDS * self.drafted, "accepted_tokens": sum(ACCEPTED)}
        for name, value in values.items():
            for engine in (0, 1):
                labels = f'{{engine="{engine}",model_name="{self.model}"}}'
                total = 0.0 if engine else float(value * self.completions)
                lines.append(f"vllm:spec_decode_num_{name}_total{labels} {total}")
                lines.append(f"vllm:spec_decode_num_{name}_created{labels} 1.7e+09")
        for place in range(self.drafted):
            accepted = ACCEPTED[place] if place < len(ACCEPTED) else 0
            labels = f'{{engine="0",model_name="{self.model}",position="{place}"}}'
            total = float(accepted * self.completions)
            lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{labels} {total}")
        return "\n".join(lines) + "\n"


def main() -> None:
    asked = arguments()
    does = os.environ.get("ENGINE_DOES", "")
    if does == "die":
        print("loading weights", flush=True)
        raise RuntimeError("\x1b[31mout of memory\x1b[0m: 31 GiB wanted, 24 GiB free")
    if does == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    notes = {"argv": sys.argv[1:], "pid": os.getpid(), "worker": worker.pid}
    Path(os.environ["ENGINE_NOTES"]).write_text(json.dumps(notes))
    print("loaded", flush=True)
    if does == "silent":
        threading.Event().wait()
    Answer.key = asked.api_key
    if NAME == "vllm":
        Answer.model, drafted = asked.model, json.loads(asked.speculative_config)["num_speculative_tokens"]
    else:
        Answer.model, drafted = asked.model_path, asked.speculative_num_steps
    Answer.drafted = int(drafted)
    ThreadingHTTPServer((asked.host, int(asked.port)), Answer).serve_forever()
