"""Stands in for an old llama-server of somebody else: few flags, -fa without a word, no draft model.

    python tests/server_standin.py -m MODEL --host HOST --port PORT -c N [-t N] [-ngl N] [-fa]

Its answers have `n_predict` tokens that it took a millisecond each for. A flag that it does not know ends it, as there.
"""

from __future__ import annotations

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

HELP = """usage: llama-server [options]
  -m,    --model FNAME          model path
  -c,    --ctx-size N           size of the prompt context (default: 4096)
  -t,    --threads N            number of threads
  -ngl,  --gpu-layers N         number of layers to store in VRAM
  -fa,   --flash-attn           enable Flash Attention (default: disabled)
         --host HOST            ip address to listen
         --port PORT            port to listen
"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = asked["n_predict"]
        self._answer({"timings": {"prompt_n": len(asked["prompt"]), "predicted_n": n, "predicted_ms": float(n)}})

    def _answer(self, said: dict[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(HELP)
        sys.exit()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("-m", "--host", "--port", "-c"):
        parser.add_argument(flag, required=True)
    parser.add_argument("-t")
    parser.add_argument("-ngl")
    parser.add_argument("-fa", action="store_true")
    given = parser.parse_args()
    HTTPServer((given.host, int(given.port)), Handler).serve_forever()
