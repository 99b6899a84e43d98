"""A worker's life: join, hello, endpoints, load, then one step after the other.

Where the leader is gone, a worker may wait for another one with what it has loaded (keep_alive).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from zmoe.batch.plan import Plan
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.hello import hello_of, hello_patience
from zmoe.cluster.member import Member
from zmoe.cluster.membership import Halted, join_view, open_view
from zmoe.cluster.messages import (
    MOST_NOTICES,
    AskMemory,
    AskTimes,
    Cache,
    Endpoints,
    Enter,
    Hello,
    Loaded,
    Loading,
    LoadPrefix,
    Memory,
    Message,
    Place,
    Ready,
    Setup,
    Step,
    Stop,
    Times,
    one_line,
)
from zmoe.cluster.node import Node
from zmoe.cluster.resources import peak_memory, resources_of
from zmoe.cluster.spec import WorkerSpec
from zmoe.cluster.survival import patience_of
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.config import Timing
from zmoe.errors import PeerError, ZmoeError
from zmoe.exchange.base import nothing
from zmoe.exchange.groups import backend_joined, can_open_door
from zmoe.exchange.keys import is_loopback
from zmoe.exchange.sockets import Context
from zmoe.kernels.arithmetic import arithmetic_of
from zmoe.kernels.threads import is_native
from zmoe.loading import Skeleton, describe
from zmoe.placement.estimate import NodeResources
from zmoe.recovery.actions import Connect, End, NodeAction, Open, Tell
from zmoe.recovery.messages import Evicted, FromLeader, Quiesce
from zmoe.recovery.node import NodeRecovery
from zmoe.recovery.view import ClusterView, first_view

IDLE_SLICE_S = 1.0
# After a step the next one is near: a core that sleeps meanwhile takes long to wake.
EAGER_S = 0.001
# A step that the leader plans ahead comes soon after the one before it has begun.
UNDER_WAY_S = 0.02
PROGRESS_INTERVAL_S = 0.1
_Begun = tuple[int, Callable[[], object]]  # a step's number, and what ends it
_REFUSED_S = 1.0  # between two attempts to join a leader that refuses us
_STILL_LOADED = "the weights of the run before were still loaded"


class Worker(Member):
    """A worker that computes its share of a model."""

    begins = Setup

    def __init__(
        self,
        spec: WorkerSpec,
        context: Context,
        on_setup: Callable[[Setup], None],
        on_notice: Callable[[str], None],
    ) -> None:
        """`on_setup` is called when a session begins, `on_notice(line)` when its leader is gone and
        another one may come. Raises InputError for a key file.
        """
        super().__init__(spec, context)
        self._on_setup, self._on_notice = on_setup, on_notice
        self._node: Node | None = None
        self._kept: tuple[Setup, NodeResources] | None = None  # of the run that the node has left
        self._is_loading = False
        self._recovery: NodeRecovery | None = None  # where steps can be repeated
        self._early: deque[Message] = deque()  # what came while this node was at something else
        self._under_way: _Begun | None = None

    def run(self) -> None:
        """Until the leader says stop; raises what went wrong, having told the leader."""
        try:
            setup = self.join(self.spec.join_timeout)
            while True:
                self._on_setup(setup)
                try:
                    self._serve(self._come_up(setup))
                    return
                except PeerError as lost:
                    if lost.rank != 0 or not setup.keep_alive:
                        raise
                    setup = self._outlive(setup, lost)
        except Exception as error:
            self.report(error)
            raise
        finally:
            if self._node is not None:
                self._node.close()
            self._bus.close()

    def _outlive(self, setup: Setup, lost: PeerError) -> Setup:
        """Wait for another leader, whose Setup is returned, with what is loaded if that can serve
        it. Raises `lost` where none comes within setup.keep_alive seconds.
        """
        until = time.monotonic() + setup.keep_alive
        self.report(lost)  # the leader may be there, and only our exchange with it broken
        self._early.clear()
        self._recovery, self._under_way, self._is_loading = None, None, False
        if self._node is not None and not self._node.retire():
            self._node.close()
            self._node = self._kept = None
        if backend_joined():  # which a process can do once
            raise lost
        self._on_notice(f"{lost}; waiting {setup.keep_alive:g} s for another leader there")
        while (left := until - time.monotonic()) > 0:
            self._bus.close()
            self._bus = self._dial()
            try:
                begun: Setup = self.join(left, for_others=setup.timing.join)
                return begun
            except ZmoeError:  # no leader of ours, or none yet that takes us
                time.sleep(max(0.0, min(_REFUSED_S, until - time.monotonic())))
        raise lost

    def _open(self, setup: Setup) -> tuple[Node, Hello]:
        """The node of this run, the one of the last run where that was of the same model and
        settings; and what to say of it.
        """
        skeleton = Skeleton(resolve_model(self.spec.model or setup.model))
        info = describe(skeleton, on_mlx=not is_native(setup.engine))
        node, kept, session = self._node, self._kept, self._bus.session
        if node is not None and kept is not None and kept[0] == setup and node.info == info:
            offer, endpoint = kept[1], node.reopen(session)
        else:
            if node is not None:
                node.close()
            nodes, rank = setup.nodes, self.spec.rank
            self._node = node = Node(
                info, setup.engine, setup.timing, rank=rank, nodes=nodes, session=session
            )
            limit = setup.memory_limit if self.spec.memory_limit is None else self.spec.memory_limit
            # On loopback all nodes are on one machine, and count as equal.
            offer = resources_of(setup.engine, limit, measure=not is_loopback(self.spec.bind))
            encrypted = self._keys is not None
            endpoint = node.open_exchange(
                self.spec.bind, self._context, encrypted=encrypted, ports=setup.ports
            )
        node.skeleton = skeleton
        self._kept = (setup, offer)
        return node, hello_of(info, arithmetic_of(setup.engine), offer, endpoint)

    def _come_up(self, setup: Setup) -> Node:
        timing = setup.timing
        self._bus.grace = timing.grace
        node, hello = self._open(setup)
        self._bus.send(hello)
        patience = hello_patience(setup.model, timing)  # until the others have said theirs
        told = self._bus.receive(patience)
        if isinstance(told, Enter):
            node.place(told.placement)
            node.use_isa(told.isa)
            node.learn(told.figures)
            node.divides = told.divides
            if node.divides and not can_open_door():
                raise ZmoeError(
                    "MLX_MPI_LIBNAME is set, or another run of the same process exchanges in MLX's "
                    "graph, as the run that this node would enter does"
                )
        else:
            self._meet(node, told, timing)
        notices: tuple[str, ...] = (_STILL_LOADED,) if node.is_loaded else ()
        seconds = 0.0
        if not (node.is_loaded or node.divides):  # the view that it enters says what it loads
            self._is_loading = True
            share, seconds = node.load_follower(_Throttled(self._bus, self._listen))
            self._is_loading = False
            notices = tuple(one_line(notice) for notice in share.notices[:MOST_NOTICES])
        assert node.placement is not None
        if isinstance(told, Enter) and told.blocks:
            node.make_cache(told.blocks)
        if node.can_go_on:
            assert node.exchange is not None
            node.exchange.tick = self._listen_in_step
            view = None if isinstance(told, Enter) else first_view(node.nodes, node.session)
            self._recovery = NodeRecovery(node.rank, view, patience_of(timing).silence)
        self._bus.send(Ready(seconds, node.placement.digest, notices))
        return node

    def _meet(self, node: Node, told: Message | None, timing: Timing) -> None:
        """Connect with the other nodes, which begin as we do."""
        if isinstance(told, Stop):
            raise self.stopped(told.error or "too early")
        if told is not None and not isinstance(told, Place):
            raise self.unexpected(told)
        endpoints = self.expect(Endpoints, timing.join)
        if told is None or endpoints is None:
            raise ZmoeError(f"leader {self.spec.leader} did not say who owns what and who is where")
        node.place(told.placement)
        node.use_isa(endpoints.isa)
        node.connect(endpoints.nodes, self._listen)

    def _listen(self) -> None:
        """While busy with something else: notice a leader that is gone or says stop."""
        self.expect(Endpoints, 0)
        assert self._node is not None
        try:
            self._node.service()
        except PeerError:
            if not self._is_loading:  # else the leader sees it, too, and says what follows
                raise

    def _serve(self, node: Node) -> None:
        eager_until = 0.0
        while True:
            message = self._early.popleft() if self._early else self._bus.take()
            if message is None and self._under_way is not None:  # MLX has the exchange meanwhile
                message = self._bus.receive(UNDER_WAY_S)
                if message is None:
                    self._run(node)
            if message is None and time.monotonic() < eager_until:
                os.sched_yield()
            elif message is None:
                self._between_steps(node)
                self._bus.wait(node.poll_sockets(), IDLE_SLICE_S)
            elif isinstance(message, Step):
                self._run(node, message.plan)
                eager_until = time.monotonic() + EAGER_S
            elif isinstance(message, FromLeader) and self._recovery is not None:
                self._under_way = None
                self._do(self._recovery.receive(message, time.monotonic()))
            elif isinstance(message, Cache):  # once the slowest node has loaded
                node.make_cache(message.blocks)
            elif isinstance(message, LoadPrefix):
                node.load_prefix(Path(message.path), message.places, message.digest)
                self._bus.send(Loaded())
            elif isinstance(message, AskMemory):
                self._bus.send(Memory(peak_memory()))
            elif isinstance(message, AskTimes):
                self._bus.note(Times(message.round, *node.take_times()))
            elif isinstance(message, Stop):
                if message.error:
                    raise self.stopped(message.error)
                return
            else:
                raise self.unexpected(message)

    def _run(self, node: Node, plan: Plan | None = None) -> None:
        """Begin a step, if there is one, and end the one before it, unless the loss of a node does.
        A step that is not under way afterwards has ended, too.
        """
        if plan is not None and self._recovery is not None and not self._recovery.takes(plan.step):
            return
        before, self._under_way = self._under_way, None
        try:
            if plan is not None:
                self._bus.step = plan.step
                self._under_way = (plan.step, node.follow(plan))
            if before is not None:
                self._finish(before)
            if self._under_way is not None and self._under_way[1] is nothing:
                self._finish(self._under_way)
                self._under_way = None
        except PeerError as lost:
            self._under_way = None
            if self._recovery is not None:
                self._lose(lost)
                return
            if lost.rank == 0:
                self._look_for_cause(lost)
            raise
        except Halted:  # a step behind this one is dropped with it
            self._under_way = None
            self._early = deque(each for each in self._early if not isinstance(each, Step))

    def _finish(self, begun: _Begun) -> None:
        step, end = begun
        end()
        if self._recovery is not None:
            self._recovery.finish(step)

    # ---- going on without a node that is lost ---------------------------------------------

    def _lose(self, lost: PeerError) -> None:
        node, recovery = self._node, self._recovery
        assert node is not None and recovery is not None and recovery.view is not None
        if node.divides:  # others may be deep in MLX, where only a lost link tells them
            node.leave()
        self._do(recovery.lost(recovery.view.hosts[lost.rank], time.monotonic()))

    def _between_steps(self, node: Node) -> None:
        if self._recovery is None:
            node.service()
            return
        self._do(self._recovery.tick(time.monotonic()))
        try:
            node.service()
        except PeerError as lost:
            self._lose(lost)

    def _listen_in_step(self) -> None:
        """Raises Halted where the leader wants something else than what is under way."""
        message = self._bus.take()
        if message is not None:
            self._early.append(message)
            if isinstance(message, (Quiesce, Evicted, Stop)):
                raise Halted

    def _do(self, actions: Sequence[NodeAction]) -> None:
        """What the recovery asks for."""
        node, recovery = self._node, self._recovery
        assert node is not None and recovery is not None
        for action in actions:
            if isinstance(action, Tell):
                self._bus.send(action.message)
            elif isinstance(action, Open):
                view = action.view
                self._do(recovery.opened(view.epoch, open_view(node, view), time.monotonic()))
            elif isinstance(action, Connect):
                with suppress(Halted):
                    self._connect(node, action.view, action.endpoints)
                    self._do(recovery.adopted(action.view.epoch))
            elif isinstance(action, End):
                raise action.error

    def _connect(self, node: Node, view: ClusterView, listeners: Sequence[object]) -> None:
        try:
            join_view(node, view, listeners, self._listen_in_step)
        except PeerError as lost:
            self._lose(lost)
            raise Halted from lost

    def _look_for_cause(self, lost: PeerError) -> None:
        """Raise what the leader said before it went, if it did."""
        message = None
        with suppress(PeerError):
            message = self._bus.take()
        if isinstance(message, Stop) and message.error:
            raise self.stopped(message.error) from lost


class _Throttled:
    """Passes load progress on to the leader, ten times a second at most, and listens to it."""

    def __init__(self, bus: WorkerBus, listen: Callable[[], None]) -> None:
        self._bus, self._listen, self._next = bus, listen, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + PROGRESS_INTERVAL_S
            self._bus.note(Loading(done, total))
            self._listen()
