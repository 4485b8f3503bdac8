"""The pinned llama.cpp's converter and quantizer, and the comparison of their files with ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from gemma_mtp.convert import link

# Keys that upstream writes otherwise, with the reason. There is none; ours of the pair contract come on top.
INTENDED: dict[str, str] = {}

# Runs the converter once for each line of arguments; torch and transformers are imported only once.
SERVER = """
import json, os, runpy, sys
script = sys.argv[1]
sys.path.insert(0, os.path.dirname(script))
for line in sys.stdin:
    sys.argv = [script, *json.loads(line)]
    try:
        runpy.run_path(script, run_name="__main__")
        print("done", flush=True)
    except BaseException as problem:
        print(repr(problem), flush=True)
"""


class Upstream:
    """convert_hf_to_gguf.py and llama-quantize, run on demand; a file that was made once is kept."""

    def __init__(self, converter: Path, quantizer: Path, root: Path) -> None:
        self.quantizer, self.root = quantizer, root
        self.log = (root / "converter.log").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, converter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True,
        )  # fmt: skip

    def close(self) -> None:
        self.server.communicate()
        self.log.close()

    def __call__(self, folder: Path, quant: str, *options: str | Path, source: str = "BF16") -> Path:
        """Upstream's file of a folder in a format; quantized formats by its quantizer, from a file of type `source`."""
        mark = "".join(f"-{Path(option).name.strip('-')}" for option in options).replace("=", "-")
        path = self.root / f"{folder.parent.name}-{folder.name}-{quant}{mark}.gguf"
        if path.exists():
            return path
        if quant in ("F32", "F16", "BF16") and not options:
            self._convert(folder, quant, path)
        else:
            self.quantize(self(folder, source), path, quant, *options)
        return path

    def _convert(self, folder: Path, quant: str, path: Path) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        command = [str(folder), "--outtype", quant.lower(), "--outfile", str(path)]
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        said = self.server.stdout.readline().strip()
        assert said == "done", f"{said}\n{Path(self.log.name).read_text()[-2000:]}"

    def quantize(self, source: Path, path: Path, quant: str, *options: str | Path) -> str:
        """Run llama-quantize and return what it said."""
        command = [self.quantizer, *options, source, path, quant, "2"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr


def data(header: link.Header, name: str) -> bytes:
    """The blocks of a tensor."""
    tensor = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.size)


def plain(value: object) -> object:
    """A metadata value that can be compared."""
    if isinstance(value, link.Strings):
        return value.digest()
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_same(ours: Path, theirs: Path) -> None:
    """Every tensor byte-equal and of the same type, every key equal but `mtp.*`."""
    one, other = link.read_header(ours), link.read_header(theirs)
    assert sorted(one.tensors) == sorted(other.tensors)
    for name, tensor in one.tensors.items():
        wanted = other.tensors[name]
        assert (tensor.type, tensor.shape) == (wanted.type, wanted.shape), name
        assert data(one, name) == data(other, name), name
    metadata = {key: plain(value) for key, value in one.metadata.items() if not key.startswith("mtp.")}
    wanted_metadata = {key: plain(value) for key, value in other.metadata.items()}
    assert {k: v for k, v in metadata.items() if k not in INTENDED} == {
        k: v for k, v in wanted_metadata.items() if k not in INTENDED
    }
