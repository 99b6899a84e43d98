"""A node of a run: its exchange, the views that it enters, its steps."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import zmq

from zmoe.batch.plan import Plan, passes
from zmoe.batch.plan import check as check_plan
from zmoe.cluster.share import Share
from zmoe.config import EngineConfig, Timing
from zmoe.engine.base import Floats
from zmoe.engine.draw import Draw, Drawn
from zmoe.engine.mlx_caches import MlxEngine
from zmoe.engine.paged import PagedEngine
from zmoe.errors import SettingError
from zmoe.exchange.algorithm import Line
from zmoe.exchange.base import nothing
from zmoe.exchange.central import PAIR_BYTES
from zmoe.exchange.hosting import Hosting, HostingCentral, HostingExchange
from zmoe.exchange.keys import KeyPair
from zmoe.exchange.local import Endpoint, Exchange, payload_bytes
from zmoe.exchange.sockets import Context, Ports
from zmoe.placement.types import ModelInfo, Placement
from zmoe.topology.cores import set_affinity

T = TypeVar("T")


class Node(Share):
    """One node of a run, from its sockets to forward passes. A run may have a single node."""

    def __init__(
        self,
        info: ModelInfo,
        config: EngineConfig,
        timing: Timing,
        *,
        rank: int = 0,
        nodes: int = 1,
        session: int = 0,
    ) -> None:
        """`session`: a number that all nodes of the run carry in their frames.

        Raises SettingError for settings that do not go with the model, InputError for failpoints
        that are none.
        """
        if config.wire_dtype == "f16" and info.dtype != "float16":
            raise SettingError(
                "wire_dtype",
                f"is f16: {info.path} computes in {info.dtype}, whose range f16 lacks "
                "(65504 is its largest): expected bf16, f32 or q8",
            )
        super().__init__(info, config, rank, nodes)
        self.session, self._timing = session, timing
        # Since take_times() was called last: steps, the seconds that they took, and the seconds
        # that this node had waited in all by then.
        self._steps, self._step_s, self._waited_s = 0, 0.0, 0.0
        self._connected = False
        self._affinity: set[int] | None = None

    def pin(self, cores: Sequence[int]) -> None:
        """Keep this process on `cores` until close()."""
        self._affinity = os.sched_getaffinity(0)
        set_affinity(cores)

    def open_exchange(
        self, host: str, context: Context, *, encrypted: bool, ports: Ports | None = None
    ) -> Endpoint:
        """Bind the data sockets on `host`, an IPv4 address; returns where they listen.

        They are of the given context, and with `encrypted` they get keys for this run; `ports`
        are those to choose from. Raises InputError where that is not possible.
        """
        info, most = self.info, self._config.max_rows
        wire_dtype, width = self._config.wire_dtype, info.exchange_width
        row_bytes = payload_bytes(1, width, info.dtype, wire_dtype)
        make: Callable[..., Exchange] = HostingExchange
        if self._is_central:
            # Rows go out as the experts see them, in float32 at worst, with their pairs.
            row_bytes = width * 4 + info.top_k * PAIR_BYTES
            pairs = most * info.top_k  # and as many rows, where each pair has its own
            make = partial(HostingCentral, max_rows=pairs, max_pairs=pairs)
        self.exchange = make(
            self.rank,
            self.nodes,
            session=self.session,
            bind_host=host,
            max_payload_bytes=row_bytes * most,
            small_payload_bytes=row_bytes,
            batch_payload_bytes=row_bytes * self._config.parallel,
            deadline_s=self._timing.peer,
            grace_s=self._timing.grace,
            spans=self.spans,
            wire_dtype=wire_dtype,
            context=context,
            ports=ports,
            keys=KeyPair.fresh() if encrypted else None,
        )
        return self.exchange.endpoint

    def retire(self) -> bool:
        """Leave a run whose leader is gone; whether what is loaded can serve in another one.

        It cannot where MLX's graph may have the exchanges: loading is an exchange then.
        """
        if not self.is_loaded or not self.can_go_on:
            return False
        assert isinstance(self.exchange, Hosting) and self.placement is not None
        if self._team is None and not self.placement.unsliced:
            return False
        self._connected = False
        self.forget()
        if isinstance(self._engine, PagedEngine):
            self._engine.make_cache(0)
        self._adopted = {}
        self.exchange.retire()
        return True

    def reopen(self, session: int) -> Endpoint:
        """After retire(): listen for the nodes of another run of the same settings, that of
        `session`; returns where. place() drops what is loaded if that is another share.

        Raises InputError where no port is free.
        """
        self.session = session
        return self.host(session, (self.rank,))[self.rank]

    def connect(self, endpoints: Sequence[Endpoint], tick: Callable[[], None]) -> None:
        """Connect with the nodes at `endpoints` (by rank, this one's included), calling `tick`
        now and then; then measure the links. Call open_exchange() before.

        Raises LaunchError naming the ranks that do not connect within `timing.join`, and what
        `tick` raises.
        """
        assert self.exchange is not None
        self._reach("connect")
        self.exchange.connect(endpoints, self._timing.join, tick)
        if not self.exchange.choice.figures:
            self.exchange.calibrate()
        self._connected = True

    # ---- views, in which a node hosts the shards of others ---------------------------

    @property
    def can_go_on(self) -> bool:
        """Whether the others can go on without a node that is lost: not over MLX's backends."""
        on_mlx = isinstance(self._engine, MlxEngine) and not self._engine.plans_ahead
        may = self.can_undo or on_mlx or self.divides
        return isinstance(self.exchange, Hosting) and may

    def host(self, session: int, shards: Sequence[int]) -> dict[int, Endpoint]:
        """Leave the exchange for that of a new view, in which this node hosts `shards`, its own
        among them; returns where each listens. connect() joins the others.
        """
        assert isinstance(self.exchange, Hosting)
        self._reach("open")
        self._connected = False
        return self.exchange.host(session, [shard for shard in shards if shard != self.rank])

    def divide(
        self, session: int, nodes: Sequence[int], slices: Sequence[tuple[int, int]]
    ) -> tuple[Endpoint, ...]:
        """Drop the model and leave the exchange for that of a new view, whose `nodes` divide the
        experts into `slices`; returns where this one listens: nowhere, where it is alone.
        connect() joins the others, and load() reads the new part.

        Raises PlacementError for slices that are none.
        """
        assert self.exchange is not None
        self.leave()
        self._engine = None
        gc.collect()  # a model's modules refer to one another
        mx.clear_cache()
        self.nodes, everything = len(nodes), tuple(range(self.info.experts))
        owned = ((everything,) * self.nodes,) * len(self.info.moe_layers)
        several = tuple(slices) if self.nodes > 1 else ()
        self.place(Placement(self.nodes, self.info.experts, owned, several))
        self.exchange.regroup(session, nodes.index(self.rank), self.nodes)
        return (self.exchange.endpoint,) if self.nodes > 1 else ()

    def leave(self) -> None:
        """Leave the exchange, so that nobody waits for this node's part of a step."""
        assert self.exchange is not None
        self._connected = False
        self.exchange.leave()

    def learn(self, figures: Sequence[float]) -> None:
        """What the other nodes have measured of the links, as Choice.figures; none: nothing."""
        assert self.exchange is not None
        if figures:
            self.exchange.choice.learn(Line(*figures[:2]), Line(*figures[2:]))

    # ---- between steps ---------------------------------------------------------------

    def service(self) -> None:
        """Between exchanges: serve peers, watch their links. Raises PeerError for a lost one."""
        if self.exchange is not None and self._connected:
            self.exchange.service()

    def poll_sockets(self) -> list[zmq.Socket[Any]]:
        """What a wait between steps has to poll, too: service() is called when one is readable."""
        exchange = self.exchange
        return exchange.poll_sockets() if exchange is not None and self._connected else []

    # ---- steps -----------------------------------------------------------------------

    def follow(self, plan: Plan) -> Callable[[], object]:
        """A worker's part of one step: run() without logits, or its experts only.

        Where the engine plans ahead, it only begins, and the result is what ends it; the next step
        may be there by then. Raises ZmoeError for a plan that is none, PeerError, DivergenceError.
        """
        if self._held is None and self.engine.plans_ahead:
            return self.begin(plan, logits=False)
        if self._held is None:
            self.run(plan, logits=False)
            return nothing
        check_plan(plan, self._config.max_rows, self.info.vocabulary)
        self._timed(plan.step, partial(self._serve, plan))
        return nothing

    def _serve(self, plan: Plan) -> None:
        assert isinstance(self.exchange, HostingCentral) and self._held is not None
        self.exchange.plan = plan.digest
        for step, _ in enumerate(passes(plan.spans, self._paged), plan.step):
            self.exchange.step = step
            self.exchange.serve(self._held)

    def begin(
        self, plan: Plan, draws: Sequence[Draw] = (), logits: bool = True
    ) -> Callable[[], Floats | Drawn | None]:
        """Begin a step on an engine that plans ahead: see MlxEngine.begin()."""
        check_plan(plan, self._config.max_rows, self.info.vocabulary, ahead=True)
        assert isinstance(self.engine, MlxEngine)
        self._reach("before-step", plan.step)
        end = self.engine.begin(plan, logits, draws)

        def ended() -> Floats | Drawn | None:
            found = end()
            self._reach("after-step", plan.step)
            return found

        return ended

    def run(self, plan: Plan, logits: bool = True) -> Floats | None:
        """Run one step; arguments and result are those of Engine.run().

        Raises ZmoeError for a plan that is none, PeerError for a lost peer, DivergenceError for
        one that routes differently, or that has another plan.
        """
        check_plan(plan, self._config.max_rows, self.info.vocabulary)
        team = self._team
        before = team.matmul_s if team is not None else 0.0
        out = self._timed(plan.step, partial(self._run, plan, logits))
        if team is not None:
            self.spans.add("matmuls", team.matmul_s - before)
        return out

    def _run(self, plan: Plan, logits: bool) -> Floats | None:
        if self.recorder is None:
            return self.engine.run(plan, logits)
        with self.recorder.step(plan.step):
            return self.engine.run(plan, logits)

    def _timed(self, step: int, part: Callable[[], T]) -> T:
        """What `part` returns: this node's part of a step."""
        begun = time.perf_counter()
        try:
            self._reach("before-step", step)
            found = part()
            self._reach("after-step", step)
        finally:
            self._steps += 1
            self._step_s += time.perf_counter() - begun
        return found

    def take_times(self) -> tuple[int, float]:
        """The steps since this was called last, and the seconds of them in which this node did not
        wait for others. None of an engine that plans ahead.
        """
        assert self.exchange is not None
        waited_s = 1e-6 * self.exchange.stats.get("waited_us", 0)
        times = self._steps, max(0.0, self._step_s - (waited_s - self._waited_s))
        self._steps, self._step_s, self._waited_s = 0, 0.0, waited_s
        return times

    def close(self) -> None:
        """Leave the run: let go of sockets, threads and the model, whoever has this object."""
        if self.exchange is not None:
            self.exchange.close()
        if self.nodes == 1 and self._engine is not None:  # a step may need nobody
            mx.synchronize()
        self._unload()
        if self._affinity is not None:
            set_affinity(self._affinity)
            self._affinity = None
