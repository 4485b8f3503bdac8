"""Where a checkpoint comes from: a folder, a snapshot in the Hugging Face cache, or a repository to download."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gemma_mtp.convert.errors import MtpError, warn
from gemma_mtp.convert.naming import repository
from gemma_mtp.convert.safetensors_file import MAX_HEADER
from gemma_mtp.convert.sizes import SIZES

# What a conversion reads of a repository.
WEIGHT_FILES = "*.safetensors"
CARD = "README.md"
FILES = (WEIGHT_FILES, "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "special_tokens_map.json", "*.jinja", "chat_template.json",
         "preprocessor_config.json", "processor_config.json", "adapter_config.json", CARD)  # fmt: skip
# Copies of the same weights in other forms. Of folders within it only chat templates are read.
NOT = (*(f"*/{each}" for each in FILES if each != "*.jinja"), "consolidated*.safetensors")
# Bytes of a safetensors file that are asked for first; few headers are longer.
FIRST = 100_000
NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Every official target has a drafter of its name with "-assistant" at the end (Hugging Face, organisation google).
OFFICIAL = re.compile(rf"gemma-4-({'|'.join(SIZES)})-it(-qat-q4_0-unquantized)?", re.IGNORECASE)
AUTO_DRAFTER = "auto"


def fetch_checkpoint(source: str) -> Path:
    """The folder of a checkpoint, downloaded if need be; what was downloaded before is not downloaded again.

    Args:
        source: a folder, or org/name[@revision] of a repository. The token, the endpoint, the cache folder and offline
            mode are those of huggingface_hub: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE.

    Raises:
        MtpError: there is no such folder and no such repository, the repository is gated, or the network fails.
    """
    from gemma_mtp.convert.weight_files import check_folder

    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    found = _download(*_parse(source), FILES)
    if not (found / "config.json").is_file() or not any(found.glob(WEIGHT_FILES)):
        check_folder(found)
        raise MtpError(f"{source} is in the cache only in part, or has no safetensors weights; run it again online.")
    return found


def fetch_headers(source: str, files: ExitStack) -> tuple[Path, bool]:
    """As `fetch_checkpoint`, but of weights that are not in the cache only the headers are downloaded.

    The folder then holds sparse files of the weights' full size, with nothing after the header.

    Args:
        source: as for `fetch_checkpoint`.
        files: keeps such a folder until it is closed.

    Returns:
        The folder, and whether all of the weights are there.

    Raises:
        MtpError: as `fetch_checkpoint`; or the server sends whole files only.
    """
    from gemma_mtp.convert.weight_files import ADAPTER, INDEX, SINGLE, check_folder, weight_names

    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, True
    name, revision = _parse(source)
    cached = _download(name, revision, [each for each in FILES if each != WEIGHT_FILES])
    check_folder(cached)
    weights = weight_names(cached, _present(name, cached))
    missing = [each for each in weights if not (cached / each).exists()]
    if not missing:
        return cached, True
    # Named like a snapshot in the cache, so that it is known which repository this is.
    root = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="gemma-mtp-")))
    folder = root.joinpath(*cached.parts[-3:])
    folder.mkdir(parents=True)
    told = {ADAPTER, INDEX} if weights == [SINGLE] else {ADAPTER}  # that these are left aside has been said
    for path in [each for each in cached.iterdir() if each.name not in told]:
        _place(path, folder / path.name)
    for each in missing:
        with _hub_errors(name, revision):
            header, size = _remote_header(name, each, cached.name)
        (folder / each).write_bytes(header)
        os.truncate(folder / each, size)
    return folder, False


def _place(path: Path, wanted: Path) -> None:
    """Have a file in a second place too; Windows grants links only to some."""
    try:
        wanted.symlink_to(path)
    except OSError:
        shutil.copyfile(path, wanted)


def _present(name: str, cached: Path) -> list[str]:
    """Names of the files in a repository, at the commit of a snapshot; offline those of the snapshot."""
    from huggingface_hub import constants, errors, list_repo_files

    with _hub_errors(name, cached.name):
        if not constants.is_offline_mode():
            return list(list_repo_files(name, revision=cached.name))
        if not any(cached.glob(WEIGHT_FILES)):
            raise errors.OfflineModeIsEnabled(f"the weights of {name}")
    return [path.name for path in cached.iterdir()]


def _remote_header(name: str, file: str, commit: str) -> tuple[bytes, int]:
    """The beginning of a safetensors file on the hub, its header at least, and the size of the file."""
    start, size = _beginning(name, file, commit, FIRST)
    length = 8 + int.from_bytes(start[:8], "little")
    if FIRST < length <= min(size, MAX_HEADER):  # a longer one is refused by who reads it
        start, size = _beginning(name, file, commit, length)
    return start, size


def _beginning(name: str, file: str, commit: str, count: int) -> tuple[bytes, int]:
    """The first bytes of a file on the hub, and its size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", hf_hub_url(name, file, revision=commit), headers=headers) as answer:
        if answer.is_error:
            answer.read()
        hf_raise_for_status(answer)
        found = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or found is None:  # what is coming is all of the file
            raise MtpError(
                f"{name}: the server sends {file} only as a whole, not its header alone; leave --dry-run out, or "
                "download the repository and pass its folder."
            )
        return answer.read(), int(found[1])


def _parse(source: str) -> tuple[str, str | None]:
    """Repository and revision."""
    name, _, revision = source.partition("@")
    if os.path.lexists(Path(source).expanduser()) or not NAME.fullmatch(name) or ".." in name:
        raise MtpError(f"{source} is not a folder; pass a Hugging Face folder or org/name[@revision].")
    return name, revision or None


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot of a repository in the cache, with the files of these patterns."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError:
        raise MtpError(
            f"downloading {name} needs huggingface_hub; run: pip install 'gemma-mtp[convert]', or pass a folder."
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    wanted = {"revision": revision, "allow_patterns": list(patterns), "ignore_patterns": list(NOT)}
    with _hub_errors(name, revision):
        return Path(_aside(lambda: snapshot_download(name, **wanted)))


def _aside(work: Callable[[], str]) -> str:
    """What a function returns or raises, from a thread of its own.

    huggingface_hub, when it is interrupted, first waits for the files that its threads are downloading.
    """
    done: Future[str] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as problem:
            done.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What keeps a repository from being downloaded, as errors with a next step."""
    from huggingface_hub import errors

    where = name if revision is None else f"{name}@{revision}"
    try:
        yield
    except errors.RemoteEntryNotFoundError:
        raise MtpError(f"{where} has no safetensors weights; pass a repository that has.") from None
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
    except MtpError:
        raise
    except Exception as problem:  # OSError, or one of httpx or of httpx2, by the version of huggingface_hub
        raise MtpError(f"{where}: the download stopped ({_first_line(problem)}); run it again to go on.") from None


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

    A name counts whoever uploads it and whatever its case. The drafter of a fine-tune is that of the official target
    that its model card names as its base, which is said in a warning: it guesses less well there, and the tokens are
    the fine-tune's own.

    Args:
        target: as for `fetch_checkpoint`.

    Raises:
        MtpError: the target is neither an official one nor made of one, and no folder beside it has its name with
            "-assistant"; or its model card cannot be fetched.
    """
    folder = Path(target).expanduser()
    beside = folder.resolve().with_name(f"{folder.resolve().name}-assistant")
    if folder.is_dir() and beside.is_dir():
        return str(beside)
    name = repository(folder) or (folder.resolve().name if folder.is_dir() else target.partition("@")[0])
    organisation, _, model = name.rpartition("/")
    official = official_name(model)
    if official is None and organisation != "google":
        official = _official_base(folder if folder.is_dir() else _download(*_parse(target), [CARD]))
        if official is not None:
            warn(f"{target} is made of google/{official}, whose drafter is taken, google/{official}-assistant; a "
                 "drafter trained for it would guess better: pass that if there is one.")  # fmt: skip
    if official is not None:
        return f"google/{official}-assistant"
    raise MtpError(
        f"no drafter is known for {target}: it is none of the official Gemma 4 targets (google/gemma-4-...-it), its "
        f"{CARD} names none as its base_model, and no folder {model}-assistant lies beside it; pass the drafter."
    )


def official_name(model: str) -> str | None:
    """An official target's name as the hub spells it, whatever the case of its letters; None for any other name."""
    found = OFFICIAL.fullmatch(model)
    if found is None:
        return None
    size = next(size for size in SIZES if size.lower() == found[1].lower())
    return f"gemma-4-{size}-it{(found[2] or '').lower()}"


def _official_base(folder: Path) -> str | None:
    """The official target that the model card of a folder names as what it was made of, if that is one and no other."""
    from gemma_mtp.convert.model_card import read_card

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out of a card is said when it is converted
        bases = read_card(folder / CARD).get("base_model")
    named = [str(each) for each in (bases if isinstance(bases, list) else [bases])]
    found = {official_name(each.rpartition("/")[2]) for each in named} - {None}
    return found.pop() if len(found) == 1 else None
