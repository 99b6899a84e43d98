"""Every setting has its flag, and what a flag was given reaches the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmoe.cli import node, run
from zmoe.cli.cluster import cluster_spec
from zmoe.cli.common import given_settings
from zmoe.cluster.spec import ClusterSpec, PlacementRequest, RemoteOptions, WorkerSpec
from zmoe.config import Batching, EngineConfig, Sampling, Settings, Timing, fields_of

# All flags of settings of zmoe-run, and what they say.
RUN: list[tuple[str, Settings]] = [
    (
        "-m 3 --temp 1 --top-p .5 --top-k 7 --min-p .1 --seed 4 --repetition-penalty 1.1 "
        "--repetition-context-size 9 --presence-penalty -.5 --frequency-penalty .25",
        Sampling(
            max_tokens=3,
            temp=1.0,
            top_p=0.5,
            top_k=7,
            min_p=0.1,
            seed=4,
            repetition_penalty=1.1,
            repetition_context_size=9,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
        ),
    ),
    (
        "--prefill-step-size 9 --max-kv-size 64 --kv-bits 8 --compute native --activations int8 "
        "--wire-dtype q8 --backend zmq --attention replicated --schedule centralized "
        "--policy busy-full",
        EngineConfig(
            parallel=1,
            prefill_chunk=9,
            max_kv_size=64,
            kv_bits=8,
            compute="native",
            activations="int8",
            wire_dtype="q8",
            backend="zmq",
            attention="replicated",
            schedule="centralized",
            policy="busy-full",
        ),
    ),
    ("--speculate 3", Batching(speculate="3")),
    (
        "--join-timeout 1 --load-timeout 2 --peer-timeout 3",
        Timing(join=1.0, load=2.0, peer=3.0),
    ),
    (
        "--placement replicas --usage u.json --memory-limit 0.5",
        PlacementRequest(way="replicas", usage=Path("u.json"), memory_limit=1 << 29),
    ),
]
OF_MANY_TEXTS = {"parallel", "step_ms", "max_queue"}  # zmoe-run writes one


@pytest.mark.parametrize(("flags", "settings"), RUN, ids=lambda each: type(each).__name__)
def test_what_a_flag_says_reaches_its_setting(flags: str, settings: Settings) -> None:
    options = run._parser().parse_args([*flags.split(), "x"])
    kind = type(settings)
    given = given_settings(options, kind)
    assert all(getattr(settings, name) == value for name, value in given.items())
    assert given.keys() == {f.name for f in fields_of(kind) if f.setting.help} - OF_MANY_TEXTS
    if kind is Sampling:
        assert Sampling(**given) == settings
    else:
        assert settings in vars(cluster_spec(options, parallel=1)).values()


def test_flags_of_the_nodes() -> None:
    def spec(flags: str) -> ClusterSpec:
        options = run._parser().parse_args([*flags.split(), "x"])
        return cluster_spec(options, parallel=1)

    one = EngineConfig(parallel=1)
    assert spec("") == ClusterSpec(engine=one)
    wanted = ClusterSpec(nodes=2, manual=True, bind="127.0.0.1", port=9, engine=one)
    assert spec("-n 2 --manual --bind 127.0.0.1 --starting-port 9") == wanted
    assert spec("--hosts 127.0.0.1,localhost").nodes == 2
    options = run._parser().parse_args(["--python", "p", "--cwd", "c", "--env", "A=1", "x"])
    assert RemoteOptions(**given_settings(options, RemoteOptions)) == RemoteOptions(
        python="p",
        cwd="c",
        env=["A=1"],  # type: ignore[arg-type]
    )


def test_flags_of_a_worker() -> None:
    flags = "--leader h:1 --rank 3 --bind 127.0.0.2 --model m --memory-limit 1 --once"
    options = node._parser().parse_args([*flags.split(), "--join-timeout", "5"])
    assert node._spec(options) == WorkerSpec(
        leader="h:1",
        rank=3,
        bind="127.0.0.2",
        model="m",
        memory_limit=1 << 30,
        join_timeout=5.0,
    )
