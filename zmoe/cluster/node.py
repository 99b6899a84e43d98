"""What leader and workers have in common: exchange, share of the model, steps."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import zmq

from zmoe.batch.blocks import Found
from zmoe.batch.plan import BLOCK, Plan, passes
from zmoe.batch.plan import check as check_plan
from zmoe.cluster.failpoints import failpoints
from zmoe.cluster.messages import Hello
from zmoe.cluster.mlx_prompt_cache import check_caches, read_caches, write_caches
from zmoe.cluster.paged_prompt_cache import check_blocks, read_blocks, write_blocks
from zmoe.cluster.prompt_cache import MLX, PAGED, PromptCache, read_prompt_cache
from zmoe.config import EngineConfig, Timing
from zmoe.engine.base import Engine, Floats
from zmoe.engine.draw import Draw, Drawn
from zmoe.engine.engine import make_engine
from zmoe.engine.mlx_caches import MlxEngine
from zmoe.engine.paged import PagedEngine
from zmoe.errors import InputError, MismatchError, PlacementError, SettingError, ZmoeError
from zmoe.exchange.algorithm import Line
from zmoe.exchange.base import nothing
from zmoe.exchange.central import PAIR_BYTES, CentralExchange, Held
from zmoe.exchange.hosting import Hosting, HostingCentral, HostingExchange
from zmoe.exchange.keys import KeyPair, is_loopback
from zmoe.exchange.local import Endpoint, Exchange, SingleNode, payload_bytes
from zmoe.exchange.sockets import Context, Ports
from zmoe.kernels.arithmetic import Arithmetic
from zmoe.kernels.threads import ThreadPool, best_isa_name, check_isa, is_native, make_thread_pool
from zmoe.loading import (
    LoadedExperts,
    LoadedShard,
    Skeleton,
    divides_heads,
    form_of,
    load_experts,
    load_shard,
)
from zmoe.obs import Spans
from zmoe.placement.assignment import Ownership
from zmoe.placement.check import check_placement
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import UsageRecorder
from zmoe.topology.cores import set_affinity

T = TypeVar("T")


class Node:
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
        self.info, self.rank, self.nodes, self.session = info, rank, nodes, session
        self.placement: Placement | None = None
        self.recorder: UsageRecorder | None = None
        self.skeleton: Skeleton | None = None  # what `info` was learned from, until it is loaded
        self.spans = Spans()
        self.divides = False  # whether the nodes that are left divide all weights anew
        self.exchange: Exchange | None = None
        self._config, self._timing = config, timing
        self._reach = failpoints(rank)
        # Since take_times() was called last: steps, the seconds that they took, and the seconds
        # that this node had waited in all by then.
        self._steps, self._step_s, self._waited_s = 0, 0.0, 0.0
        self._engine: Engine | None = None
        self._held: Sequence[Held] | None = None
        self._adopted: dict[int, Sequence[Held]] = {}  # by shard
        self._paged = False
        self._connected = False
        self._affinity: set[int] | None = None
        self._isa = best_isa_name()
        self._team: ThreadPool | None = None

    def pin(self, cores: Sequence[int]) -> None:
        """Keep this process on `cores` until close()."""
        self._affinity = os.sched_getaffinity(0)
        set_affinity(cores)

    def use_isa(self, isa: str) -> None:
        """Use these instructions in the kernels, as every node of the run does.

        Raises InputError for what this CPU does not have.
        """
        if isa != self._isa:
            self._unload()
        self._isa = check_isa(isa)

    def place(self, placement: Placement) -> None:
        """Take the part that `placement` gives this rank. Raises PlacementError."""
        if placement.nodes != self.nodes:
            raise PlacementError(f"a placement of {placement.nodes} nodes for {self.nodes}")
        check_placement(placement, self.info.shape)
        if placement != self.placement:
            self._unload()
        self.placement = placement
        if isinstance(self.exchange, CentralExchange):
            self.exchange.place(placement)

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

    @property
    def is_loaded(self) -> bool:
        """Whether this node has its share."""
        return self._engine is not None or self._held is not None

    @property
    def _is_central(self) -> bool:
        return self._config.schedule == "centralized"

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

    # ---- the shards of nodes that are lost ------------------------------------------------

    @property
    def can_go_on(self) -> bool:
        """Whether the others can go on without a node that is lost: not over MLX's backends."""
        on_mlx = isinstance(self._engine, MlxEngine) and not self._engine.plans_ahead
        may = self.can_undo or on_mlx or self.divides
        return isinstance(self.exchange, Hosting) and may

    @property
    def can_undo(self) -> bool:
        """Whether steps can be undone here: in paged caches, or without any."""
        return self._held is not None or isinstance(self._engine, PagedEngine)

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

    def adopt(self, progress: Callable[[int, int], None]) -> None:
        """Load the experts of every shard that this node hosts for another, unless it has them.

        `progress` as for load(). Raises ModelError for what cannot be read.
        """
        assert isinstance(self.exchange, Hosting) and self.placement is not None
        self._reach("adopt")
        policy = self._config.policy
        for guest in self.exchange.guests:
            shard = guest.exchange.rank
            if shard not in self._adopted:
                held = load_experts(
                    self.info, self.placement, guest.exchange, progress=progress, pool=self._team
                )
                self._adopted[shard] = held.layers
            layers = range(len(self._adopted[shard]))
            owned = [Ownership(self.placement, m, shard, policy) for m in layers]
            guest.hold(self._adopted[shard], owned)

    def learn(self, figures: Sequence[float]) -> None:
        """What the other nodes have measured of the links, as Choice.figures; none: nothing."""
        assert self.exchange is not None
        if figures:
            self.exchange.choice.learn(Line(*figures[:2]), Line(*figures[2:]))

    def undo(self, last: int) -> None:
        """Go back to where step `last` ended. Raises ZmoeError where that is too long ago."""
        if isinstance(self._engine, PagedEngine):
            self._engine.undo(last)

    def forget(self) -> None:
        """End all sequences."""
        if isinstance(self._engine, (PagedEngine, MlxEngine)):
            self._engine.forget()

    def service(self) -> None:
        """Between exchanges: serve peers, watch their links. Raises PeerError for a lost one."""
        if self.exchange is not None and self._connected:
            self.exchange.service()

    def poll_sockets(self) -> list[zmq.Socket[Any]]:
        """What a wait between steps has to poll, too: service() is called when one is readable."""
        exchange = self.exchange
        return exchange.poll_sockets() if exchange is not None and self._connected else []

    def load_follower(
        self, progress: Callable[[int, int], None]
    ) -> tuple[LoadedShard | LoadedExperts, float]:
        """As load(), of a worker, which in a centralised run loads experts only."""
        if not self._is_central:
            return self.load(progress)
        start = time.perf_counter()
        self._prepare()
        assert self.exchange is not None and self.placement is not None
        held = load_experts(
            self.info,
            self.placement,
            self.exchange,
            progress=progress,
            pool=self._team,
            policy=self._config.policy,
            skeleton=self.skeleton,
        )
        self._held = held.layers
        return held, time.perf_counter() - start

    def load(self, progress: Callable[[int, int], None]) -> tuple[LoadedShard, float]:
        """Read this rank's share of the placement; returns the shard and the seconds it took.

        Call place() before. `progress(bytes_done, bytes_total)` is called as bytes are read,
        and may raise to end the loading. Raises ModelError for a checkpoint that cannot be
        read, SettingError for `activations` or `kv_bits` that this node does not have.
        """
        assert self.placement is not None
        start = time.perf_counter()
        self._prepare()
        if self._team is None:
            self._refuse_kv_bits("MLX computes on this node")
        peers = self.exchange if self.nodes > 1 else None
        reducer = peers or SingleNode()
        skeleton = self.skeleton or Skeleton(Path(self.info.path))
        form = form_of(
            self.info,
            self.placement,
            skeleton.sites,
            peers,
            self._config_of_view() if self.divides else self._config,
            on_mlx=self._team is None,
            records=self.recorder is not None,
        )
        if self.divides and peers is not None and peers.door is None:
            raise ZmoeError("another run of this process exchanges in MLX's graph: close it first")
        self.divides = self.divides or (peers is not None and peers.door is not None)
        shard = load_shard(
            self.info,
            self.placement,
            reducer,
            spans=self.spans,
            progress=progress,
            pool=self._team,
            policy=self._config.policy,
            recorder=self.recorder,
            skeleton=skeleton,
            form=form,
        )
        if shard.paged is None:
            self._refuse_kv_bits(f"the CPU kernels do not run all layers of {self.info.model_type}")
        elif not shard.paged.can_quantize:
            self._refuse_kv_bits(f"the latents of {self.info.model_type} are kept in full")
        self._engine = make_engine(
            shard.model,
            reducer,
            self._config,
            shard.head,
            shard.paged,
            shard.form.graph,
            plans_ahead=shard.form.as_it_is or shard.form.graph is not None,
        )
        return shard, time.perf_counter() - start

    def _config_of_view(self) -> EngineConfig:
        """The settings of a view in which the nodes divide the weights: heads where they can be."""
        config = replace(self._config, backend="zmq")
        if config.attention == "sharded" and not divides_heads(Path(self.info.path), self.nodes):
            config = replace(config, attention="replicated")
        return config

    def _prepare(self) -> None:
        """Set up MLX and the thread pool, before anything is loaded for them."""
        self._reach("load")
        if mx.default_device() == mx.Device(mx.cpu) and shutil.which("g++") is None:
            mx.disable_compile()  # there MLX compiles its fused operations with g++
        if mx.metal.is_available():  # or idle weights are paged out, and in again when used
            mx.set_wired_limit(int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))
        if is_native(self._config):
            self._team = make_thread_pool(self._config, self._isa)
        elif self._config.activations != "exact":
            raise SettingError(
                "activations", "is int8: expected exact, as MLX computes on this node"
            )

    def _refuse_kv_bits(self, reason: str) -> None:
        bits = self._config.kv_bits
        if bits is not None:
            raise SettingError("kv_bits", f"is {bits}: expected none, as {reason}")

    @property
    def engine(self) -> Engine:
        """What runs the model; for a node that has loaded more than experts."""
        assert self._engine is not None
        return self._engine

    @property
    def compute(self) -> str:
        """Whose matmuls are run: "mlx", or "native" and the instructions that they use."""
        return f"native, {self._isa}" if self._team is not None else "mlx"

    def make_cache(self, blocks: int) -> None:
        """Have paged caches of `blocks` blocks, as every node has that holds caches.

        Raises ZmoeError where this model's caches are not paged.
        """
        self._paged = True
        if self._engine is not None:
            self._engine.make_cache(blocks)

    def prompt_cache_format(self) -> str:
        """What files hold of this node's caches. Raises InputError where that is nothing."""
        if self._engine is None:
            raise InputError(f"no prompt cache: node {self.rank} has experts only")
        if self._config.attention == "sharded":
            raise SettingError(
                "attention", "is sharded: a prompt cache has the keys and values of all heads"
            )
        if isinstance(self.engine, MlxEngine):
            check_caches(self.engine.layout, self.info)
            return MLX
        if self._config.max_kv_size is not None:
            window = self._config.max_kv_size
            raise SettingError(
                "max_kv_size", f"is {window}: a window drops parts of what a prompt cache keeps"
            )
        return PAGED

    def read_prompt_cache(self, path: Path) -> PromptCache:
        """The prompt cache `path`, whose contents are yet to be read. Raises InputError."""
        ours = self.prompt_cache_format()
        saved = read_prompt_cache(path, self.info, self._config)
        if saved.format != ours:
            kinds = {PAGED: "the C kernels", MLX: "MLX"}
            raise InputError(
                f"prompt cache {path} is of caches of {kinds[saved.format]}, and "
                f"{self.info.model_type} has those of {kinds[ours]} here; give another file"
            )
        if isinstance(self.engine, PagedEngine):
            check_blocks(saved, self.engine.memory, self.engine.state_bytes)
        return saved

    def load_prefix(self, path: Path, places: Sequence[int], digest: str) -> None:
        """Read the prompt cache `path`, of that digest, into `places`: see LoadPrefix. Raises
        InputError.
        """
        saved, engine = self.read_prompt_cache(path), self.engine
        if saved.digest != digest:
            raise InputError(
                f"prompt cache {path} is another one than the leader's: copy that to every node"
            )
        if isinstance(engine, MlxEngine):
            engine.hold(places[0], read_caches(saved), len(saved.tokens))
            return
        assert isinstance(engine, PagedEngine)
        memory, state = engine.memory, None
        number, blocks = (places[0], places[1:]) if engine.state_bytes else (0, places)
        most = min(map(len, memory.values()))
        if len(blocks) * BLOCK > len(saved.tokens) or max(blocks, default=most) >= most:
            raise ZmoeError(f"{len(blocks)} blocks for prompt cache {path} that do not fit")
        if engine.state_bytes:
            state = np.empty(engine.state_bytes, np.uint8)
        read_blocks(saved, memory, blocks, state)
        if state is not None:
            engine.hold(number, state, len(saved.tokens))

    def save_prefix(self, path: Path, tokens: Sequence[int], found: Found) -> None:
        """Write the text `tokens`, which is where `found` says, to the file `path`.

        Raises InputError where that cannot be done.
        """
        engine = self.engine
        if isinstance(engine, MlxEngine):
            assert found.snapshot is not None
            caches = engine.copy(found.snapshot, len(tokens))
            write_caches(path, self.info, self._config, tokens, caches)
        else:
            assert isinstance(engine, PagedEngine)
            state = None if found.snapshot is None else engine.state_of(found.snapshot)
            given = tokens, engine.memory, found.blocks, state
            write_blocks(path, self.info, self._config, *given)

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

    def _unload(self) -> None:
        """Let go of the model and of the threads that compute it."""
        self._engine = self._held = None
        self._adopted = {}
        if self._team is not None:
            self._team.close()
            self._team = None
        mx.clear_cache()  # MLX would keep the weights' memory for later use


def peak_memory() -> int:
    """This process's peak resident memory in bytes, MLX's peak where that is not resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = peak if sys.platform == "darwin" else peak * 1024
    return max(resident, mx.get_peak_memory())


def hello_of(
    info: ModelInfo, arithmetic: Arithmetic, offer: NodeResources, endpoint: Endpoint
) -> Hello:
    """What a node tells the leader about itself."""
    return Hello(
        fingerprint=info.fingerprint,
        dtype=info.dtype,
        quantization=info.quantization,
        isa=best_isa_name(),
        arithmetic=arithmetic,
        resources=offer,
        endpoint=endpoint,
    )


def hello_patience(model: str, timing: Timing) -> float:
    """Seconds for all nodes to say hello: they may first have to download a model's files."""
    return timing.join if os.path.isabs(model) else timing.load


def check_hello(mine: Hello, theirs: Hello, name: str, schedule: str) -> None:
    """Raise MismatchError, naming both sides, for the first thing that differs."""
    for field, what in (
        ("dtype", "dtype"),
        ("quantization", "quantisation"),
        ("fingerprint", "another model: fingerprint"),
    ):
        ours, other = getattr(mine, field), getattr(theirs, field)
        if ours != other:
            raise MismatchError(f"{name} has {what} {other}, the leader {ours}")
    if schedule == "decentralized":
        _check_rounding(mine.arithmetic, theirs.arithmetic, name)
    if is_loopback(theirs.endpoint.host) and not is_loopback(mine.endpoint.host):
        raise MismatchError(
            f"{name} listens on {theirs.endpoint.host} only, the leader on {mine.endpoint.host}: "
            "start that zmoe-node with --bind ADDRESS"
        )


def _check_rounding(mine: Arithmetic, theirs: Arithmetic, name: str) -> None:
    """Nodes that each route for themselves must round alike, or part in mid-text.

    Instruction sets may differ: the kernels round alike on the best that all have.
    Two CPUs are compared by what they compute, since MLX is the same code on both.
    """
    both_cpus = mine.device.startswith("cpu") and theirs.device.startswith("cpu")
    device = [] if both_cpus else [("device", "computes on")]
    for field, what in (
        *device,
        ("compute", "multiplies matrices with --compute"),
        ("mlx", "runs mlx"),
        ("mlx_lm", "runs mlx-lm"),
        ("probe", f"rounds otherwise on {theirs.device}: digest"),
    ):
        ours, other = getattr(mine, field), getattr(theirs, field)
        if ours != other:
            raise MismatchError(
                f"{name} {what} {other}, the leader {ours}: nodes that round differently "
                "cannot share a run, unless with --schedule centralized"
            )
