"""The process that leads the cluster: requests come in, tokens go out, step after step."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NoReturn

import zmq

from zmoe.batch.plan import BLOCK
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.keeper import Lender
from zmoe.cluster.launch import ask_for_nodes
from zmoe.cluster.spec import ClusterSpec
from zmoe.engine.sampler import Pick
from zmoe.engine.stream import Constraint, Stream
from zmoe.errors import InputError, QueueFullError, QueueTimeoutError, ZmoeError
from zmoe.placement.choose import Choice
from zmoe.server.compiler import Compiler
from zmoe.server.grammar import Grammars
from zmoe.server.messages import (
    ENGINE,
    FRONT,
    Abort,
    Close,
    Ended,
    Loading,
    Logprobs,
    NodeStatus,
    Notice,
    Output,
    Outputs,
    Ready,
    Stats,
    Submit,
    TokenLogprob,
)

IDLE_MS = 200  # between two looks at the nodes while nobody asks for anything
_WAITING_PER_SEQUENCE = 4  # requests that may wait for each one that may run
_STATS_S = 1.0
_MEMORY_S = 15.0  # the other nodes have to be asked
_LINGER_MS = 2000


def run_engine(address: str, model: str, spec: ClusterSpec, workers: Connection | None) -> None:
    """Lead a cluster and serve the front that listens at `address` (ZeroMQ), until it says
    Close, ends, or this process gets SIGTERM. What goes wrong is told in an Ended. `workers`: a
    pipe to the front's Keeper, where workers outlive this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us, too: the front sends Close
    signal.signal(signal.SIGTERM, _terminate)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    # What waits here for the front is bounded by what the running requests may generate.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.connect(address)
    try:
        _EngineProcess(socket, model, spec, workers).run()
    except Exception as error:  # told to the front, whose place it is to say it
        reason = str(error) if isinstance(error, ZmoeError) else f"{type(error).__name__}: {error}"
        with suppress(zmq.ZMQError):
            socket.send(ENGINE.encode(Ended(reason, isinstance(error, InputError))))
        raise SystemExit(1) from None
    finally:
        socket.close()
        context.term()


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(143)


def with_bounded_queue(spec: ClusterSpec) -> ClusterSpec:
    """`spec` with a limit of the requests that wait, if it has none."""
    if spec.batching.max_queue is not None:
        return spec
    most = _WAITING_PER_SEQUENCE * spec.engine.parallel
    return replace(spec, batching=replace(spec.batching, max_queue=most))


class _Request:
    """A request that has not ended."""

    def __init__(self, stream: Stream, cancel: Callable[[], None], logprobs: bool) -> None:
        self.stream, self.cancel, self.logprobs = stream, cancel, logprobs


class _EngineProcess:
    def __init__(
        self,
        socket: zmq.Socket[bytes],
        model: str,
        spec: ClusterSpec,
        workers: Connection | None,
    ) -> None:
        self._socket, self._model, self._spec = socket, model, with_bounded_queue(spec)
        self._lender = Lender(workers) if workers is not None else None
        self._parent = multiprocessing.parent_process()
        self._requests: dict[int, _Request] = {}
        self._closing = False
        self._next_stats = self._next_memory = self._told_loading = 0.0
        self._memory: list[int] = []
        self._placement = ("", "")  # its name, and why it was chosen

    def _tell(self, message: object) -> None:
        self._socket.send(ENGINE.encode(message))

    def run(self) -> None:
        """Load, then serve until the end. Raises what ends the cluster."""
        with Cluster(
            self._model,
            spec=self._spec,
            progress=self._loading,
            on_manual=lambda commands: self._tell(Notice(ask_for_nodes(commands))),
            on_placement=self._chosen,
            on_notice=self._lost_or_back,
            lender=self._lender,
        ) as cluster:
            self._cluster, grammars = cluster, Grammars(cluster.tokenizer)
            grammars.prepare()  # all would wait for it
            most_waiting = self._spec.batching.max_queue
            assert most_waiting is not None
            self._compiler = Compiler(grammars, most_waiting + self._spec.engine.parallel)
            for notice in cluster.notices:
                self._tell(Notice(notice))
            self._tell(self._ready())
            try:
                while not self._closing:
                    self._receive()
                    self._begin_compiled()
                    cluster.step()
                    self._tell_tokens()
                    self._tell_stats()
                    if not self._requests and not self._compiler:
                        self._socket.poll(IDLE_MS)
            finally:
                self._compiler.close()

    def _check_front(self) -> None:
        if self._parent is not None and not self._parent.is_alive():
            self._closing = True

    def _loading(self, rank: int, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._told_loading > 0.1:
            self._told_loading = now
            self._tell(Loading(rank, done, total))
        self._check_front()
        if self._closing or (self._socket.poll(0) and isinstance(self._take(), Close)):
            raise SystemExit(0)

    def _chosen(self, choice: Choice) -> None:
        self._placement = (choice.label, choice.why)

    def _lost_or_back(self, notice: str) -> None:
        self._tell(Notice(notice))
        self._next_stats = 0.0  # they have changed

    def _take(self) -> object:
        return FRONT.decode(self._socket.recv())

    # ---- requests ----------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in what the front has sent."""
        while self._socket.poll(0):
            message = self._take()
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Abort):
                self._compiler.drop(message.number)
                request = self._requests.pop(message.number, None)
                if request is not None:  # otherwise it has just ended
                    request.cancel()
            else:
                self._closing = True

    def _submit(self, request: Submit) -> None:
        if not request.grammar:
            self._begin(request, None)
            return
        try:
            self._compiler.add(request)
        except QueueFullError as error:
            self._tell(Outputs((_failure(request.number, error),)))

    def _begin_compiled(self) -> None:
        """Begin the requests whose grammars have been compiled."""
        for request, found in self._compiler.take():
            if isinstance(found, ZmoeError):
                self._tell(Outputs((_failure(request.number, found),)))
            else:
                self._begin(request, found)

    def _begin(self, request: Submit, constraint: Constraint | None) -> None:
        try:
            stream = self._cluster.make_stream(
                request.prompt,
                request.sampling,
                borders=request.borders,
                salt=request.salt,
                constraint=constraint,
                generated=request.generated,
            )
            cancel = self._cluster.begin_stream(stream)
        except (InputError, QueueFullError) as error:
            self._tell(Outputs((_failure(request.number, error),)))
            return
        logprobs = request.sampling.logprobs is not None
        self._requests[request.number] = _Request(stream, cancel, logprobs)

    def _tell_tokens(self) -> None:
        outputs = []
        for number, request in list(self._requests.items()):
            stream = request.stream
            if stream.ready:
                outputs.append(self._output(number, request))
            if stream.ended:
                del self._requests[number]
                try:
                    stream.is_over()
                except ZmoeError as error:
                    outputs.append(_failure(number, error))
        if outputs:
            self._tell(Outputs(tuple(outputs)))

    def _output(self, number: int, request: _Request) -> Output:
        ready = request.stream.ready
        picks = [pick for pick, _ in ready]
        finish = ready[-1][1] or ""
        ready.clear()
        logprobs = tuple(map(_logprobs, picks)) if request.logprobs else ()
        cached = request.stream.timings.cached_tokens
        return Output(number, tuple(p.token for p in picks), logprobs, finish, "", "", cached)

    # ---- what the cluster is ---------------------------------------------------------------

    def _ready(self) -> Ready:
        cluster = self._cluster
        self._memory = cluster.peak_memory()
        info, (placement, reason) = cluster.info, self._placement
        window = self._spec.engine.max_kv_size
        context = 0 if window is not None else info.context_length or 0
        return Ready(
            model_type=info.model_type,
            dtype=info.dtype,
            quantization=info.quantization,
            layers=info.layers,
            moe_layers=len(info.moe_layers),
            experts=info.experts,
            top_k=info.top_k,
            vocabulary=info.vocabulary,
            placement=placement,
            placement_reason=reason,
            compute=cluster.compute,
            context=context,
            capacity=cluster.counts().blocks * BLOCK,
            load_seconds=cluster.load_seconds,
            nodes=tuple(self._node(rank) for rank in range(self._spec.nodes)),
        )

    def _node(self, rank: int) -> NodeStatus:
        cluster = self._cluster
        info, placement, offers = cluster.info, cluster.placement, cluster.resources
        experts = sum(len(layer[rank]) for layer in placement.owned)
        start, end = placement.slices[rank] if placement.slices else (0, info.moe_intermediate_size)
        share = experts * (end - start) / info.moe_intermediate_size
        listeners = cluster.listeners
        host, ports = listeners[rank] if listeners else (self._spec.address, [])
        machines = list(dict.fromkeys(offer.machine for offer in offers))
        offer = offers[rank]
        return NodeStatus(
            experts=experts,
            expert_share=share / (info.experts * len(info.moe_layers)),
            host=host,
            ports=tuple(ports),
            machine=machines.index(offer.machine),
            memory=offer.memory if offer.limit is None else offer.limit,
            peak_memory=self._memory[rank],
            speed=offer.speed,
        )

    def _tell_stats(self) -> None:
        now = time.monotonic()
        if now < self._next_stats:
            return
        self._next_stats = now + _STATS_S
        self._check_front()
        if now >= self._next_memory:
            self._next_memory, self._memory = now + _MEMORY_S, self._cluster.peak_memory()
        cluster = self._cluster
        counts, memory = cluster.counts(), tuple(self._memory)
        speeds = cluster.step_seconds, cluster.slow
        self._tell(Stats(counts, memory, cluster.links(), cluster.hosts, *speeds))


def _logprobs(pick: Pick) -> Logprobs:
    assert pick.logprob is not None
    return Logprobs(pick.logprob, tuple(TokenLogprob(*each) for each in pick.top_logprobs))


_KINDS: Sequence[tuple[type[ZmoeError], str]] = (
    (InputError, "input"),
    (QueueFullError, "queue_full"),
    (QueueTimeoutError, "queue_timeout"),
    (ZmoeError, "failed"),
)


def _failure(number: int, error: ZmoeError) -> Output:
    kind = next(name for of, name in _KINDS if isinstance(error, of))
    return Output(number, (), (), "error", kind, str(error), 0)
