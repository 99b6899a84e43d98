"""One rank's share of a model: loaded, with its caches."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from zmoe.batch.blocks import Found
from zmoe.batch.plan import BLOCK
from zmoe.cluster.failpoints import failpoints
from zmoe.cluster.mlx_prompt_cache import check_caches, read_caches, write_caches
from zmoe.cluster.paged_prompt_cache import check_blocks, read_blocks, write_blocks
from zmoe.cluster.prompt_cache import MLX, PAGED, PromptCache, read_prompt_cache
from zmoe.config import EngineConfig
from zmoe.engine.base import Engine
from zmoe.engine.engine import make_engine
from zmoe.engine.mlx_caches import MlxEngine
from zmoe.engine.paged import PagedEngine
from zmoe.errors import InputError, PlacementError, SettingError, ZmoeError
from zmoe.exchange.central import CentralExchange, Held
from zmoe.exchange.hosting import Hosting
from zmoe.exchange.local import Exchange, SingleNode
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
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import UsageRecorder


class Share:
    """What the node `rank` has of a model, alone or beside others, and how it gets it."""

    def __init__(self, info: ModelInfo, config: EngineConfig, rank: int, nodes: int) -> None:
        """Raises InputError for failpoints that are none."""
        self.info, self.rank, self.nodes = info, rank, nodes
        self.placement: Placement | None = None
        self.recorder: UsageRecorder | None = None
        self.skeleton: Skeleton | None = None  # what `info` was learned from, until it is loaded
        self.spans = Spans()
        self.divides = False  # whether the nodes that are left divide all weights anew
        self.exchange: Exchange | None = None
        self._config = config
        self._reach = failpoints(rank)
        self._engine: Engine | None = None
        self._held: Sequence[Held] | None = None
        self._adopted: dict[int, Sequence[Held]] = {}  # by shard
        self._paged = False
        self._isa = best_isa_name()
        self._team: ThreadPool | None = None

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

    @property
    def is_loaded(self) -> bool:
        """Whether this node has its share."""
        return self._engine is not None or self._held is not None

    @property
    def can_undo(self) -> bool:
        """Whether steps can be undone here: in paged caches, or without any."""
        return self._held is not None or isinstance(self._engine, PagedEngine)

    # ---- loading ---------------------------------------------------------------------

    @property
    def _is_central(self) -> bool:
        return self._config.schedule == "centralized"

    def _unload(self) -> None:
        """Let go of the model and of the threads that compute it."""
        self._engine = self._held = None
        self._adopted = {}
        if self._team is not None:
            self._team.close()
            self._team = None
        mx.clear_cache()  # MLX would keep the weights' memory for later use

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

    @property
    def engine(self) -> Engine:
        """What runs the model; for a node that has loaded more than experts."""
        assert self._engine is not None
        return self._engine

    @property
    def compute(self) -> str:
        """Whose matmuls are run: "mlx", or "native" and the instructions that they use."""
        return f"native, {self._isa}" if self._team is not None else "mlx"

    # ---- caches ----------------------------------------------------------------------

    def make_cache(self, blocks: int) -> None:
        """Have paged caches of `blocks` blocks, as every node has that holds caches.

        Raises ZmoeError where this model's caches are not paged.
        """
        self._paged = True
        if self._engine is not None:
            self._engine.make_cache(blocks)

    def undo(self, last: int) -> None:
        """Go back to where step `last` ended. Raises ZmoeError where that is too long ago."""
        if isinstance(self._engine, PagedEngine):
            self._engine.undo(last)

    def forget(self) -> None:
        """End all sequences."""
        if isinstance(self._engine, (PagedEngine, MlxEngine)):
            self._engine.forget()

    # ---- prompt caches ---------------------------------------------------------------

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
