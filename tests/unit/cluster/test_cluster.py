"""The library's door on a single node: what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache
from mlx_lm.utils import load_model

import zmoe
from tests.families import build
from zmoe.cluster import life
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.hosts import Host, HostList
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import EngineConfig, Sampling
from zmoe.engine import mlx_caches
from zmoe.engine.prompt import open_tokenizer
from zmoe.errors import InputError, SettingError
from zmoe.placement.usage import read_usage


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("zmoe-tiny") as alone:
        yield alone


@pytest.mark.parametrize("ids", [[], [999999], [-1], [1.5], [True], [[5, 6]], b"ROMEO:", 5])
def test_token_ids_that_are_none(cluster: Cluster, ids: Any) -> None:
    with pytest.raises(InputError, match="the prompt (is|holds)"):
        cluster.generate(ids)


def test_token_ids_in_arrays_are_fine(cluster: Cluster) -> None:
    wanted = [token.id for token in cluster.generate([5, 6, 7], max_tokens=4)]
    for array in (np.array, mx.array):
        assert [t.id for t in cluster.generate(array([5, 6, 7]), max_tokens=4)] == wanted


def test_options_come_once(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="sampling or temp, not both"):
        cluster.generate("x", Sampling(), temp=1.0)
    with pytest.raises(TypeError, match="heat"):
        cluster.generate("x", heat=1.0)


def test_arguments_of_other_kinds(cluster: Cluster) -> None:
    other: Any = {}
    with pytest.raises(SettingError, match="^spec is {}: expected a ClusterSpec"):
        Cluster("zmoe-tiny", spec=other)
    with pytest.raises(SettingError, match="^nodes is 3, and spec.nodes 2: give one"):
        Cluster("zmoe-tiny", 3, spec=ClusterSpec(nodes=2))
    with pytest.raises(SettingError, match="^model is 3: expected a folder or a name"):
        Cluster(3)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="^sampling is {}: expected a Sampling"):
        cluster.generate("x", other)


def test_top_k_above_the_vocabulary(cluster: Cluster) -> None:
    with pytest.raises(SettingError, match="^top_k is 1024: expected less than the model's 1024"):
        cluster.generate("x", top_k=1024, temp=1.0)
    assert len(list(cluster.generate("x", top_k=1023, temp=1.0, max_tokens=2))) == 2


def test_a_bias_of_a_token_that_is_none(cluster: Cluster) -> None:
    with pytest.raises(SettingError, match="^logit_bias has token 1024: the model's are below"):
        cluster.generate("x", logit_bias={3: 1.0, 1024: 1.0})
    (token,) = cluster.generate("x", logit_bias={1023: 100.0}, max_tokens=1, ignore_eos=True)
    assert token.id == 1023


def test_a_window_goes_on_past_the_context(cluster: Cluster) -> None:
    context = cluster.info.context_length
    assert context == 1024
    more = {"max_tokens": 30, "ignore_eos": True}
    prompt = [5 + at % 7 for at in range(context - 10)]
    bounded = cluster.generate(prompt, **more)
    assert len(list(bounded)) == 10 and bounded.context_full
    windowed = ClusterSpec(engine=EngineConfig(max_kv_size=256))
    with Cluster("zmoe-tiny", spec=windowed) as window:
        free = window.generate(prompt + prompt, **more)
        assert len(list(free)) == 30 and not free.context_full


@pytest.mark.parametrize("compute", ["native", "mlx"])
def test_a_window_is_that_of_mlx_lm_for_many_at_once(compute: str) -> None:
    """Those in MLX's caches run one at a time, which a notice says."""
    spec = ClusterSpec(engine=EngineConfig(max_kv_size=64, parallel=3, compute=compute))
    prompts = [[5 + (seed * at) % 90 for at in range(80 * seed)] for seed in (1, 2, 3)]
    with Cluster("zmoe-tiny", spec=spec) as cluster:
        assert any("one at a time" in line for line in cluster.notices) == (compute == "mlx")
        running = [cluster.submit(ids, max_tokens=150, ignore_eos=True) for ids in prompts]
        texts = [[token.id for token in generation] for generation in running]
        folder = Path(cluster.info.path)
    if compute == "mlx":
        return  # mlx-lm's chunks of a prompt see other keys than its rows one by one
    model, _ = load_model(folder)
    for prompt, text in zip(prompts, texts):
        cache = make_prompt_cache(model, 64)
        for token in prompt:
            row = model(mx.array([[token]]), cache=cache)[0, -1]
        for token in text:
            assert float(row.max() - row[token]) < 1e-3  # whichever of two that are equal
            row = model(mx.array([[token]]), cache=cache)[0, -1]


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_family_that_runs_one_at_a_time_says_so(
    parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of mlx-lm's caches, ChunkedKVCache cannot be merged."""
    monkeypatch.setattr(
        mlx_caches, "make_prompt_cache", lambda *_: [ChunkedKVCache(8192) for _ in range(4)]
    )
    spec = ClusterSpec(engine=EngineConfig(parallel=parallel, compute="mlx"))
    with Cluster("zmoe-tiny", spec=spec) as cluster:
        told = [line for line in cluster.notices if "one at a time" in line]
    assert len(told) == (parallel > 1)


def test_the_step_that_warms_up_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recurrent caches cannot go back, so that what it left would stay."""
    tiny = open_tokenizer(Path(Cluster("zmoe-tiny").info.path))
    monkeypatch.setattr(life, "open_tokenizer", lambda _: tiny)
    folder = build("qwen3_next", tmp_path)
    with Cluster(folder) as hybrid:
        pair = [hybrid.submit([at], max_tokens=6, ignore_eos=True) for at in (7, 8)]
        texts = [[token.id for token in generation] for generation in pair]
    model, _ = load_model(folder)
    for prompt, text in zip((7, 8), texts):
        cache = make_prompt_cache(model)
        for last, token in zip([prompt, *text], text):
            row = model(mx.array([[last]]), cache=cache)[0, -1]
            assert float(row.max() - row[token]) < 1e-3


def test_a_window_of_a_model_that_has_none(tmp_path: Path) -> None:
    folder = build("gpt_oss", tmp_path)
    with pytest.raises(SettingError, match="^max_kv_size is 64: gpt_oss has a cache of its own"):
        Cluster(folder, spec=ClusterSpec(engine=EngineConfig(max_kv_size=64)))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v2", "the CPU kernels do not run all layers of deepseek_v2"),
        ("deepseek_v3", "the latents of deepseek_v3 are kept in full"),
    ],
)
def test_kv_bits_of_a_family_that_has_none(
    family: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "open_tokenizer", lambda folder: None)
    spec = ClusterSpec(engine=EngineConfig(kv_bits=8))
    with (
        pytest.raises(SettingError, match=f"^kv_bits is 8: expected none, as {reason}"),
        Cluster(build(family, tmp_path), spec=spec),
    ):
        pass


def test_the_usage_is_saved(tmp_path: Path) -> None:
    file = tmp_path / "usage.json"
    with Cluster("zmoe-tiny", spec=ClusterSpec(record_usage=True)) as recording:
        for rows in (3, 5):  # the second time it is added
            list(recording.generate([5] * rows, max_tokens=1))
            recording.save_usage(file)
        with pytest.raises(InputError, match="nowhere"):
            recording.save_usage(tmp_path / "nowhere" / "usage.json")
        info = recording.info
    (first, *_) = read_usage(file, info).counts
    assert sum(first) == (3 + 5) * info.top_k


def test_all_that_is_public_is_there() -> None:
    for name in zmoe.__all__:
        assert getattr(zmoe, name) is not None
    for name in ("DivergenceError", "HostList", "LaunchError", "PlacementError", "RemoteOptions"):
        assert name in zmoe.__all__


def test_generations_go_on_beside_each_other(cluster: Cluster) -> None:
    want = "".join(token.text for token in cluster.generate("ROMEO:", max_tokens=9))
    older = cluster.generate("ROMEO:", max_tokens=9)
    next(older)
    newer = cluster.generate("JULIET:", max_tokens=3)
    assert len(list(newer)) == 3
    list(older)
    assert older.text == want


def test_addresses_that_others_cannot_reach() -> None:
    hosts = HostList((Host("a", "127.0.1.1"), Host("b", "10.1.2.3")))
    words = "the first host, a, is this machine at 127.0.1.1, where b cannot reach it"
    with pytest.raises(InputError, match=words):
        ClusterSpec(nodes=2, hosts=hosts)
    for address in ("0.0.0.0", "no address", "::1"):
        with pytest.raises(InputError, match=f"^bind is {address}"):
            ClusterSpec(nodes=2, bind=address)


def test_addresses_of_other_machines() -> None:
    """192.0.2.1 is kept for documentation: no machine has it."""
    elsewhere = Host("a", "192.0.2.1")
    words = "the first host, a, has to be this machine, which does not have the address 192.0.2.1"
    with pytest.raises(InputError, match=words):
        ClusterSpec(nodes=2, hosts=HostList((elsewhere, Host("b", "192.0.2.2"))))
    with pytest.raises(InputError, match="^bind is 192.0.2.1: this machine does not have"):
        ClusterSpec(nodes=2, bind="192.0.2.1")
    hosts = HostList((elsewhere, Host("b", "10.1.2.3")))
    with pytest.raises(InputError, match="^bind is 127.0.0.1, where b cannot reach this machine"):
        ClusterSpec(
            nodes=2, hosts=HostList((Host("a", "127.0.0.1"), hosts.hosts[1])), bind="127.0.0.1"
        )
    ClusterSpec(nodes=1, hosts=HostList((elsewhere,)))  # where nobody listens
