"""The model, machines and link that a user names to zmoe-plan: known ones, files, or the hub's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.config import DEFAULT_MODEL
from zmoe.errors import InputError, ModelError
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.model_config import read_shape
from zmoe.perf.profile import read_profile
from zmoe.perf.shape import Format, ModelShape, affine

BITS = (2, 3, 4, 5, 6, 8, 16, 32)
GROUPS = (32, 64, 128)
_HUB_S = 10.0  # to answer

Entry = TypeVar("Entry")


def look_up(flag: str, name: str, table: Mapping[str, Entry], otherwise: str = "") -> Entry:
    """The entry of `table` called `name`, in any case.

    Raises InputError with close names, all known names, and `otherwise`: what
    else the flag takes.
    """
    found = table.get(name.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.6)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    also = f", or {otherwise}" if otherwise else ""
    raise InputError(f'{flag} "{name}" is unknown{meant} (known: {", ".join(sorted(table))}{also})')


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


def find_machines(text: str) -> tuple[list[Machine], Link | None]:
    """Return the machines of --hardware, and the link of the first profile among them."""
    machines, link = [], None
    for name in text.split(","):
        if is_file(name):
            profile = read_profile(Path(name))
            machines.append(profile.machine)
            link = link or profile.link
        else:
            machines.append(look_up("--hardware", name, MACHINES, "the path of a profile"))
    return machines, link


def find_link(name: str | None, measured: Link | None) -> Link | None:
    """Return the link of --link or, without that flag, `measured`, that of --hardware."""
    if name is None:
        return measured
    if is_file(name):
        return read_profile(Path(name)).link
    return look_up("--link", name, LINKS, "the path of a profile")


def is_file(name: str) -> bool:
    """Return whether `name` is meant as the path of a file, and not as an entry of a table."""
    return name.endswith(".json") or "/" in name
