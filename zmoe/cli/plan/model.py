"""Find the shape of the model that a user names to zmoe-plan, without reading weights."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from zmoe.cli.plan.known_models import MODELS
from zmoe.cli.plan.lookup import look_up
from zmoe.config import DEFAULT_MODEL
from zmoe.errors import InputError, ModelError
from zmoe.perf.model_config import read_shape
from zmoe.perf.shape import Format, ModelShape, affine

BITS = (2, 3, 4, 5, 6, 8, 16, 32)
GROUPS = (32, 64, 128)
_HUB_S = 10.0  # to answer


def find_model(name: str, bits: int | None, group_size: int | None) -> ModelShape:
    """Return the shape of `name`: an entry of the table, a folder, or a Hugging Face repo.

    Only the config.json of a repo is downloaded (HF_HOME and HF_HUB_OFFLINE are
    respected). If `bits` is None, weights are stored as published. Raises InputError
    naming flag, file or repo.
    """
    weights = _format(bits, group_size)
    if not name:
        raise ModelError("--model is empty: expected a model")
    if name == DEFAULT_MODEL:
        return read_shape(Path(str(files("zmoe") / "data" / name / "config.json")), name, weights)
    folder = Path(name).expanduser()
    if folder.is_dir() and name.lower() not in MODELS:
        return read_shape(folder / "config.json", folder.resolve().name, weights)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] not in ".~":
        return read_shape(_download(name), name, weights)
    if "/" in name or name.startswith((".", "~")):
        raise ModelError(f"--model {name}: no such folder, nor a Hugging Face name (org/model)")
    other = "a folder with config.json, or a Hugging Face name"
    shape = look_up("--model", name, MODELS, other)
    return shape if weights is None else shape.with_format(weights)


def _format(bits: int | None, group_size: int | None) -> Format | None:
    if group_size is not None and (bits is None or bits >= 16):
        raise InputError("--group-size has no use without --bits of 8 or fewer")
    if group_size not in (None, *GROUPS):
        raise InputError(f"--group-size is {group_size}: expected one of {_listed(GROUPS)}")
    if bits is None:
        return None
    if bits not in BITS:
        raise InputError(f"--bits is {bits}: expected one of {_listed(BITS)}")
    return affine(bits) if group_size is None else affine(bits, group_size)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _download(repo: str) -> Path:
    # Only here: importing the hub's client takes a noticeable part of a second.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        reached = True
        try:  # hf_hub_download would try six times, and say so each time
            get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=_HUB_S)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception:  # which errors mean "no connection" depends on the hub's HTTP client
            reached = False
        return Path(hf_hub_download(repo, "config.json", local_files_only=not reached))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"--model {repo}: its config.json is not in the local Hugging Face cache, and the hub "
            "is out of reach"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--model {repo}: cannot be had from the hub: {reason}") from error
