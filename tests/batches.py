"""Many requests on the nodes of one process: alone, all at once, or as they come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.families import VOCAB
from tests.ranks import DEADLINE_S, rank_thread
from zmoe.batch.plan import Plan
from zmoe.batch.sequence import Sequence as Scheduled
from zmoe.cluster.node import Node
from zmoe.config import Batching, EngineConfig, Sampling, Timing
from zmoe.engine.base import Floats
from zmoe.engine.batcher import Batcher
from zmoe.engine.stream import Stream
from zmoe.exchange.local import connect_group
from zmoe.exchange.sockets import Context
from zmoe.loading import Skeleton, describe
from zmoe.placement.build import ways

PARALLEL, LARGEST_CHUNK = 32, 512
BLOCKS, FEW_BLOCKS = 256, 12  # more than any test fills; a few long requests

# Tokens, and the logarithms of their probabilities: these show every bit of the logits.
Given = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Ask:
    """A prompt and its settings, of which what follows is a function."""

    prompt: tuple[int, ...]
    sampling: Sampling


def asks(count: int = 40, tokens: int = 8, vocabulary: int = VOCAB) -> list[Ask]:
    """Greedy and sampled ones, with and without penalties; some begin or go on alike."""
    draw = random.Random(7)
    shared = draw.choices(range(vocabulary), k=150)
    settings: list[dict[str, Any]] = [
        {},
        {"temp": 1.0},
        {"temp": 0.8, "top_p": 0.9, "presence_penalty": 0.5},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temp": 1.5, "top_k": 20, "min_p": 0.02, "logit_bias": {3: 2.0}},
        {"temp": 0.5, "logit_bias": {token: 20.0 for token in (5, 9, 11)}},  # repeats itself
    ]
    out = []
    for number in range(count):
        prompt = draw.choices(range(vocabulary), k=draw.choice((1, 2, 7, 30, 70)))
        if number % 4 == 0:
            prompt = shared[: draw.choice((64, 100, 128, 150))] + prompt
        elif number % 4 == 1:  # as drafts like it
            prompt = prompt[:7] * draw.choice((3, 10))
        sampling = Sampling(
            **settings[number % len(settings)],
            max_tokens=60 if number % 12 == 5 else draw.randint(4, 2 * tokens),
            seed=number // 3,
            ignore_eos=True,
            logprobs=0,
        )
        out.append(Ask(tuple(prompt), sampling))
    return out


@dataclass(frozen=True)
class Served:
    """What the requests were given, and what happened meanwhile."""

    given: list[Given]
    most: int  # sequences in a step
    preemptions: int
    cached: int  # tokens of prompts that were not computed
    accepted: int  # drafts


class ThreadNodes:
    """The nodes of a cluster as threads of this process, over real sockets."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes, self._step = nodes, 1

    def run(self, plan: Plan) -> Floats | None:
        """Run a step on all of them."""
        self._step = plan.step + 1
        followers = [
            rank_thread(node.rank).start(lambda rank: self.nodes[rank].follow(plan), node.rank)
            for node in self.nodes[1:]
        ]
        logits = self.nodes[0].run(plan)
        assert all([over.wait(DEADLINE_S) for over in followers])
        return logits

    def batcher(self, blocks: int, chunk: int, speculate: str, parallel: int) -> Batcher:
        """One that knows no text yet, on caches that hold none."""
        for node in self.nodes:
            node.make_cache(BLOCKS)
        config = EngineConfig(prefill_chunk=chunk, parallel=parallel)
        batching, leader = Batching(speculate=speculate), self.nodes[0]
        made = Batcher(self.run, leader.engine, blocks, config, batching, leader.spans)
        made.scheduler.step = self._step  # their exchange goes on from there
        return made

    def alone(self, ask: Ask, chunk: int = LARGEST_CHUNK) -> Given:
        """What it is given by nodes that have seen no other."""
        return self.serve([ask], chunk=chunk, parallel=1).given[0]

    def serve(
        self,
        given: Sequence[Ask],
        *,
        chunk: int = LARGEST_CHUNK,
        blocks: int = BLOCKS,
        speculate: str = "off",
        parallel: int = PARALLEL,
        arrivals: random.Random | None = None,
    ) -> Served:
        """All at once, or as `arrivals` draws: in another order, late, beside others that are
        cancelled, and interrupted for want of blocks.
        """
        on = self.batcher(blocks, chunk, speculate, parallel)
        streams = [Stream(a.prompt, a.sampling, eos=(), context=None) for a in given]
        todo = [(0, stream, 10**9) for stream in streams]  # arrival and end, as steps
        if arrivals is not None:
            scheduler, memory = on.scheduler, on.scheduler._memory
            grow = memory.grow

            def grow_at_times(sequence: Scheduled, end: int) -> bool:
                """Refuse it, so that one is preempted, but never the last one."""
                refused = scheduler.running > 1 and arrivals.random() < 0.5
                return not refused and grow(sequence, end)

            memory.grow = grow_at_times  # type: ignore[method-assign]
            others = [
                Stream(a.prompt, replace(a.sampling, max_tokens=200), eos=(), context=None)
                for a in given[::4]
            ]
            todo = [(arrivals.randrange(40), stream, 10**9) for stream in streams]
            todo += [
                (at := arrivals.randrange(40), s, at + arrivals.randrange(150)) for s in others
            ]
            arrivals.shuffle(todo)
            todo.sort(key=lambda each: each[0])
        running: dict[int, tuple[Stream, int]] = {}
        seen: list[Scheduled] = []
        most = step = 0
        while todo or running:
            while todo and todo[0][0] <= step:
                _, stream, end = todo.pop(0)
                number = on.submit(stream)
                running[number] = stream, end
                seen.append(on.scheduler._sequences[number])
            for number, (stream, end) in list(running.items()):
                if stream.is_over() or step >= end:
                    on.end(number)
                    del running[number]
            on.step()
            most, step = max(most, on.scheduler.running), step + 1
        assert on.scheduler.running == on.scheduler.waiting == 0
        assert on.scheduler.available == blocks
        return Served(
            [[(pick.token, pick.logprob) for pick, _ in stream.ready] for stream in streams],
            most,
            sum(sequence.preemptions for sequence in seen),
            sum(sequence.cached for sequence in seen),
            sum(stream.timings.accepted for stream in streams),
        )


@contextmanager
def thread_nodes(
    folder: Path,
    isa: str,
    nodes: int = 1,
    schedule: str = "decentralized",
    placement: str = "experts",
    wire_dtype: str = "auto",
    policy: str = "selected",
    activations: str = "exact",
) -> Iterator[ThreadNodes]:
    """Nodes with the model in `folder`, of one thread each, or two of a single node."""
    info = describe(Skeleton(folder))
    settings = EngineConfig(
        prefill_chunk=LARGEST_CHUNK,
        parallel=PARALLEL,
        schedule=schedule,
        wire_dtype=wire_dtype,
        policy=policy,
        activations=activations,
    )
    slots = info.experts * len(info.moe_layers)
    placed = ways(info.shape, [1.0] * nodes, [slots] * nodes, schedule)[placement]()
    made = [Node(info, settings, Timing(), rank=r, nodes=nodes, session=9) for r in range(nodes)]
    context = Context()
    try:
        endpoints = [
            node.open_exchange("127.0.0.1", context, encrypted=False) for node in made if nodes > 1
        ]
        for node in made:
            node.use_isa(isa)
            node.place(placed)
        exchanges = [node.exchange for node in made if node.exchange is not None]
        connect_group(exchanges, [endpoints] * nodes, DEADLINE_S)

        def load(rank: int) -> None:
            made[rank].load_follower(lambda done, total: None)

        with mock.patch("zmoe.kernels.threads.pool_cores", lambda: 2 if nodes == 1 else 1):
            loading = [rank_thread(rank).start(load, rank) for rank in range(1, nodes)]
            made[0].load(lambda done, total: None)
            assert all([over.wait(DEADLINE_S) for over in loading])
        yield ThreadNodes(made)
    finally:
        for node in made:
            node.close()
        context.term()
