"""Contents in pieces of several types, as the requests of two of the APIs have them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import Discriminator

from zmoe.server.fields import refused


def listed(kind: str, pieces: str) -> Callable[[Any], Any]:
    """A validator that makes a list of a text: of one piece of the type `kind`. `pieces` is what
    the API calls them.
    """

    def as_list(given: Any) -> Any:
        if isinstance(given, str):
            return [{"type": kind, "text": given}]
        if not isinstance(given, list):
            raise refused(f"is neither a text nor a list of {pieces}")
        return given

    return as_list


def check_is_text(given: Any, others: Collection[str], names: str) -> Any:
    """The type of a piece, unless it is one of `others`, of which people speak as `names`."""
    if isinstance(given, str) and given in others:
        raise refused(f"is {given!r}: the model takes text only, no {names}")
    return given


def by_type(problem: str) -> Discriminator:
    """Tells pieces apart by their type, each with a tag of type_tag()'s; `problem` is said of
    others.
    """
    message = f"is of an unsupported type: {problem}"
    return Discriminator(type_tag, custom_error_type="refused", custom_error_message=message)


def type_tag(given: Any) -> str:
    """The tag of a piece; the names of fields leave it out."""
    kind = given.get("type") if isinstance(given, Mapping) else getattr(given, "type", None)
    return f"type={kind}"
