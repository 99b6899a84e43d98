"""The library's door: a cluster as a context manager, text as an iterator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx

from zmoe.cluster.leader import ClusterSpec, Leader, OnManual, Progress
from zmoe.cluster.member import Member, peak_memory
from zmoe.cluster.placing import OnChoice, Placing
from zmoe.cluster.resources import offer_of
from zmoe.config import DEFAULT_MODEL, Sampling
from zmoe.engine.generate import Generation, StepFunction
from zmoe.engine.prompt import check_ids, check_length, encode_prompt, open_tokenizer
from zmoe.errors import InputError, ZmoeError
from zmoe.models import inspect_model
from zmoe.models.hub import resolve_model
from zmoe.placement.usage import Usage, UsageRecorder
from zmoe.types import ModelInfo


class Cluster:
    """A model spread over nodes, ready to generate once entered.

    `model` is a folder, a Hugging Face name or "zmoe-tiny". The nodes are
    `nodes` processes on this machine, or what `spec` says. `progress(rank,
    bytes_done, bytes_total)` is called while the shares load, `on_placement(choice)`
    before; with a manual spec `on_manual(commands)` is given the zmoe-node commands that
    the nodes are to be started with. Entering raises
    InputError and its kin for what is wrong beforehand; afterwards a lost peer
    raises PeerError, which ends the cluster. One generation at a time.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        nodes: int = 1,
        *,
        spec: ClusterSpec | None = None,
        progress: Progress | None = None,
        on_placement: OnChoice | None = None,
        on_manual: OnManual | None = None,
    ) -> None:
        self.spec = spec if spec is not None else ClusterSpec(nodes=nodes)
        folder = resolve_model(str(model))
        self.info: ModelInfo = inspect_model(folder)
        name = str(model) if _is_name(str(model)) else str(folder)
        self._progress: Progress = progress or (lambda rank, done, total: None)
        self._leader: Leader | None = None
        request, count, engine = self.spec.placement, self.spec.nodes, self.spec.engine
        self._placing = Placing(request, self.info, count, engine, on_placement)
        if self.spec.nodes > 1:
            on_manual = on_manual or (lambda commands: None)
            self._leader = Leader(
                self.info, name, self.spec, self._placing, self._progress, on_manual
            )
            self._member = self._leader.member
        else:
            self._member = Member(self.info, 0, 1, 0, self.spec.engine, self.spec.timing)
        self._recorder = UsageRecorder(self.info) if self.spec.record_usage else None
        self._member.recorder = self._recorder
        self._failed: BaseException | None = None
        self._closed = False
        self._step = 0
        self._generations = 0
        self.notices: tuple[str, ...] = ()
        self.load_seconds = 0.0

    # ---- life -----------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            if self._leader is not None:
                self._leader.launch()
            self.tokenizer = open_tokenizer(Path(self.info.path))
            self._load()
            self._warm_up()
        except BaseException as error:
            self._failed = error
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._failed = self._failed or error
        self.close()

    def close(self) -> None:
        """End every process of the cluster; harmless when done twice."""
        if self._closed:
            return
        self._closed = True
        if self._leader is not None:
            self._leader.close(_reason(self._failed))
        else:
            self._member.close()
        self._failed = self._failed or ZmoeError("it was closed")

    def _load(self) -> None:
        if self._leader is not None:
            shard, self.load_seconds = self._leader.start()
        else:
            own = offer_of(self.spec.engine, self.spec.placement.memory_limit, measure=False)
            self._member.place(self._placing.choose([own]))
            shard, self.load_seconds = self._member.load(lambda d, t: self._progress(0, d, t))
        self.notices = shard.notices

    def _warm_up(self) -> None:
        """One step on the real path, so that the first token doesn't pay for it."""
        mx.eval(self._forward([0], True))
        self._member.spans.take()
        if self._recorder is not None:
            self._recorder.take()

    # ---- use --------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        system_prompt: str | None = None,
        ignore_chat_template: bool = False,
        chat_template_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Generation:
        """Iterate over the tokens that follow `prompt` (text, or token ids as they are).

        Options are Sampling's fields (`max_tokens`, `temp`, ...), in place of
        `sampling`. Raises InputError for a prompt that is empty or too long,
        TypeError for unknown options.
        """
        if isinstance(prompt, str):
            ids = encode_prompt(
                self.tokenizer,
                prompt,
                system_prompt=system_prompt,
                ignore_chat_template=ignore_chat_template,
                chat_template_config=chat_template_config,
            )
        else:
            ids = check_ids(prompt, self.tokenizer)
        check_length(len(ids), self.info.context_length)
        if sampling is not None and options:
            raise InputError(f"give sampling or {sorted(options)[0]}, not both")
        return Generation(
            self.begin(),
            self.tokenizer,
            ids,
            sampling or Sampling(**options),
            prefill_chunk=self.spec.engine.prefill_chunk,
            context=self.info.context_length,
            spans=self._member.spans,
        )

    def begin(self) -> StepFunction:
        """Steps for a new generation; those of the one before are refused from now on.

        For who brings all tokens: the logits are not picked from.
        """
        self._generations += 1
        mine = self._generations

        def step(tokens: Sequence[int], reset: bool, logits: bool) -> mx.array:
            if mine != self._generations:
                raise ZmoeError("another generation has begun on this cluster")
            return self._forward(tokens, reset, logits)

        return step

    def take_spans(self) -> dict[str, float]:
        """Seconds of this rank's steps by what they went to (zmoe.obs), since the last call or
        generated token.
        """
        return self._member.spans.take()

    def take_usage(self) -> Usage:
        """Which experts were selected since the last call; for a spec that records it."""
        if self._recorder is None:
            raise ZmoeError("this cluster does not record which experts are selected")
        return self._recorder.take()

    def peak_memory(self) -> list[int]:
        """Peak resident bytes of every node so far, by rank."""
        return self._leader.peak_memory() if self._leader is not None else [peak_memory()]

    def locked_buffers(self) -> tuple[int, int]:
        """Bytes of this rank's exchange buffers that are locked in memory, and of all of them."""
        exchange = self._member.exchange
        pool = exchange.pool_stats if exchange is not None else {}
        return pool.get("locked_bytes", 0), pool.get("total_bytes", 0)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that were started on this machine (or of their ssh)."""
        return self._leader.worker_pids() if self._leader is not None else []

    def _forward(self, tokens: Sequence[int], reset: bool, logits: bool = True) -> mx.array:
        if self._failed is not None:
            raise ZmoeError(f"this cluster has ended: {_reason(self._failed)}")
        run: Callable[[Sequence[int], bool, bool], mx.array]
        run = self._leader.forward if self._leader is not None else self._forward_alone
        try:
            return run(tokens, reset, logits)
        except BaseException as error:  # also Ctrl-C: the ranks are out of step from here on
            self._failed = error
            raise

    def _forward_alone(self, tokens: Sequence[int], reset: bool, logits: bool) -> mx.array:
        self._step += 1
        return self._member.forward(self._step, tokens, reset, logits)


def _is_name(model: str) -> bool:
    return not Path(model).expanduser().is_dir()


def _reason(error: BaseException | None) -> str:
    if error is None:
        return ""
    return str(error) or type(error).__name__
