"""Every family side by side on mlx-lm's caches says what mlx-lm says of each sequence alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.families import FAMILIES, VOCAB, build
from zmoe.batch.plan import Fork, Plan, Span
from zmoe.cluster.mlx_prompt_cache import check_caches, read_caches, write_caches
from zmoe.cluster.prompt_cache import read_prompt_cache
from zmoe.config import EngineConfig
from zmoe.engine.mlx_caches import MlxEngine
from zmoe.errors import InputError, ZmoeError
from zmoe.exchange.local import SingleNode
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.moe.graph import Form
from zmoe.obs import Spans
from zmoe.placement.build import place_evenly

ONE_AT_A_TIME = {"llama4", "deepseek_v41"}  # their caches have no merge
TEXTS = {s: [(s * 31 + 7 * i + i * i) % VOCAB for i in range(40)] for s in range(1, 5)}


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
        looks_ahead: bool = False,
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
            form=Form(as_it_is=looks_ahead),
        )
        self.engine = MlxEngine(
            shard.model, reducer, shard.head, max_kv_size, looks_ahead=looks_ahead
        )
        self.passes, run_pass = 0, self.engine._logits

        def counted(*given: Any) -> mx.array:
            self.passes += 1
            return run_pass(*given)

        vars(self.engine)["_logits"] = counted
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


@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx", "nemotron_h", "deepseek_v3"])
def test_looking_ahead_in_vain(family: str, tmp_path: Path) -> None:
    """The likeliest token is hardly ever the next one; nemotron_h cannot go back."""
    check(family, Driver(build(family, tmp_path / family), looks_ahead=True))


def test_looking_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the likeliest token is the next one, a pass is under way when its plan comes."""
    driver = Driver(build("qwen3_moe", tmp_path), looks_ahead=True)
    for sequence in (1, 2):
        text = TEXTS[sequence][:6]
        while len(text) < 30:
            text.append(int(alone(driver._reference, text)[-1].argmax()))
        monkeypatch.setitem(TEXTS, sequence, text)
    driver.run((1, 0, 6))
    for at in range(6, 10):
        driver.run((1, at, 1))
    assert driver.passes == 6  # one for each step, and the one that is under way
    driver.run((2, 0, 6))
    assert driver.passes == 8
    driver.run((2, 6, 1), (1, 10, 1))  # side by side, so the last guess was in vain
    for at in range(1, 5):
        driver.run((1, 10 + at, 1), (2, 6 + at, 1))
    assert driver.passes == 14
    wrong = (TEXTS[1][15] + 1) % VOCAB
    monkeypatch.setitem(TEXTS, 3, [*TEXTS[1][:15], wrong, *TEXTS[1][16:]])
    driver.run((1, 15, 1), (2, 11, 1), texts={1: 3})  # another token was picked
    driver.run((1, 16, 1), (2, 12, 1), texts={1: 3})
    driver.run((2, 13, 1), free=[1])


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
    with pytest.raises(ZmoeError, match="as sequence 1, which this node holds already"):
        driver.engine.hold(1, driver.engine.layout, 4)
    driver.run((1, 4, 1))
