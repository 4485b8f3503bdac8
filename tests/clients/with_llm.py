"""llm: a model named in its settings, asked for text and by a schema."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:3]
with tempfile.TemporaryDirectory() as folder:
    described = {"model_id": "served", "model_name": model, "api_base": url, "supports_schema": True}
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([described]))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("llm")), "-m", "served", "-o", "temperature", "0", "-o", "max_tokens"]
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    def asked(*words: str) -> str:
        return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=True).stdout

    assert asked("16", "import os") == asked("16", "--no-stream", "import os")
    assert json.loads(asked("200", "--schema", "good bool", "import os"))["good"] in (True, False)
