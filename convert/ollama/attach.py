"""A drafter for a model that is in Ollama's store, without copying the model; and the way back.

A model is a list of layers. Ollama makes a new one out of a model's layers and a drafter's. The one before stays under
a name of its own, of a few kilobytes, so that detaching gives it back exactly.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from gemma_mtp.convert import link
from gemma_mtp.convert.errors import MtpError, PairError, warn
from gemma_mtp.convert.modelfile import DRAFT_NUM_PREDICT, PARSER, REQUIRES, STOP, renderer_of
from gemma_mtp.convert.ollama.api import LOADING, Client, OllamaError
from gemma_mtp.convert.ollama.create import check_types
from gemma_mtp.convert.ollama.store import Stored, check_room, names, stored, tagged
from gemma_mtp.convert.progress import Progress

# Put behind the tag of the model as it was.
PLAIN = "-plain"
# Seconds for a runner to end.
UNLOADING = 20.0


def attach(
    api: Client, name: str, drafter: str | None = None, wanted: str | None = None, quant: str = "Q8_0",
    progress: Progress = lambda done, total: None,
) -> Stored:  # fmt: skip
    """Give a model of the store a drafter, or mend the settings of one that has it.

    Args:
        name: the model.
        drafter: GGUF file; or Hugging Face folder or org/name[@revision], which is converted. Unless given, the one
            that the model has, or a linked one of the store, or the one published for the model's size.
        wanted: name of the model with the drafter; the model itself unless given, which then stays as it was under
            its name with -plain behind.
        quant: format of a drafter that is converted.
        progress: called with bytes converted and bytes in all.

    Returns:
        The model with the drafter.

    Raises:
        PairError: the model is no Gemma 4 target, or the drafter is not its own.
        MtpError: Ollama is absent, too old or refuses, or the files cannot be read.
    """
    base = stored(api, name)
    target = base.read_target()
    if target.arch != link.TARGET_ARCH:
        raise PairError(f"{name} is a {target.arch!r} model, and drafters are for {link.TARGET_ARCH!r}.")
    result = wanted or name
    with tempfile.TemporaryDirectory(prefix="gemma-mtp-") as folder:
        path = _drafter(base, target, drafter, quant, Path(folder), progress)
        body: dict[str, Any] = {"model": result, "from": name, **_settings(base, target), "stream": False}
        if path is not None:
            check_types([link.read_header(path)])
            check_room(api, path.stat().st_size)
            digest = api.upload(path)
            if base.drafter is None or base.drafter.name != digest.replace(":", "-"):
                body |= {"from": _without_drafter(api, base, result), "draft_files": {"drafter.gguf": digest}}
        try:
            api.post("/api/create", body, LOADING)
        except BaseException:
            if base.drafter is None and body["from"] == plain(name):  # made above, and for nothing
                api.delete(plain(name))
            raise
    unload(api, base)
    return stored(api, result)


def detach(api: Client, name: str) -> Stored:
    """Make a model what it was before a drafter was attached; of one that was made with its drafter, drafts off.

    Raises:
        MtpError: it has no drafter; or as `attach`.
    """
    model = stored(api, name)
    if model.drafter is None:
        raise MtpError(f"{name} has no drafter; see gemma-mtp ollama list.")
    before = origin(api, model)
    if before is None:
        body = {"model": name, "from": name, "parameters": {"draft_num_predict": 0}, "stream": False}
        api.post("/api/create", body, LOADING)
    else:
        api.post("/api/copy", {"source": before.name, "destination": tagged(name)})
        if before.name == plain(name):
            api.delete(before.name)
    unload(api, model)
    return stored(api, name)


def plain(name: str) -> str:
    """The name under which a model stays as it was."""
    return f"{tagged(name)}{PLAIN}"


def origin(api: Client, model: Stored) -> Stored | None:
    """The same model without a drafter, as it stayed or as this one was made from it; None if neither is there."""
    parents = (model.parent, plain(model.parent)) if model.parent else ()
    for name in (plain(model.name), *parents):
        try:
            found = stored(api, name)
        except OllamaError:
            continue
        if found.target == model.target and found.drafter is None:
            return found
    return None


def unload(api: Client, model: Stored) -> None:
    """End what runs of a model's target: Ollama would go on with the drafter that is loaded (server/sched.go)."""

    def running() -> list[str]:
        loaded = [str(each["name"]) for each in api.get("/api/ps").get("models") or []]
        known = [each for each in loaded if each in names(api)]
        return [each for each in known if stored(api, each).target == model.target]

    for each in running():
        api.post("/api/generate", {"model": each, "keep_alive": 0})
    until = time.monotonic() + UNLOADING
    while running() and time.monotonic() < until:
        time.sleep(0.1)


def _without_drafter(api: Client, base: Stored, result: str) -> str:
    """The name of the model to add a drafter to. A second drafter would not replace the first, but lie beside it."""
    if base.drafter is not None:
        before = origin(api, base)
        if before is not None:
            return before.name
        warn(f"{base.name} was made with another drafter, which stays in it unused "
             f"({base.drafter.stat().st_size / 1e6:.0f} MB); to be rid of it, create the model anew.")  # fmt: skip
        return base.name
    if tagged(result) != tagged(base.name):
        return base.name
    api.post("/api/copy", {"source": base.name, "destination": plain(base.name)})
    return plain(base.name)


def chosen_renderer(model: Stored, target: link.Header) -> str:
    """The renderer that a model ought to have: that of its size, unless it is for something else than Gemma 4."""
    return renderer_of(target) if not model.renderer or model.renderer.startswith("gemma4") else model.renderer


def _settings(base: Stored, target: link.Header) -> dict[str, Any]:
    """Renderer, parser, end of a turn and number of drafts, where the model has none or the wrong ones."""
    values: dict[str, Any] = {"draft_num_predict": base.drafts or DRAFT_NUM_PREDICT}
    if "stop" not in base.parameters:
        values["stop"] = [STOP]
    body: dict[str, Any] = {"parameters": values, "requires": REQUIRES, "parser": base.parser or PARSER}
    body["renderer"] = chosen_renderer(base, target)
    return body


def _drafter(
    base: Stored, target: link.Header, named: str | None, quant: str, folder: Path, progress: Progress
) -> Path | None:
    """The drafter's file, checked and linked; None where the model keeps the one that it has."""
    if named is None:
        found = base.read_drafter()
        if found is not None:
            link.check(target, found)
            return None
        in_store = link.find_drafter(target.path, target)
        if in_store is not None:
            return in_store
        named = published(target)
        warn(f"{named}, published for a target of this shape, becomes the drafter; --drafter takes another.")
    path = Path(named).expanduser()
    if not path.is_file():
        from gemma_mtp.convert.lone_drafter import convert_drafter

        return convert_drafter(named, target, folder, quant, progress)
    header = link.read_header(path)
    link.check(target, header)
    if link.KEY_TARGET in header.metadata:
        return path
    from gemma_mtp.convert.relink import link_files

    return link_files(target.path, path, folder / path.name, progress=progress)


def published(target: link.Header) -> str:
    """The drafter that was published for a target of this shape.

    Raises:
        MtpError: none was.
    """
    from gemma_mtp.convert.sizes import SIZES

    shape = target.of_arch("embedding_length"), target.of_arch("block_count")
    for size, each in SIZES.items():
        if shape == (each.n_embd, each.target["num_hidden_layers"]):
            qat = "-qat-q4_0-unquantized" if "qat" in str(target.metadata.get("general.name", "")).lower() else ""
            return f"google/gemma-4-{size}-it{qat}-assistant"
    raise MtpError(f"no drafter was published for a target of {shape[1]} layers of {shape[0]}; pass --drafter.")
