"""The library's door: a cluster as a context manager, text as an iterator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zmoe.cluster.life import Life, reason
from zmoe.cluster.resources import peak_memory
from zmoe.config import Sampling
from zmoe.engine.base import Floats
from zmoe.engine.counts import Counts
from zmoe.engine.generate import Generation
from zmoe.engine.prompt import border_of_system_prompt, check_ids, check_length, encode_prompt
from zmoe.engine.stream import Constraint, Stream
from zmoe.errors import InputError, SettingError, ZmoeError
from zmoe.placement.types import Placement
from zmoe.placement.usage import Usage, add_usage, check_usage_file

StepFunction = Callable[[Sequence[int], bool], Floats]  # (tokens, starts a new sequence) -> logits


class Cluster(Life):
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
                    self._failed = reason(error)
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

    # ---- what it is and does ---------------------------------------------------------

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
