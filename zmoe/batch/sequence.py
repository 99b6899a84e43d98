"""One request's tokens, and how far the steps have come with them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from zmoe.batch.blocks import Prefix
from zmoe.batch.drafts import Drafts


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Prompts share what they have in common only under the same `salt`. `borders` are numbers of
    tokens after which other prompts may go on differently, such as that of the system prompt:
    caches that cannot be cut (`exact`) are kept as they are there. One that was `accepted` before,
    by a cluster that has ended, waits however many others do.
    """

    tokens: Items[int]
    max_tokens: int
    salt: bytes = b""
    borders: tuple[int, ...] = ()
    accepted: bool = False


@dataclass(eq=False)
class Sequence:
    """A request that waits or runs.

    `tokens` are the prompt, of `prompt` tokens, and what has been sampled; at `limit` of them it
    ends. `position` is that of the next row that a plan will hold, and `ahead` the number of
    samples of steps that are planned and not yet advanced. While drafts are being verified
    (`verifying`) no further row can be planned.

    `blocks` are its blocks of keys and values, which hold `room` positions. The nodes know of the
    first `sent` of them, and `prefix` is the text of the first `kept`, where others find it.
    `cached` counts the prompt's tokens that needed no computing, and `queued` the seconds until
    the first admission, None before it.
    """

    id: int
    tokens: list[int]
    prompt: int
    limit: int
    salt: bytes
    submitted: float
    borders: list[int]
    drafts: Drafts | None
    position: int = 0
    ahead: int = 0
    verifying: bool = False
    blocks: list[int] = field(default_factory=list)
    sent: int = 0
    room: int = 0
    prefix: Prefix | None = None
    kept: int = 0
    cached: int = 0
    preemptions: int = 0
    queued: float | None = None
