"""The life of a cluster: entered, stepped, closed, by whatever thread."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from zmoe.batch.plan import Plan, blocks_of, blocks_of_window
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.keeper import Lender
from zmoe.cluster.leader import Leader, OnManual, OnNotice, Progress
from zmoe.cluster.node import Node
from zmoe.cluster.resolver import OnChoice, PlacementResolver
from zmoe.cluster.resources import resources_of
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import DEFAULT_MODEL
from zmoe.engine.base import CachesEmptied, Floats
from zmoe.engine.batcher import Batcher
from zmoe.engine.draw import Draw, Drawn
from zmoe.engine.generate import SharedSteps
from zmoe.engine.prompt import open_tokenizer
from zmoe.engine.stream import Stream
from zmoe.errors import SettingError, ZmoeError
from zmoe.kernels.threads import is_native
from zmoe.loading import RECORDED, Skeleton, check_attention, describe, why_evaluated
from zmoe.perf.memory import states_kept
from zmoe.placement.estimate import NodeResources, cache_room
from zmoe.placement.types import ModelInfo
from zmoe.placement.usage import UsageRecorder

_PREFILLED_AGAIN = 4  # full steps, at most, for a node that returns
_LOG = logging.getLogger(__name__)
_UNKNOWN_CONTEXT = 1 << 17  # tokens, of a model that does not say


class Life:
    """What a Cluster is made of, and how it starts, steps and ends: one thread at a time."""

    _entered = False  # also of an object whose construction failed

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        nodes: int = 1,
        *,
        spec: ClusterSpec | None = None,
        progress: Progress | None = None,
        on_placement: OnChoice | None = None,
        on_manual: OnManual | None = None,
        on_notice: OnNotice | None = None,
        lender: Lender | None = None,
    ) -> None:
        if spec is not None and not isinstance(spec, ClusterSpec):
            raise SettingError("spec", f"is {spec!r}: expected a ClusterSpec")
        if spec is not None and nodes not in (1, spec.nodes):
            raise SettingError("nodes", f"is {nodes!r}, and spec.nodes {spec.nodes}: give one")
        if not isinstance(model, (str, Path)):
            raise SettingError("model", f"is {model!r}: expected a folder or a name")
        self.spec = spec if spec is not None else ClusterSpec(nodes=nodes)
        folder = resolve_model(str(model))
        self._skeleton = Skeleton(folder)
        self.info: ModelInfo = describe(self._skeleton, not is_native(self.spec.engine))
        window = self.spec.engine.max_kv_size
        if window is not None and self.info.has_own_cache:
            raise SettingError(
                "max_kv_size",
                f"is {window}: {self.info.model_type} has a cache of its own, which is no window",
            )
        heads = self._bytes_of_heads(folder, is_told=on_placement is not None)
        self._name = str(model) if _is_name(str(model)) else str(folder)
        self._progress: Progress = progress or (lambda rank, done, total: None)
        self._on_manual: OnManual = on_manual or (lambda commands: None)
        self._on_notice: OnNotice = on_notice or _LOG.warning
        self._lender = lender
        request, count, engine = self.spec.placement, self.spec.nodes, self.spec.engine
        records, info = self.spec.record_usage, replace(self.info, head_bytes=heads)
        evaluated = why_evaluated(info, self._skeleton.sites, engine, on_mlx=not is_native(engine))
        evaluated = evaluated or (RECORDED if records else "")
        self._resolver = PlacementResolver(request, info, count, engine, on_placement, evaluated)
        self._recorder = UsageRecorder(self.info) if records else None
        self._leader: Leader | None = None
        self._node: Node | None = None
        self._lock = threading.Lock()
        self._holder: int | None = None  # the thread that has the lock
        self._process = os.getpid()
        self._failed = ""  # why no step can follow
        self._closing = self._closed = False
        self._steps = SharedSteps()
        self._cancelled: deque[int] = deque()  # which any thread may append to
        self._begun = 0
        self._block_bytes = 1  # of MLX's caches, once a step has told
        self.notices: tuple[str, ...] = ()
        self.resources: list[NodeResources] = []  # by rank, of a cluster that was entered
        self.load_seconds = 0.0

    def _bytes_of_heads(self, folder: Path, is_told: bool) -> int:
        """Bytes of the weights that sharded attention divides: 0 where it is not asked for, nor
        the choice `is_told`. Raises SettingError if it is to be cut, and cannot be.
        """
        engine, nodes = self.spec.engine, self.spec.nodes
        can_be = not is_native(engine) and nodes > 1
        if engine.attention == "sharded" and not can_be:
            reason = "MLX does not compute" if is_native(engine) else "there is one node"
            raise SettingError("attention", f"is sharded: expected replicated, as {reason}")
        if engine.attention == "sharded":
            return check_attention(folder, nodes)
        with suppress(SettingError):
            return check_attention(folder, nodes) if can_be and is_told else 0
        return 0

    def __enter__(self) -> Self:
        with self._alone():
            if self._entered or self._closed:
                raise ZmoeError("this cluster was entered or closed before: make another one")
            self._entered = True
            try:
                self._start()
            except BaseException as error:
                self._failed = reason(error)
                self._end()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._failed = self._failed or reason(error)
        self.close()

    def __del__(self) -> None:
        if self._entered and not self._closed and not sys.is_finalizing():
            if os.getpid() == self._process:
                warnings.warn(f"{self!r} was not closed", ResourceWarning, 2, source=self)
            self.close()

    def close(self) -> None:
        """End every process of the cluster and free its memory; harmless when done twice.

        A step that another thread is running is waited for, or given up where it waits
        for a peer. In a forked child of the process that made the cluster, nothing happens.
        """
        if os.getpid() != self._process:
            return
        self._check_caller()
        self._closing = True  # no step begins from here on
        node = self._node
        if self._holder is not None and node is not None and node.exchange is not None:
            node.exchange.cancel()
        with self._alone():
            self._end()

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._leader is not None:
            self._leader.close(self._failed)
        elif self._node is not None:
            self._node.close()

    def _check_caller(self) -> None:
        """Raise ZmoeError in a forked child, and within another call of the same thread."""
        if os.getpid() != self._process:
            raise ZmoeError(
                f"this cluster belongs to process {self._process}, and this is {os.getpid()}: "
                "a forked child has to make its own"
            )
        if self._holder == threading.get_ident():
            raise ZmoeError("this cluster is in the middle of another call of this thread")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out."""
        self._check_caller()
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    @contextmanager
    def _running(self) -> Iterator[Node]:
        """As _alone(), of a cluster that was entered and has not ended."""
        with self._alone():
            yield self._check_running()

    def _check_running(self) -> Node:
        if self._closing or self._failed:
            raise ZmoeError(f"this cluster has ended: {self._failed or 'it was closed'}")
        if self._node is None:
            raise ZmoeError("this cluster is not running yet: enter it with `with` first")
        return self._node

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """What is raised within ends the cluster, also Ctrl-C: the ranks are out of step then."""
        try:
            yield
        except CachesEmptied:
            self._fit_caches()
            raise
        except BaseException as error:
            self._failed = reason(error)
            raise

    def _start(self) -> None:
        spec = self.spec
        if spec.nodes > 1:
            self._leader = Leader(
                self.info,
                self._name,
                spec,
                self._resolver,
                self._progress,
                self._on_manual,
                self._on_notice,
                self._lender,
            )
            self._node = self._leader.node
        else:
            self._node = Node(self.info, spec.engine, spec.timing)
        self._node.recorder, self._node.skeleton = self._recorder, self._skeleton
        if self._leader is not None:
            self._leader.launch()
        self.tokenizer = open_tokenizer(Path(self.info.path))
        self._load(self._node)

    def _load(self, node: Node) -> None:
        engine = self.spec.engine
        if self._leader is not None:
            self.notices, self.load_seconds = self._leader.start()
            self.resources = self._leader.resources
        else:
            limit = self.spec.placement.memory_limit
            self.resources = [resources_of(engine, limit, measure=False)]
            node.place(self._resolver.resolve(self.resources))
            shard, self.load_seconds = node.load(lambda d, t: self._progress(0, d, t))
            self.notices = shard.notices
        assert node.placement is not None
        blocks = 1
        if node.engine.paged:
            blocks = self._blocks_of(node, node.engine.block_bytes)
            (self._leader or node).make_cache(blocks)
        if self._leader is not None:
            self._leader.survive(blocks if node.engine.paged else 0)
            self._leader.take_emptied()  # no sequence has begun
        run = partial(Life._run, weakref.proxy(self))  # or a dropped cluster would stay
        begin = partial(Life._begin, weakref.proxy(self)) if node.engine.plans_ahead else None
        batching = self.spec.batching
        self._batcher = Batcher(run, node.engine, blocks, engine, batching, node.spans, begin)
        self._warm_up(node)
        self._block_bytes = node.engine.block_bytes
        self._fit_caches()
        if engine.parallel > 1 and not node.engine.can_batch:
            self.notices += (self._one_at_a_time(),)

    def _one_at_a_time(self) -> str:
        window = self.spec.engine.max_kv_size
        why = f"the caches of {self.info.model_type} hold one sequence each"
        if window is not None:
            why = f"max_kv_size is {window}, and only caches in the C kernels share such a window"
        return f"sequences run one at a time, the others wait: {why}"

    def _fit_caches(self) -> None:
        """Where caches are not paged, count the blocks that there is room for beside the weights,
        which only a step tells, and the loss of a node may change.
        """
        node = self._node
        assert node is not None
        if not node.engine.paged:
            self._batcher.scheduler.resize(self._blocks_of(node, self._block_bytes))

    def _blocks_of(self, node: Node, block_bytes: int) -> int:
        """How many blocks of keys and values there is room for, of what could be used."""
        config, placement, resources = self.spec.engine, node.placement, self.resources
        assert placement is not None
        if self._leader is not None and self._leader.view.slices:
            resources = [resources[rank] for rank in self._leader.view.nodes]
        mapped, schedule = is_native(config), config.schedule
        room = cache_room(self.info, resources, placement, mapped, schedule)
        longest = blocks_of(self.info.context_length or _UNKNOWN_CONTEXT)
        if config.max_kv_size is not None:
            longest = blocks_of_window(config.max_kv_size, config.max_rows)
        states = states_kept(config.parallel) * node.engine.state_bytes
        blocks = (room - states) // block_bytes
        # One sequence must be able to run, even where memory is tight.
        return max(longest, min(blocks, config.parallel * longest))

    def _warm_up(self, node: Node) -> None:
        """One step on the real path, so that the first token doesn't pay for it."""
        self._batcher.force([0], True)
        self._batcher.end_forced()
        node.spans.take()
        if self._recorder is not None:
            self._recorder.take()

    # ---- steps -----------------------------------------------------------------------

    def _run_step(self) -> None:
        self._admit()
        self._batcher.step()

    def _admit(self) -> None:
        """Let nodes in that have returned. Their caches are empty, and so are all then: what runs
        is prefilled again, which must not take long.
        """
        leader, most = self._leader, _PREFILLED_AGAIN * self.spec.engine.max_rows
        if leader is None:
            return
        if leader.node.divides:  # all would load anew meanwhile
            most = 0
        if leader.has_returned and self._batcher.forgets(most):
            leader.admit()
        if leader.take_emptied():
            self._batcher.forget()
            self._fit_caches()

    def _advance(self, stream: Stream) -> None:
        """Run a step, unless another thread has meanwhile run one that served `stream`."""
        with self._running():
            if not stream.ready and not stream.ended:
                self._end_cancelled()
                with self._stepping():
                    self._run_step()

    def _end_cancelled(self) -> None:
        """End the generations whose consumers have gone away."""
        while self._cancelled:
            self._batcher.end(self._cancelled.popleft())

    def _run(self, plan: Plan) -> Floats | None:
        assert self._node is not None
        with self._stepping():
            return (self._leader or self._node).run(plan)

    def _begin(self, plan: Plan, draws: Sequence[Draw]) -> Callable[[], Floats | Drawn | None]:
        assert self._node is not None
        with self._stepping():
            end = (self._leader or self._node).begin(plan, draws)

        def ended() -> Floats | Drawn | None:
            with self._stepping():
                return end()

        return ended


def _is_name(model: str) -> bool:
    return not Path(model).expanduser().is_dir()


def reason(error: BaseException) -> str:
    """What is said of it where the cluster has ended by it."""
    return str(error) or type(error).__name__
