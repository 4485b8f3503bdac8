"""What llama-server is told of a pair: files, name, drafts, sampling, who may ask."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.convert import link
from gemma_mtp.runtime.pair import Wanted, named, projector_of, searched
from gemma_mtp.runtime.request import MOST, SAMPLING, DraftLength

# What the command decides, and llama-server must not be told otherwise behind its back.
DECIDED = {
    "-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "--host", "--port", "-a",
    "--alias", "--api-key", "--api-key-file", "--cors-origins", "-md", "--model-draft", "--spec-draft-model", "-hfd",
    "-hfrd", "--hf-repo-draft", "--models-dir", "--models-preset", "--rpc",
}  # fmt: skip
# Variables of the environment that llama-server reads and options of the command stand for.
VARIABLES = (
    "LLAMA_ARG_MODEL", "LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_ALIAS", "LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE",
    "LLAMA_ARG_CORS_ORIGINS", "LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_MMPROJ", "LLAMA_ARG_SPEC_TYPE",
    "LLAMA_ARG_SPEC_DRAFT_MODEL", "LLAMA_ARG_SPEC_DRAFT_N_MAX", "LLAMA_ARG_RPC",
)  # fmt: skip
# A setting of sampling: the key of a GGUF file that has it, llama-server's flag, its variable.
SAMPLED = {
    "temperature": ("general.sampling.temp", "--temp", "LLAMA_ARG_TEMPERATURE"),
    "top_k": ("general.sampling.top_k", "--top-k", "LLAMA_ARG_TOP_K"),
    "top_p": ("general.sampling.top_p", "--top-p", "LLAMA_ARG_TOP_P"),
    "min_p": ("general.sampling.min_p", "--min-p", "LLAMA_ARG_MIN_P"),
}
# Tokens of context where nobody says how many: enough for a long talk with tools, and 0.1 GB for E2B, 1.3 for 31B.
CONTEXT = 16384
# The format of a chat where the file has none; llama-server would write that of another model.
TEMPLATE = Path(__file__).with_name("gemma4.jinja")
# What can stand in a header of HTTP: printable ASCII, without spaces.
KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Served:
    """A target as it is served: its files, the name clients call it by, and why nothing drafts for it, if so."""

    header: link.Header
    name: str
    drafter: Path | None
    projector: Path | None
    undrafted: str | None

    def flags(self, length: DraftLength, variables: Mapping[str, str]) -> list[str]:
        """llama-server's flags for the files, the name, drafting and sampling.

        Args:
            length: tokens to draft in a round, or "auto" to go by cost and acceptance.
            variables: the environment.
        """
        made = ["-m", str(self.header.path), "--alias", self.name]
        types = [each for each in variables.get("LLAMA_ARG_SPEC_TYPE", "").split(",") if each not in ("", "none")]
        if self.drafter is not None:
            types += [] if "draft-mtp" in types else ["draft-mtp"]
            most = MOST if length == "auto" else length
            made += ["--spec-draft-model", str(self.drafter), "--spec-draft-n-max", str(most)]
            made += [] if length == "auto" else ["--spec-draft-adaptive", "off"]
        else:
            types = [each for each in types if each != "draft-mtp"]
        made += ["--spec-type", ",".join(types) or "none"]
        made += ["--no-mmproj"] if self.projector is None else ["--mmproj", str(self.projector)]
        if "tokenizer.chat_template" not in self.header.metadata:
            made += ["--chat-template-file", str(TEMPLATE)]
        for setting, (key, flag, variable) in SAMPLED.items():
            if key not in self.header.metadata and variable not in variables:
                made += [flag, str(SAMPLING[setting])]
        return made

    def context(self, wanted: int | None) -> int:
        """Tokens of context: what is wanted, else `CONTEXT`, if the model was trained for as many."""
        trained = int(self.header.of_arch("context_length", CONTEXT))
        return min(CONTEXT, trained) if wanted is None else wanted


def served(target: str, drafter: Wanted, projector: Path | None, images: bool, name: str | None) -> Served:
    """A target with what belongs to it, checked.

    Args:
        target: a GGUF file, the folder that a conversion wrote, or the name of a model of Ollama.
        drafter: as for `gemma_mtp.runtime.pair.drafter_of`.
        projector: its file, None for the target's own.
        images: whether to look for one.
        name: what clients call it, None for what the file calls itself, or for the name of Ollama's model.

    Raises:
        gemma_mtp.convert.link.MtpError: there is no such target, a file is damaged, or not the target's.
    """
    found, wanted = named(target, drafter)
    model = None if Path(target).exists() else link.find_model(target)
    path = Path(found)
    drafts, missing = searched(path, wanted)
    header = link.read_header(path)
    projector = projector_of(target, header, projector or ("auto" if images else None))
    # A comma would make two names of one.
    own = target if model else str(header.metadata.get("general.name") or path.stem).replace(",", " ")
    return Served(header, name or own, drafts, projector, missing)


def check_flags(flags: Sequence[str]) -> None:
    """Refuse what would serve something else, or elsewhere, than was checked and is told.

    Raises:
        ValueError: there is such a flag.
    """
    for flag in flags:
        if flag.replace("_", "-") in DECIDED:
            raise ValueError(f"{flag} is not passed on to llama-server; see the options of gemma-mtp serve for it.")


def check_keys(host: str, keys: str | None, file: Path | None) -> None:
    """Refuse to let everybody in from elsewhere, and keys that no client can send.

    Args:
        host: addresses to listen at, between commas.
        keys: keys, between commas.
        file: a file with a key a line; lines that begin with # are none.

    Raises:
        ValueError: this is so; or the file cannot be read.
    """
    given = [] if keys is None else [("--api-key", key) for key in keys.split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as problem:
            raise ValueError(f"{file} with API keys cannot be read: {problem}.") from None
        kept = [(f"line {place} of {file}", key) for place, key in enumerate(lines, 1) if key and key[0] != "#"]
        if not kept:
            raise ValueError(f"{file} holds no API key; write one a line, or anybody could ask.")
        given += kept
    for where, key in given:
        if not KEY.fullmatch(key):
            raise ValueError(
                f"the API key of {where} cannot be sent in an HTTP header: take printable ASCII, without spaces."
            )
    if not given and not all(is_loopback(each) for each in host.split(",")):
        raise ValueError(
            f"{host} can be reached from other machines, where anybody could ask; pass --api-key or --api-key-file."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def environment(keys: str | None) -> dict[str, str]:
    """The environment for llama-server: as here, without what options stand for, with keys that `ps` must not show."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept if keys is None else {**kept, "LLAMA_API_KEY": keys}
