"""The paper's starting point: a leader that does all but experts, and a message for each of them.

The leader computes attention and router. To the owner of each expert that a
layer chose it sends the rows, pickled; the owner computes that expert by
itself and sends its output back, pickled; the leader weighs and adds them. Its
own experts it computes meanwhile, as zmoe does. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import zmq
from process import PARENT, PeerFailure, checked, main, peak_bytes, pin
from recording import Recorder, by_layer, summary
from zmoe_cluster import flags, measure

from zmoe.batch.plan import blocks_of
from zmoe.checkpoint.hub import resolve_model
from zmoe.config import Batching, EngineConfig, Sampling
from zmoe.engine.batcher import Batcher
from zmoe.engine.engine import make_engine
from zmoe.engine.generate import Generation
from zmoe.engine.prompt import encode_prompt, open_tokenizer
from zmoe.engine.stream import Stream
from zmoe.errors import ZmoeError
from zmoe.exchange.base import Call, Partial, nothing
from zmoe.exchange.buffers import DTYPES
from zmoe.exchange.local import SingleNode
from zmoe.kernels.threads import best_isa_name, is_native, make_thread_pool
from zmoe.loading import Skeleton, describe, load_experts, load_shard
from zmoe.native import Dtype
from zmoe.placement.build import place_evenly
from zmoe.placement.pairs import LocalPairs
from zmoe.topology.cores import divide_cores

DEADLINE_S = 300.0  # for loading, and for one answer
POLL_MS = 500
UNKNOWN_CONTEXT = 1 << 17  # tokens, of a model that does not say
Host = npt.NDArray[Any]  # bfloat16 as uint16


def to_host(x: Any) -> Host:
    """Rows as numpy: `x` is an MLX array, or is numpy already."""
    if isinstance(x, mx.array):
        return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
    return x  # type: ignore[no-any-return]


# ---- worker ------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Rows for one expert (as its owner numbers it); like a zmoe DispatchBatch."""

    x: Host
    dtype: Dtype
    expert: int

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def width(self) -> int:
        return int(self.x.shape[1])

    def pairs(self) -> tuple[LocalPairs, Host]:
        every, first = np.arange(self.rows, dtype=np.int32), np.zeros(self.rows, np.int32)
        pairs = LocalPairs(every, first, np.full(self.rows, self.expert, np.int32))
        return pairs, np.ones((self.rows, 1), np.float32)


class Worker(SingleNode):
    """Whose experts to load."""


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Compute what the leader asks for until it says that this was all."""
    info = describe(Skeleton(resolve_model(options.model)))
    config = EngineConfig()
    pool = make_thread_pool(config, best_isa_name()) if is_native(config) else None
    placement = place_evenly(info.shape, options.nodes)
    worker = Worker()
    worker.rank = options.rank
    layers = load_experts(info, placement, worker, pool=pool).layers
    context = zmq.Context()
    link = context.socket(zmq.PAIR)
    link.connect(options.serve)
    link.send(pickle.dumps("ready"))
    while (asked := pickle.loads(link.recv())) is not None:
        start = time.perf_counter()
        layer, expert, dtype, rows = asked
        held = layers[layer]
        # As the central schedule's worker computes them, but of one expert at weight 1.
        outputs = held._by_arrays(Request(rows, dtype, int(held.local[expert])))
        outputs = np.array(outputs.astype(mx.float32))
        link.send(pickle.dumps((outputs, time.perf_counter() - start)))
    link.send(pickle.dumps(peak_bytes()))
    link.close()
    context.term()
    return {}


class Workers:
    """The processes of ranks 1 and up, and a link to each; a context manager."""

    def __init__(self, model: str, nodes: int) -> None:
        self._context = zmq.Context()
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        cores = divide_cores(nodes)
        for rank in range(1, nodes):
            link = self._links[rank] = self._context.socket(zmq.PAIR)
            port = link.bind_to_random_port("tcp://127.0.0.1")
            words = [model, "--nodes", str(nodes), "--rank", str(rank)]
            words += ["--serve", f"tcp://127.0.0.1:{port}"]
            if cores is not None:
                words += ["--cores", ",".join(map(str, cores[rank]))]
            self._processes[rank] = subprocess.Popen(
                [sys.executable, __file__, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, PARENT: str(os.getpid())},
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._context.destroy(linger=0)

    def send(self, rank: int, message: Any) -> None:
        self._links[rank].send(pickle.dumps(message))

    def receive(self, rank: int) -> Any:
        """The next answer of `rank`; PeerFailure when it is gone or too slow."""
        until = time.monotonic() + DEADLINE_S
        while not self._links[rank].poll(POLL_MS):
            if self._processes[rank].poll() is not None:
                raise PeerFailure(f"worker {rank} ended")
            if time.monotonic() > until:
                raise PeerFailure(f"worker {rank} did not answer within {DEADLINE_S:g} s")
        return pickle.loads(self._links[rank].recv())

    def finish(self) -> list[int]:
        """End all of them; their peak memory in bytes."""
        for rank in self._links:
            self.send(rank, None)
        return [self.receive(rank) for rank in self._links]


# ---- leader ------------------------------------------------------------------------


class NaiveReducer:
    """A zmoe.exchange.base.Reducer: rows go out expert by expert, outputs come back so."""

    rank, step, plan = 0, 0, 0

    def __init__(self, workers: Workers, placement: Any, spans: Recorder) -> None:
        self.nodes = placement.nodes
        self._workers, self._spans = workers, spans
        self._owners = [
            {expert: rank for rank, experts in enumerate(layer) for expert in experts}
            for layer in placement.owned
        ]
        # (rank, rows, their weights) of each expert that was asked for.
        self._asked: deque[tuple[int, Host, Host]] = deque()
        self.experts_s: list[list[float]] = []  # of each layer, by rank

    def sum_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """Outputs are sent in float32."""
        return dtype

    def takes_whole(self, call: Call) -> bool:
        """No: `dispatch` has the outputs computed."""
        return False

    def dispatch(
        self,
        call: Call,
        x: Any,
        x_dtype: mx.Dtype,
        ids: Host,
        weights: Host,
    ) -> None:
        """See zmoe.exchange.base.Reducer."""
        with self._spans.span("exchange"):
            x = to_host(x)
            for expert in np.unique(ids).tolist():
                owner = self._owners[call.layer][expert]
                if owner == self.rank:
                    continue
                rows, slots = np.nonzero(ids == expert)
                self._workers.send(owner, (call.layer, expert, DTYPES[x_dtype], x[rows]))
                self._asked.append((owner, rows, weights[rows, slots]))

    def all_reduce_host(
        self,
        call: Call,
        partial: Partial[Host],
        out: Host,
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """See zmoe.exchange.base.Reducer."""
        spent = [0.0] * self.nodes
        mine = partial(0, len(out)) if callable(partial) else partial
        with self._spans.span("exchange"):
            out[...] = 0 if mine is None else mine
            while self._asked:
                owner, rows, weights = self._asked.popleft()
                outputs, seconds = self._workers.receive(owner)
                out[rows] += weights[:, None] * outputs
                spent[owner] += seconds
        self.experts_s.append(spent)
        overlap()

    def all_reduce(
        self,
        call: Call,
        partial: Partial[mx.array],
        overlap: Callable[[], None] = nothing,
    ) -> mx.array:
        """See zmoe.exchange.base.Reducer."""
        out = np.empty((call.rows, call.width), np.float32)
        mine = partial(0, call.rows) if callable(partial) else partial
        own = None if mine is None else np.array(mine.astype(mx.float32))
        self.all_reduce_host(call, own, out, overlap)
        return mx.array(out).astype(call.dtype)


class Naive:
    """What measure() needs of a zmoe.Cluster."""

    def __init__(self, model: str, nodes: int, workers: Workers) -> None:
        start = time.perf_counter()
        folder, config = resolve_model(model), EngineConfig(parallel=1)
        self.info = describe(Skeleton(folder))
        placement = place_evenly(self.info.shape, nodes)
        self.tokenizer = open_tokenizer(folder)
        self._spans, self._workers = Recorder(), workers
        self._reducer = NaiveReducer(workers, placement, self._spans)
        pool = make_thread_pool(config, best_isa_name()) if is_native(config) else None
        shard = load_shard(self.info, placement, self._reducer, spans=self._spans, pool=pool)
        engine = make_engine(shard.model, self._reducer, config, shard.head, shard.paged)
        blocks = blocks_of(self.info.context_length or UNKNOWN_CONTEXT)
        if engine.paged:
            engine.make_cache(blocks)
        batching = Batching(speculate="off")
        self._batcher = Batcher(engine.run, engine, blocks, config, batching, self._spans)
        for rank in range(1, nodes):
            workers.receive(rank)
        self.load_seconds = time.perf_counter() - start

    def generate(self, prompt: str | Sequence[int], sampling: Sampling) -> Generation:
        """See zmoe.Cluster."""
        ids = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        eos, context = self.tokenizer.eos_token_ids, self.info.context_length
        stream = Stream(ids, sampling, eos=eos, context=context)
        number = self._batcher.submit(stream)

        async def advance() -> None:
            self._batcher.step()

        return Generation(
            stream,
            self.tokenizer,
            advance=self._batcher.step,
            advance_async=advance,
            cancel=lambda: self._batcher.end(number),
        )

    def peak_memory(self) -> list[int]:
        """By rank, in bytes; ends the workers."""
        return [peak_bytes(), *self._workers.finish()]

    def layer(self, count: int) -> dict[str, float]:
        """Recording.summary of the last `count` layers."""
        leader = by_layer(self._spans.log, exchanges=2)[-count:]
        others = np.array(self._reducer.experts_s)[-count:, 1:]
        return summary(leader, [leader[:, 0], *others.T])


def program() -> dict[str, Any]:
    made = flags(128, 64, 3)
    made.add_argument("--record", action="store_true", help="is done anyway")
    made.add_argument("--serve", help="of a worker: where its leader is")
    made.add_argument("--rank", type=int, default=0, help="of a worker")
    options = checked(made)
    if options.nodes < 2:
        made.error("--nodes must be at least 2")
    if options.about:
        return {"build": f"pyzmq {zmq.__version__}, pickle"}
    try:
        if options.serve is not None:
            return serve(options)
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(options.model, options.nodes))
            cores = divide_cores(options.nodes)
            pin(cores[0] if cores is not None else None)
            naive = Naive(options.model, options.nodes, workers)
            measured = measure(naive, options)
            steps = (options.tokens - 1) * len(naive.info.moe_layers)
            return {**measured, "layer": naive.layer(steps)}
    except ZmoeError as error:
        raise PeerFailure(str(error), error.exit_code) from None


if __name__ == "__main__":
    main(program)
