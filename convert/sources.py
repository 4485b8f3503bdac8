"""Where a checkpoint comes from: a folder, a snapshot in the Hugging Face cache, or a repository to download."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from gemma_mtp.convert.errors import MtpError

# What a conversion reads of a repository.
FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "*.jinja",
         "preprocessor_config.json", "processor_config.json", "README.md")  # fmt: skip
# Copies of the same weights in other forms.
NOT = ("original/*", "*/*", "consolidated*.safetensors")
NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Every official target has a drafter of its name with "-assistant" at the end (Hugging Face, organisation google).
OFFICIAL = re.compile(r"gemma-4-(E2B|E4B|12B|26B-A4B|31B)-it(-qat-q4_0-unquantized)?")
AUTO = "auto"


def resolve(source: str) -> Path:
    """The folder of a checkpoint, downloaded if need be; what was downloaded before is not downloaded again.

    Args:
        source: a folder, or org/name[@revision] of a repository. The token, the endpoint, the cache folder and offline
            mode are those of huggingface_hub: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE.

    Raises:
        MtpError: there is no such folder and no such repository, the repository is gated, or the network fails.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = source.partition("@")
    if os.path.lexists(folder) or not NAME.fullmatch(name) or ".." in name:
        raise MtpError(f"{source} is not a folder; pass a Hugging Face folder or org/name[@revision].")
    return _download(name, revision or None)


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError:
        raise MtpError(
            f"downloading {name} needs huggingface_hub; run: pip install 'gemma-mtp[convert]', or pass a folder."
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    where = name if revision is None else f"{name}@{revision}"
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(FILES), ignore_patterns=list(NOT))
    except errors.GatedRepoError:
        raise MtpError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run hf auth login, or set "
            "HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise MtpError(f"{name} has no revision {revision!r}; see its branches and tags, or leave it out.") from None
    except errors.RepositoryNotFoundError:
        raise MtpError(
            f"there is no folder and no repository {name!r} that you may see; check the name; for a private one run "
            "hf auth login or set HF_TOKEN."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as problem:
        raise MtpError(
            f"{where} is not in the cache, and {_why(problem)}; try again later, or pass a folder."
        ) from None
    except OSError as problem:
        raise MtpError(f"{where}: the download stopped ({_first_line(problem)}); run it again to go on.") from None
    folder = Path(found)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise MtpError(f"{where} is in the cache only in part, or has no safetensors weights; run it again online.")
    return folder


def _why(problem: Exception) -> str:
    """Why the hub could not be asked."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    answers = (getattr(each, "response", None) for each in (problem, problem.__cause__))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    return "the Hugging Face Hub cannot be reached" if status is None else f"the Hugging Face Hub answered {status}"


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def official_drafter(target: str) -> str:
    """The drafter that was published for a target, as a folder beside it or as org/name.

    Args:
        target: as for `resolve`.

    Raises:
        MtpError: the target is not one of the official ones, and no folder beside it has its name with "-assistant".
    """
    folder = Path(target).expanduser()
    beside = folder.resolve().with_name(f"{folder.resolve().name}-assistant")
    if folder.is_dir() and beside.is_dir():
        return str(beside)
    name = repository(folder) or (folder.resolve().name if folder.is_dir() else target.partition("@")[0])
    organisation, _, model = name.rpartition("/")
    if organisation in ("", "google") and OFFICIAL.fullmatch(model):
        return f"google/{model}-assistant"
    raise MtpError(
        f"no drafter is known for {target}: it is none of the official Gemma 4 targets (google/gemma-4-...-it), and no "
        f"folder {model}-assistant lies beside it; pass the drafter."
    )


def repository(folder: Path) -> str | None:
    """org/name of a snapshot in the Hugging Face cache, or None for any other folder."""
    cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$", folder.absolute().as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else None


def name_of(folder: Path) -> str:
    """What output files are named after: the repository of a snapshot, or the folder."""
    return (repository(folder) or folder.resolve().name).rpartition("/")[2]
