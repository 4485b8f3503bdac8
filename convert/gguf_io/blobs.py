"""Models of Ollama's store as files, found by name: the store itself is read, so no Ollama need run.

A store holds manifests/HOST/NAMESPACE/NAME/TAG, which lists the layers of a model by kind and hash, and their files as
blobs/sha256-HASH (manifest/paths.go and types/model/name.go of Ollama, read in v0.33.0-rc2). All of it is only read: a
blob's name is its hash, and Ollama removes what else lies there.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.convert.errors import MtpError
from gemma_mtp.convert.gguf_io.folder import contents

# Where a store lies that nobody moved: of a user's Ollama, and of the service that Linux's install script sets up.
FOLDERS = ("~/.ollama/models", "/usr/share/ollama/.ollama/models")
# What a name leaves out.
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
PART, HOST_PART = re.compile(r"\w[\w.-]*", re.ASCII), re.compile(r"\w[\w.:-]*", re.ASCII)
BLOB = re.compile(r"sha256-[0-9a-f]{64}")
# Media types begin so; what follows tells what a layer is.
KIND = "application/vnd.ollama.image."


@dataclass(frozen=True)
class StoredModel:
    """A model of a store: its name, and the files of its target, drafter and projectors."""

    name: str
    target: Path
    drafter: Path | None
    projectors: tuple[Path, ...]


def stores() -> list[Path]:
    """The stores of this machine: where OLLAMA_MODELS says, else those that lie where Ollama puts them."""
    chosen = os.environ.get("OLLAMA_MODELS", "").strip(" \"'")
    return [Path(each).expanduser() for each in ((chosen,) if chosen else FOLDERS)]


def find_model(name: str) -> StoredModel | None:
    """The model of a name in the first store that has it, as Ollama reads names: NAME[:TAG], NAMESPACE/NAME,
    hf.co/ORG/NAME:QUANT, in any case of letters.

    Raises:
        MtpError: it has no GGUF file, or its files are damaged, missing or not to be read by this user.
    """
    wanted = parts_of(name)
    if wanted is None:
        return None
    for store in stores():
        manifest = _folded(store / "manifests", wanted)
        if manifest is not None:
            return _model(name, store, manifest)
    return None


def what_it_is_not(name: str) -> str:
    """What to say of a target that is neither a file nor a model, with the next step."""
    if parts_of(name) is None or name.lower().endswith(".gguf"):
        return f"{name} does not exist; name a GGUF file."
    closed = [str(store) for store in stores() if _closed(store)]
    if closed:
        return (f"{name} does not exist as a file, and {closed[0]}, where Ollama keeps models, may not be read by this "
                "user; run it with sudo, or join the group ollama.")  # fmt: skip
    return f"{name} does not exist, neither as a file nor as a model of Ollama's store; see gemma-mtp ollama list."


def is_store(folder: Path) -> bool:
    """Whether a folder holds the files of a store."""
    real = folder.resolve()
    return real.name == "blobs" and (real.parent / "manifests").is_dir()


def owner_of(path: Path) -> str | None:
    """The name of a model that has a file of a store as its target, if there is one."""
    real = path.resolve()
    store = real.parent.parent
    if not (BLOB.fullmatch(real.name) and is_store(real.parent)):
        return None
    for manifest in sorted((store / "manifests").glob("*/*/*/*")):
        if real.name in _layers(manifest).get("model", []):
            return _shown(manifest.relative_to(store / "manifests").parts)
    return None


def check_there(path: Path) -> None:
    """Refuse a file of a store that cannot be read, with what to do.

    Raises:
        MtpError: it is not there, or not for this user.
    """
    try:
        with path.open("rb"):
            return
    except PermissionError:
        raise MtpError(f"{path} may not be read by this user; run it with sudo, or join the group ollama.") from None
    except OSError:
        raise MtpError(
            f"{path}, which Ollama names, is not on this machine: it runs in a container or elsewhere; run gemma-mtp "
            "there, or mount its store under the same path."
        ) from None


def parts_of(name: str) -> tuple[str, ...] | None:
    """Host, namespace, name and tag of a model's name; None of what can be none."""
    rest, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", TAG)
    given = rest.rpartition("://")[2].split("/")
    host, *others = ([HOST, NAMESPACE][: max(0, 3 - len(given))] + given) + [tag]
    fits = len(others) == 3 and HOST_PART.fullmatch(host) and all(PART.fullmatch(each) for each in others)
    return (host, *others) if fits else None


def _shown(parts: tuple[str, ...]) -> str:
    """A name as Ollama shows it."""
    host, namespace, name, tag = parts
    kept = (host, namespace) if host != HOST else (namespace,) if namespace != NAMESPACE else ()
    return "/".join([*kept, f"{name}:{tag}"])


def _folded(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """A path of these names within a folder, the letters' case aside where it is not there as it is."""
    for part in parts:
        found = [path for path in contents(folder) if path.name.lower() == part.lower()]
        if not found:
            return None
        folder = next((path for path in found if path.name == part), found[0])
    return folder


def _closed(store: Path) -> bool:
    """Whether this user may not look into a store."""
    try:
        next((store / "manifests").iterdir(), None)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _layers(manifest: Path) -> dict[str, list[str]]:
    """The names of a model's files by kind; nothing of a manifest that makes no sense."""
    found: dict[str, list[str]] = {}
    try:
        listed = json.loads(manifest.read_bytes())["layers"]
        for layer in listed:
            kind, file = str(layer["mediaType"]), str(layer["digest"]).replace(":", "-")
            if kind.startswith(KIND) and BLOB.fullmatch(file):
                found.setdefault(kind.removeprefix(KIND), []).append(file)
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return found


def _model(name: str, store: Path, manifest: Path) -> StoredModel:
    layers = {kind: [store / "blobs" / file for file in files] for kind, files in _layers(manifest).items()}
    if not layers:
        check_there(manifest)
        raise MtpError(f"{manifest} is damaged; get the model again with ollama pull {name}.")
    targets, drafters = layers.get("model", []), layers.get("draft", [])
    if not targets:
        raise MtpError(f"{name} holds no GGUF file (safetensors, or a model of the cloud); nothing can draft for it "
                       "here.")  # fmt: skip
    files = StoredModel(name, targets[-1], drafters[-1] if drafters else None, tuple(layers.get("projector", ())))
    for path in filter(None, (files.target, files.drafter, *files.projectors)):
        check_there(path)
    return files
