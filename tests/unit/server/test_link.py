"""Requests that outlive the engine that they were given to."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
import zmq

from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Sampling
from zmoe.server import link as link_module
from zmoe.server.link import EngineError, EngineLink
from zmoe.server.messages import ENGINE, FRONT, Close, Output, Outputs, Ready, Submit

DEADLY, FRAGILE = 7, 8  # prompts: of one that ends every engine, of one that ends the first


def engine(address: str, model: str, spec: ClusterSpec, workers: object) -> None:
    """An engine that ends without a word after the first token of FRAGILE, and at DEADLY. Of the
    others it says the seed.
    """
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.connect(address)
        words = ["tiny", "f32", "none", 1, 1, 2, 1, 512, "even", "", "mlx", 1024, 4096, 0.0, ()]
        socket.send(ENGINE.encode(Ready(*words)))  # type: ignore[arg-type]
        while True:
            message = FRONT.decode(socket.recv())
            if isinstance(message, Close):
                return
            if not isinstance(message, Submit):
                continue
            if message.prompt == (DEADLY,):
                return
            given, seed = message.generated, message.sampling.seed
            assert seed is not None
            tokens, finish = (seed % 1000,), "" if given is None else "length"
            output = Output(message.number, tokens, (), finish, "", "", 0 if given else 1)
            socket.send(ENGINE.encode(Outputs((output,))))
            if given is None:
                return


async def ask(link: EngineLink, prompt: int) -> list[Output]:
    return [output async for output in link.generate((prompt,), Sampling())]


def test_a_request_goes_on_unless_two_engines_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "run_engine", engine)
    said: list[str] = []

    async def run() -> None:
        link = EngineLink("", ClusterSpec(), on_loading=print, on_notice=said.append)
        running = asyncio.ensure_future(link.run())
        try:
            while link.state != "ready":
                await asyncio.sleep(0.01)
            first, second = await ask(link, FRAGILE)
            assert first.tokens == second.tokens  # one seed
            assert (first.cached, second.cached, second.finish) == (1, 1, "length")
            assert link.restarts == 1
            with pytest.raises(EngineError, match="the cluster has ended: its process ended"):
                await ask(link, DEADLY)
            assert link.state == "failed"
            assert len(said) == 3
            with pytest.raises(EngineError, match="not ready"):
                await ask(link, FRAGILE)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    asyncio.run(asyncio.wait_for(run(), 60))
