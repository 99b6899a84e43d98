"""The process that serves clients: its settings, and what its endpoints share."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe import __version__
from zmoe.config import SECONDS, Setting, Settings, whole
from zmoe.server.errors import ApiError
from zmoe.server.generation import Generator
from zmoe.server.grammar import Grammars
from zmoe.server.link import EngineLink
from zmoe.server.prompts import Prompts

T = TypeVar("T")
_PORT = whole("a port from 1 to 65535", 1, 65535)
_HOST_HELP = "Address to listen on; others than loopback let other machines in"
_NAME_HELP = "Name under which clients ask for the model (default: that of --model)"
_KEYS_HELP = "File with the keys that clients may use, one per line (default: none is needed)"
_TEMPLATE_HELP = "Jinja chat template to use in place of the model's"


@dataclass(frozen=True)
class ServeConfig(Settings):
    """How clients are served.

    `timeout`: the longest that a request may take, in seconds. `drain`: how long requests that
    run may go on after SIGTERM.
    """

    host: Annotated[str, Setting(_HOST_HELP)] = "127.0.0.1"
    http_port: Annotated[int, Setting("Port to listen on", _PORT, "--port")] = 8080
    served_model_name: Annotated[str | None, Setting(_NAME_HELP, metavar="NAME")] = None
    api_key_file: Annotated[Path | None, Setting(_KEYS_HELP, metavar="FILE")] = None
    chat_template: Annotated[Path | None, Setting(_TEMPLATE_HELP, metavar="FILE")] = None
    ssl_certfile: Annotated[Path | None, Setting("TLS certificate", metavar="FILE")] = None
    ssl_keyfile: Annotated[Path | None, Setting("TLS private key", metavar="FILE")] = None
    timeout: Annotated[float, Setting(limit=SECONDS)] = 3600.0
    drain: Annotated[float, Setting(limit=SECONDS)] = 30.0


@dataclass
class Front:
    """What the endpoints share. `model` is the name that clients ask for."""

    config: ServeConfig
    model: str
    link: EngineLink
    tokenizer: TokenizerWrapper
    created: int  # Unix time
    is_draining: bool = False
    prompts: Prompts = field(init=False)
    generator: Generator = field(init=False)
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.tokenizer)
        self.generator = Generator(self.link, self.tokenizer)
        self.grammars = Grammars(self.tokenizer)
        self._renderer = ThreadPoolExecutor(4, "zmoe-prompts")  # one long prompt holds up no other
        self._renderer.submit(self.grammars.prepare)

    @property
    def fingerprint(self) -> str:
        """What stands for the software and the cluster: answers may change with it."""
        ready = self.link.ready
        known = (__version__, self.model, ready and (ready.layers, len(ready.nodes)))
        return f"fp_{hashlib.blake2b(repr(known).encode(), digest_size=5).hexdigest()}"

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and text, None where that is unlimited or not known yet."""
        ready = self.link.ready
        return ready.context or None if ready is not None else None

    @property
    def status(self) -> str:
        """Whether requests can run: loading, ready, failed, closing or closed."""
        return "closing" if self.is_draining else self.link.state

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a model that is not served; None is the one that is."""
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"the model {name!r} does not exist: this server has {self.model!r}",
                "model",
                "model_not_found",
            )

    def check_ready(self) -> None:
        """Raise ApiError while no request can run."""
        if self.is_draining:
            raise ApiError(503, "the server is closing", code="closing")
        if self.link.state != "ready":
            because = f": {self.link.reason}" if self.link.reason else ""
            raise ApiError(503, f"the model is {self.link.state}{because}", code=self.link.state)

    def room(self, prompt_tokens: int, param: str) -> int:
        """The most tokens that fit behind a prompt. Raises ApiError, naming the field `param`,
        where that is none.
        """
        ready = self.link.ready
        if ready is None:
            raise ApiError(503, f"the model is {self.link.state}", code=self.link.state)
        if not ready.context:
            return max(1, ready.capacity)
        if prompt_tokens >= ready.context:
            raise ApiError(
                400,
                f"{param} has {prompt_tokens} tokens, and the model's context {ready.context}: "
                f"shorten it to at most {ready.context - 1}",
                param,
                "context_length_exceeded",
            )
        return ready.context - prompt_tokens

    async def apart(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of `function`, in a thread of those that render prompts."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._renderer, partial(function, *args, **kwargs))
