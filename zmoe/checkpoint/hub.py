"""From the name that a user gives to a folder on this machine."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from zmoe.config import DEFAULT_MODEL
from zmoe.errors import ModelError

_PATTERNS = [
    *("*.json", "model*.safetensors", "experts-*.safetensors"),
    *("*.txt", "*.model", "*.jinja", "*.tiktoken"),
]


def resolve_model(name: str, argument: str = "model") -> Path:
    """The checkpoint folder of `name`: the embedded model, a folder, or a Hugging Face repo.

    A repo is taken from, or downloaded into, the hub's cache (HF_HOME and
    HF_HUB_OFFLINE are respected). Raises ModelError naming it and the command's
    `argument` that it was.
    """
    if name == DEFAULT_MODEL:
        return Path(str(files("zmoe") / "data" / DEFAULT_MODEL))
    if not name:
        raise ModelError(f"{argument} is empty: expected a folder or a Hugging Face name")
    folder = Path(name).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise ModelError(f"{argument} {name}: cannot be read: {error.strerror}") from None
    if is_folder:
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ModelError(f"{argument} {name}: cannot be read: Permission denied")
        return folder.resolve()
    if exists:
        raise ModelError(f"{argument} {name}: is a file; expected a folder with config.json")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{argument} {name}: no such folder, nor a Hugging Face name (org/model)")
    return _download(name, argument)


def _download(repo: str, argument: str) -> Path:
    # Only here: importing the hub's client takes a noticeable part of a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{argument} {repo}: not in the local Hugging Face cache, and the hub is out of reach"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{argument} {repo}: cannot be had from the hub: {reason}") from error
