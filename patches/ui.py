"""The web page of llama-server, built with Node from its source in the pinned sdist, and kept in the cache.

It is no part of the native build: node_modules takes 700 MB while it is built, and the page 10 MB.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .source import VENDORED, BuildError, building, cache_dir, run, say, unpack, upstream

# Of the Node that its lock file was tried with.
NODE = 20
SOURCE = f"{VENDORED}/tools/ui"


def ui_dir() -> Path:
    """Where the page of the pinned release is kept, or would be."""
    return cache_dir() / "ui" / upstream().sha256[:16]


def built_ui() -> Path | None:
    """The folder of the page, None where it was not built."""
    return ui_dir() if (ui_dir() / "index.html").exists() else None


def build_ui() -> Path:
    """The folder of the page, from the cache or built: about two minutes and 700 MB meanwhile.

    Raises:
        BuildError: Node is missing or too old, the sources or the packages cannot be had, or the build failed.
    """
    with building("ui"):
        if kept := built_ui():
            return kept
        npm = _npm()
        ui_dir().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ui_dir().parent) as folder:
            work = Path(folder)
            page = unpack(work, f"{SOURCE}/") / SOURCE
            # Nothing is left outside of this folder, and nobody is told of an audit.
            around = {"npm_config_cache": str(work / "npm"), "npm_config_update_notifier": "false"}
            say("fetching the packages of llama-server's web page")
            run([npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], page, **around)
            say("building llama-server's web page")
            around |= {"LLAMA_UI_OUT_DIR": str(work / "dist"), "LLAMA_BUILD_NUMBER": upstream().llama_cpp}
            run([npm, "run", "build"], page, **around)
            if not (work / "dist" / "index.html").exists():
                raise BuildError("npm run build made no index.html; see what it says above.")
            (work / "dist").rename(ui_dir())
    return ui_dir()


def _npm() -> str:
    """npm, of a Node that is new enough."""
    node, npm = shutil.which("node"), shutil.which("npm")
    wanted = f"the web page is built with Node {NODE} or later"
    if node is None or npm is None:
        raise BuildError(f"{wanted}, and {'npm' if node else 'node'} is not there; install it from https://nodejs.org.")
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"v(\d+)", said)
    if found is None or int(found[1]) < NODE:
        raise BuildError(f"{wanted}, and {node} is {said.strip() or 'broken'}; update it from https://nodejs.org.")
    return npm
