"""The library's door: a cluster as a context manager, text as an iterator."""

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
from typing import Any

from zmoe.batch.plan import Plan, blocks_of, blocks_of_window
from zmoe.batch.states import most_snapshots
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.keeper import Lender
from zmoe.cluster.leader import Leader, OnManual, OnNotice, Progress
from zmoe.cluster.node import Node, peak_memory
from zmoe.cluster.resolver import OnChoice, PlacementResolver
from zmoe.cluster.resources import resources_of
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import DEFAULT_MODEL, Sampling
from zmoe.engine.base import CachesEmptied, Floats
from zmoe.engine.batcher import Batcher
from zmoe.engine.counts import Counts
from zmoe.engine.draw import Draw, Drawn
from zmoe.engine.generate import Generation, SharedSteps
from zmoe.engine.paged import STATES_PER_SEQUENCE
from zmoe.engine.prompt import (
    border_of_system_prompt,
    check_ids,
    check_length,
    encode_prompt,
    open_tokenizer,
)
from zmoe.engine.stream import Constraint, Stream
from zmoe.errors import InputError, SettingError, ZmoeError
from zmoe.kernels.threads import is_native
from zmoe.loading import RECORDED, Skeleton, check_attention, describe, why_evaluated
from zmoe.placement.estimate import NodeResources, cache_room
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import Usage, UsageRecorder, add_usage, check_usage_file

StepFunction = Callable[[Sequence[int], bool], Floats]  # (tokens, starts a new sequence) -> logits
_PREFILLED_AGAIN = 4  # full steps, at most, for a node that returns
_LOG = logging.getLogger(__name__)
_UNKNOWN_CONTEXT = 1 << 17  # tokens, of a model that does not say


class Cluster:
    """A model spread over nodes, ready to generate once entered.

    `model` is a folder, a Hugging Face name or "zmoe-tiny". The nodes are
    `nodes` processes on this machine, or what `spec` says. `progress(rank,
    bytes_done, bytes_total)` is called while the shares load, `on_placement(choice)`
    before; with a manual spec `on_manual(commands)` is given the zmoe-node commands that
    the nodes are to be started with. `on_notice(line)` is told while it runs of a node that is
    lost, of who computes its share from then on, and of a node that is slow (default: a warning is
    logged). `lender`: of workers' processes that outlive this one, which without it ends those
    that it starts. Construction and entering raise InputError and its kin for what is wrong
    beforehand; afterwards PeerError is raised for a lost node whose share nobody can take over,
    which ends the cluster.

    A cluster is entered once, and holds sockets, processes and weights only until it
    is closed. Many generations run at the same time: each step serves all of them, and
    whoever waits for a token runs it. Any thread may call any method: calls
    wait for the step that another thread is running, and close() ends the generations
    of other threads, which then raise ZmoeError. A forked child cannot use the
    cluster of its parent.
    """

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

    # ---- life -----------------------------------------------------------------

    def __enter__(self) -> Cluster:
        with self._alone():
            if self._entered or self._closed:
                raise ZmoeError("this cluster was entered or closed before: make another one")
            self._entered = True
            try:
                self._start()
            except BaseException as error:
                self._failed = _reason(error)
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
            self._failed = self._failed or _reason(error)
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
            self._failed = _reason(error)
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
        run = partial(Cluster._run, weakref.proxy(self))  # or a dropped cluster would stay
        begin = partial(Cluster._begin, weakref.proxy(self)) if node.engine.plans_ahead else None
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
        states = config.parallel * STATES_PER_SEQUENCE + most_snapshots(config.parallel)
        blocks = (room - states * node.engine.state_bytes) // block_bytes
        # One sequence must be able to run, even where memory is tight.
        return max(longest, min(blocks, config.parallel * longest))

    def _warm_up(self, node: Node) -> None:
        """One step on the real path, so that the first token doesn't pay for it."""
        self._batcher.force([0], True)
        self._batcher.end_forced()
        node.spans.take()
        if self._recorder is not None:
            self._recorder.take()

    # ---- use --------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        system_prompt: str | None = None,
        ignore_chat_template: bool = False,
        chat_template_config: dict[str, Any] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        generated: Sequence[int] | None = None,
        **options: Any,
    ) -> Generation:
        """Begin to generate what follows `prompt` (text, or token ids as they are).

        The result iterates over the tokens, also with `async for`. Others may be submitted
        meanwhile: as many as `parallel` of the spec's engine says run at once, the others wait.
        `on_prefill(tokens_done, tokens_total)` is called after each step of the prompt.
        With the seed of a generation that was cut short, and the tokens that it had `generated`,
        the text goes on behind them; it is the same where layers run in C. Options are Sampling's
        fields (`max_tokens`, `temp`, ...), in place of `sampling`. Raises InputError for a prompt
        that is empty or too long, QueueFullError where too many wait, TypeError for unknown
        options. The model's context bounds prompt and text, unless `max_kv_size` of the spec's
        engine lets the attention go on in a window.
        """
        if sampling is not None and options:
            raise InputError(f"give sampling or {sorted(options)[0]}, not both")
        if sampling is not None and not isinstance(sampling, Sampling):
            raise SettingError("sampling", f"is {sampling!r}: expected a Sampling")
        sampling = sampling or Sampling(**options)
        self._check_running()
        borders: tuple[int, ...] = ()
        if isinstance(prompt, str):
            settings: dict[str, Any] = {
                "system_prompt": system_prompt,
                "ignore_chat_template": ignore_chat_template,
                "chat_template_config": chat_template_config,
            }
            ids = encode_prompt(self.tokenizer, prompt, **settings)
            if system_prompt is not None:
                borders = (border_of_system_prompt(self.tokenizer, ids, **settings),)
        else:
            ids = check_ids(prompt, self.tokenizer)
        if generated:
            generated = check_ids(generated, self.tokenizer)
        stream = self.make_stream(
            ids, sampling, borders=borders, on_prefill=on_prefill, generated=generated
        )
        cancel = self.begin_stream(stream)
        advance = partial(self._advance, stream)
        return Generation(
            stream,
            self.tokenizer,
            advance=advance,
            advance_async=partial(self._steps.advance, advance),
            cancel=cancel,
        )

    generate = submit  # of one prompt at a time

    # What a server runs, which waits for all streams at the same time and for its clients besides.

    def make_stream(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        borders: tuple[int, ...] = (),
        salt: bytes = b"",
        constraint: Constraint | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        generated: Sequence[int] | None = None,
    ) -> Stream:
        """What begin_stream() takes, for a prompt of token ids; `generated` as for submit().
        Raises InputError for a prompt that is too long, SettingError for what the model's
        vocabulary does not have.
        """
        _check_vocabulary(sampling, self.info.vocabulary)
        context = self.info.context_length if self.spec.engine.max_kv_size is None else None
        check_length(len(ids), context)
        return Stream(
            ids,
            sampling,
            eos=self.tokenizer.eos_token_ids,
            context=context,
            borders=borders,
            salt=salt,
            constraint=constraint,
            on_prefill=on_prefill,
            generated=generated,
        )

    def begin_stream(self, stream: Stream) -> Callable[[], None]:
        """Queue `stream`, which step() then serves; the result ends it before the next step.

        Raises InputError for one that can never run, QueueFullError where too many wait.
        """
        with self._running():
            self._begun += 1
            self._end_cancelled()
            return partial(self._cancelled.append, self._batcher.submit(stream))

    def step(self) -> None:
        """Run a step for all streams. While a server is idle it calls this now and then, so that
        the loss of a node is noticed.

        Raises as a Generation does; what it raises ends the cluster.
        """
        with self._running():
            self._end_cancelled()
            with self._stepping():
                if self._batcher.busy:
                    self._run_step()
                elif self._leader is not None:
                    self._leader.watch()
                    self._admit()

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

    def counts(self) -> Counts:
        """What the cluster has done so far, and does now."""
        with self._running() as node:
            return self._batcher.counts(node.exchange.stats if node.exchange is not None else {})

    @property
    def placement(self) -> Placement:
        """Who owns which experts."""
        node = self._check_running()
        assert node.placement is not None
        return node.placement

    @property
    def compute(self) -> str:
        """Whose matmuls are run: "mlx", or "native" and the instructions that they use."""
        return self._check_running().compute

    @property
    def listeners(self) -> list[tuple[str, list[int]]]:
        """The address and the ports at which each node listens for the others, by rank; empty
        where there is one only. The leader's first port is that of the control links.
        """
        return self._leader.listeners() if self._leader is not None else []

    def links(self) -> tuple[int, ...]:
        """The ranks to which the leader's link stands; one that is down has `Timing.grace`."""
        with self._running():
            return self._leader.links() if self._leader is not None else ()

    @property
    def hosts(self) -> tuple[int | None, ...]:
        """By rank, the node that computes its share: another one where it is lost, or None where
        all that are left compute a part of it.
        """
        return self._leader.hosts if self._leader is not None else (0,)

    @property
    def step_seconds(self) -> dict[int, float]:
        """By rank, for how long a node computes in a step, in the last half second of steps; empty
        while that is not known. What a node waits for others does not count.
        """
        return self._leader.stragglers.seconds if self._leader is not None else {}

    @property
    def slow(self) -> dict[int, str]:
        """By rank, the nodes for which the others wait, and how slow they are."""
        return self._leader.stragglers.slow if self._leader is not None else {}

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

    def load_prompt_cache(self, path: str | Path) -> int:
        """Have prompts begin with the keys and values of the file `path`, as far as they share
        its text; every node reads it, on its own machine.

        Returns the number of its tokens that there was room for. Raises InputError that names
        the file, and a node that cannot read it; that ends the cluster.
        """
        path = Path(path).absolute()
        with self._running() as node:
            saved = node.read_prompt_cache(path)
            self._batcher.end_forced()

            def read(places: Sequence[int]) -> None:
                try:
                    (self._leader or node).load_prefix(path, places, saved.digest)
                except BaseException as error:
                    self._failed = _reason(error)
                    raise

            return self._batcher.scheduler.adopt(saved.tokens, read)

    def save_prompt_cache(self, path: str | Path, prompt: Sequence[int]) -> int:
        """Write the keys and values of `prompt` (ids) that are in the cache to the file `path`.

        Returns the number of its tokens that they are of; where that is 0, less than a block of
        64, there is no file. Raises InputError that names the file, or says why there can be none.
        """
        with self._running() as node:
            node.prompt_cache_format()
            found = self._batcher.scheduler.known(prompt)
            if found.length:
                node.save_prefix(Path(path), prompt[: found.length], found)
            return found.length

    def begin(self) -> StepFunction:
        """Begin a sequence whose caller brings every token, and picks from the logits itself.

        The result is called as `step(tokens, reset)`: it appends `tokens` (ids) to the
        sequence, which `reset` starts anew, and returns the logits (vocabulary,) float32
        after the last of them, the caller's to keep. The sequence has the cluster for itself:
        it ends when another one is begun or submitted, and its steps are refused from then on.

        Raises ZmoeError when the cluster is not running. A step raises ZmoeError also while
        generations are running, InputError for tokens that are none and where the cache is full,
        PeerError for a lost peer, and DivergenceError for one that routes differently; the latter
        two end the cluster.
        """
        with self._running():
            self._begun += 1
            mine = self._begun

        def step(tokens: Sequence[int], reset: bool) -> Floats:
            with self._running():
                if mine != self._begun:
                    raise ZmoeError("another generation has begun on this cluster")
                if not tokens or not 0 <= min(tokens) <= max(tokens) < self.info.vocabulary:
                    vocabulary = self.info.vocabulary
                    raise InputError(f"a step of {tokens}: expected token ids below {vocabulary}")
                self._end_cancelled()
                return self._batcher.force(tokens, reset)

        return step

    def take_spans(self) -> dict[str, float]:
        """Seconds that this rank's steps have spent, by span (zmoe.obs), since the last call or
        generated token.
        """
        with self._running() as node:
            return node.spans.take()

    def take_usage(self) -> Usage:
        """Which experts were selected since the last call; for a spec that records it."""
        if self._recorder is None:
            raise ZmoeError("this cluster does not record which experts are selected")
        with self._alone():
            return self._recorder.take()

    def save_usage(self, path: str | Path) -> None:
        """Take the usage, and add it to the profile in the file `path`, or begin one.

        PlacementRequest(usage=path) of a later run reads it. Raises InputError naming
        the file, which is then as it was.
        """
        check_usage_file(Path(path), self.info)
        add_usage(Path(path), self.take_usage(), self.info)

    def peak_memory(self) -> list[int]:
        """Peak resident bytes of every node so far, by rank."""
        with self._running():
            return self._leader.peak_memory() if self._leader is not None else [peak_memory()]

    def locked_buffers(self) -> tuple[int, int]:
        """Bytes of this rank's exchange buffers that are locked in memory, and of all of them."""
        with self._running() as node:
            pool = node.exchange.pool_stats if node.exchange is not None else {}
            return pool.get("locked_bytes", 0), pool.get("total_bytes", 0)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that were started on this machine (or of their ssh)."""
        return self._leader.worker_pids() if self._leader is not None else []

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


def _check_vocabulary(sampling: Sampling, vocabulary: int) -> None:
    """Raise SettingError for what only a model of more tokens could do."""
    if sampling.top_k >= vocabulary:
        raise SettingError(
            "top_k", f"is {sampling.top_k}: expected less than the model's {vocabulary} tokens"
        )
    for token in sampling.logit_bias or ():
        if token >= vocabulary:
            raise SettingError(
                "logit_bias", f"has token {token}: the model's are below {vocabulary}"
            )


def _is_name(model: str) -> bool:
    return not Path(model).expanduser().is_dir()


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
