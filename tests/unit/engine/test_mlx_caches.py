"""Every family side by side on mlx-lm's caches says what mlx-lm says of each sequence alone."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.families import FAMILIES, VOCAB, build
from zmoe.batch.plan import PREVIOUS, Fork, Plan, Span
from zmoe.cluster.mlx_prompt_cache import check_caches, read_caches, write_caches
from zmoe.cluster.prompt_cache import read_prompt_cache
from zmoe.config import EngineConfig
from zmoe.engine.draw import Draw
from zmoe.engine.mlx_caches import MlxEngine
from zmoe.errors import InputError, ZmoeError
from zmoe.exchange.local import SingleNode
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.moe.graph import Form
from zmoe.obs import Spans
from zmoe.placement.build import place_evenly

ONE_AT_A_TIME = {"llama4", "deepseek_v41"}  # their caches have no merge
TEXTS = {s: [(s * 31 + 7 * i + i * i) % VOCAB for i in range(40)] for s in (1, 2, 3, 4, 11, 12, 13)}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """MLX compiles fused functions with the C compiler on CPU; a minute for all families."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Driver:
    """Runs spans of TEXTS on an engine, and compares each row's logits with mlx-lm's."""

    def __init__(
        self,
        folder: Path,
        max_kv_size: int | None = None,
        pool: ThreadPool | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self._reference, _ = load_model(folder)
        self.info, self._file = describe(Skeleton(folder)), folder / "prompt cache"
        info, reducer = self.info, SingleNode()
        shard = load_shard(
            info,
            place_evenly(info.shape, 1),
            reducer,
            spans=Spans(),
            pool=pool,
            form=Form(as_it_is=plans_ahead),
        )
        self.engine = MlxEngine(
            shard.model, reducer, shard.head, max_kv_size, plans_ahead=plans_ahead
        )
        self._wanted: dict[int, np.ndarray] = {}
        self._step = 1

    def wanted(self, sequence: int) -> np.ndarray:
        """mlx-lm's logits after each token of a text, alone and token by token."""
        if sequence not in self._wanted:
            self._wanted[sequence] = alone(self._reference, TEXTS[sequence])
        return self._wanted[sequence]

    def run(
        self,
        *spans: tuple[int, int, int],
        free: Sequence[int] = (),
        forks: Sequence[tuple[int, int, int]] = (),
        texts: dict[int, int] | None = None,
    ) -> None:
        """Each span is (sequence, position, rows); `texts`: of which text a sequence is."""
        of = {s: (texts or {}).get(s, s) for s, *_ in spans}
        tokens = [t for s, at, n in spans for t in TEXTS[of[s]][at : at + n]]
        plan = Plan(
            self._step,
            tuple(Span(s, at, n, 1) for s, at, n in spans),
            tuple(tokens),
            free=tuple(free),
            forks=tuple(Fork(*fork) for fork in forks),
        )
        self._step += 8
        logits = self.engine.run(plan)
        assert logits is not None and logits.dtype == np.float32
        want = np.stack([self.wanted(of[s])[at + n - 1] for s, at, n in spans])
        np.testing.assert_allclose(logits, want, atol=2e-4 * np.abs(want).max(), rtol=0)

    def through_a_file(self, sequence: int, length: int, new: int) -> None:
        """Have `new` begin with a sequence's first positions, as a prompt cache holds them."""
        text, config = TEXTS[sequence][:length], EngineConfig()
        write_caches(self._file, self.info, config, text, self.engine.copy(sequence, length))
        saved = read_prompt_cache(self._file, self.info, config)
        assert saved.tokens == text
        self.engine.hold(new, read_caches(saved), length)


def alone(model: Module, text: Sequence[int]) -> np.ndarray:
    caches = make_prompt_cache(model)
    rows = [model(mx.array([[token]]), cache=caches)[0, -1] for token in text]
    return np.array(mx.stack(rows).astype(mx.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_side_by_side_is_as_alone(family: str, tmp_path: Path) -> None:
    check(family, Driver(build(family, tmp_path / family)))


# Latent, recurrent and linear attention, and experts whose input is not the block's.
@pytest.mark.parametrize(
    "family", ["deepseek_v32", "jamba", "qwen3_next", "qwen3_5_moe", "nemotron_h", "gemma4_text"]
)
def test_with_native_matmuls_too(family: str, tmp_path: Path) -> None:
    check(family, Driver(build(family, tmp_path / family), pool=ThreadPool(1)))


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_planning_ahead(family: str, tmp_path: Path) -> None:
    """The host sees tokens a step late; nemotron_h could not go back."""
    driver = Driver(build(family, tmp_path / family), plans_ahead=True)
    check(family, driver)
    greedy, step = Draw(0, 1, 0, 0, 0), itertools.count(1000)
    texts = {s: TEXTS[s][: 6 + s] for s in (11, 12, 13)}
    wanted = {s: greedily(driver._reference, text, 6) for s, text in texts.items()}
    found: dict[int, list[int]] = {s: [] for s in texts}
    planned = dict.fromkeys(texts, 0)  # tokens
    under_way = deque[tuple[tuple[int, ...], Callable[[], Any]]]()

    def begin(*sequences: int) -> None:
        spans, tokens = [], []
        for s in sequences:
            begins = not planned[s]
            length = len(texts[s])
            at, given = (0, texts[s]) if begins else (length + planned[s] - 1, [PREVIOUS])
            spans.append(Span(s, at, len(given), 1))
            tokens += given
            planned[s] += 1
        plan = Plan(next(step) * 8, tuple(spans), tuple(tokens))
        under_way.append((sequences, driver.engine.begin(plan, draws=[greedy] * len(spans))))

    def end() -> None:
        of, ended = under_way.popleft()
        for sequence, token in zip(of, ended().tokens.tolist(), strict=True):
            found[sequence].append(token)

    begin(11, 12)
    for sequences in ((12, 11), (11, 12, 13), (13, 12, 11), (13, 12, 11), (12, 13)):
        begin(*sequences)
        end()
    end()
    assert found == {11: wanted[11][:5], 12: wanted[12], 13: wanted[13][:4]}
    begin(11, 13)
    end()
    assert found[11] == wanted[11] and found[13] == wanted[13][:5]


def greedily(model: Module, text: Sequence[int], count: int) -> list[int]:
    """What mlx-lm says after `text`."""
    prompt = mx.array(text)
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=count)]


def check(family: str, driver: Driver) -> None:
    run = driver.run
    if family in ONE_AT_A_TIME:
        assert not driver.engine.can_batch
        run((1, 0, 5))
        run((1, 5, 1))
        if family == "deepseek_v41":  # whose caches mlx-lm cannot read
            with pytest.raises(InputError, match="no prompt cache: deepseek_v41 has caches of its"):
                check_caches(driver.engine.copy(1, 6), driver.info)
            return
        driver.through_a_file(1, 6, 7)
        run((7, 6, 1), texts={7: 1})
        return
    assert driver.engine.can_batch
    run((1, 0, 9))
    run((1, 9, 1), (2, 0, 4))  # one decodes while another begins
    run((1, 10, 1), (2, 4, 1), (3, 0, 12))
    for step in range(3):
        run((3, 12 + step, 1), (1, 11 + step, 1), (2, 5 + step, 1))
    run((2, 8, 1), (4, 0, 6), free=[1])  # 3 rests
    run((4, 6, 1), (3, 15, 1), (2, 9, 1), free=[])
    run((3, 16, 1), free=[2, 4])
    run((1, 0, 3), (3, 17, 1))  # the number may come again
    run((5, 18, 2), forks=[(5, 3, 18)], texts={5: 3})
    run((5, 20, 1), (3, 18, 1), texts={5: 3})
    driver.through_a_file(3, 19, 7)
    run((7, 19, 1), (3, 19, 1), texts={7: 3})
    run((7, 20, 3), texts={7: 3})
    if driver.engine.can_trim:
        run((3, 10, 1), (1, 3, 1))  # back, then on
        run((3, 11, 4))
        run((6, 7, 1), forks=[(6, 3, 7)], texts={6: 3})
    else:
        with pytest.raises(ZmoeError, match="goes back in a sequence whose cache cannot"):
            run((3, 10, 1))


def test_what_does_not_go_with_the_sequences(tmp_path: Path) -> None:
    driver = Driver(build("mixtral", tmp_path / "m"))
    driver.run((1, 0, 4))
    for problem, spans, given in [
        ("at position 5 of a sequence of 4", [(1, 5, 1)], {}),
        ("forks 9 of 4", [(1, 4, 1)], {"forks": [(2, 1, 9)]}),
        ("forks 3 of 0", [(1, 4, 1)], {"forks": [(2, 7, 3)]}),
    ]:
        with pytest.raises(ZmoeError, match=problem):
            driver.run(*spans, **given)
    previous = Plan(80, (Span(1, 4, 1, 1),), (PREVIOUS,))
    with pytest.raises(ZmoeError, match="a token of sequence 1 that is not drawn"):
        driver.engine.begin(previous)
    with pytest.raises(ZmoeError, match="as sequence 1, which this node holds already"):
        driver.engine.hold(1, driver.engine.layout, 4)
    driver.run((1, 4, 1))
