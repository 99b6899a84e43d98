"""What is measured is what it says: the weights' layout, sums, and the arithmetic on times."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from zmoe.calibration import matmuls, steps, weights
from zmoe.calibration.matmuls import core_sharings, line_of_experts
from zmoe.calibration.weights import FORMATS, LARGE, SMALL, Weights, expert_bytes, write_weights
from zmoe.kernels.threads import ThreadPool
from zmoe.native import ffi
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.measured import MatmulRate
from zmoe.perf.shape import BF16, F32, MXFP4, affine
from zmoe.placement.predict import Setup, Workload, predict
from zmoe.topology.cores import usable_cores

PLANNED = {"f32": F32, "bf16": BF16, "mxfp4": MXFP4, "affine-4-g64": affine(4)}
PLANNED["affine-8-g64"] = affine(8)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_that_the_planner_counts(name: str) -> None:
    assert PLANNED[name].name == name
    for shape in (LARGE, SMALL):
        assert expert_bytes(name, shape) == PLANNED[name].bytes(3 * shape.width * shape.hidden)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_lie_side_by_side(name: str) -> None:
    size = 5 * expert_bytes(name, SMALL)
    base = ffi.cast("uint8_t *", 1 << 20)
    count, layers = weights._stacks(base, size, name, SMALL)
    taken = sorted(
        (part.pointers[0] - base, part.pointers[0] - base + part.nbytes)
        for parts in layers.values()
        for part in parts.values()
    )
    assert count == 5 and taken[0][0] == 0 and taken[-1][1] == size
    assert all(end == start for (_, end), (start, _) in pairwise(taken))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    write_weights(path, 8 * expert_bytes("f32", SMALL))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_matmuls_of_the_file(name: str, file: Path) -> None:
    """Each says how much it has done, of weights that are all the same number."""
    with patch.object(weights, "LARGE", SMALL):
        made = Weights(ThreadPool(1), file)
        dense, many = made.dense(name, Random(1)), made.many(name)
        (matmul,) = {p.weight.out_features: p for p in made._matmuls(name)}.values()
    x = mx.random.normal((3, SMALL.width)).astype(mx.float32 if name == "f32" else mx.bfloat16)
    y = np.array(matmul(x).astype(mx.float32))
    assert np.isfinite(y).all() and np.ptp(y, axis=1).max() == 0  # all rows of the weight are alike
    if FORMATS[name] is None:
        bits = 0x3C3C3C3C if name == "f32" else 0x3C3C0000
        number = np.array([bits], np.uint32).view(np.float32)[0]
        expected = np.array(x.astype(mx.float32), np.float64).sum(axis=1) * number
        assert y[:, 0] == pytest.approx(expected, rel=2e-2, abs=2e-2)
    assert dense() == expert_bytes(name, SMALL) / 3
    assert many() == 2 * 128 * SMALL.width * SMALL.hidden
    assert made.experts(name, SMALL, (0, 1), Random(1))() == 4
    assert made.read((0, 2))() > 0


def test_processes_have_experts_of_their_own(file: Path) -> None:
    made, chosen = Weights(ThreadPool(1), file), []

    def partial(self: object, x: object, pairs: object, *rest: object) -> None:
        chosen.append(set(pairs.experts.tolist()))  # type: ignore[attr-defined]

    with patch.object(weights.NativeExperts, "partial", partial):
        for part in range(2):
            run = made.experts("f32", SMALL, (part, 2), Random(1))
            for _ in range(3):
                run()
    assert all(len(each) == 4 for each in chosen)
    assert set.union(*chosen[:3]) == {0, 1, 2, 3} and set.union(*chosen[3:]) == {4, 5, 6, 7}


def test_a_line_through_two_experts() -> None:
    speed, each = line_of_experts(3_000_000, 1_000_000, 110e-6, 50e-6, most=40e9)
    assert (speed, each) == pytest.approx((2e6 / 60e-6, 20e-6))
    # Nothing is read faster than memory allows, and a large one is right all the same.
    speed, each = line_of_experts(3_000_000, 1_000_000, 110e-6, 70e-6, most=40e9)
    assert speed == 40e9 and 3e6 / speed + each == pytest.approx(110e-6)
    # No more than nothing is left for beginning.
    speed, each = line_of_experts(3_000_000, 1_000_000, 110e-6, 10e-6, most=40e9)
    assert (speed, each) == (pytest.approx(3e6 / 110e-6), pytest.approx(0.0, abs=1e-12))
    # A rounding leaves no less than nothing, which a profile could not hold.
    seconds = 0.0008943838721320587
    assert line_of_experts(1_475_591, 1_000_000, seconds, seconds / 9, most=40e9)[1] == 0.0


def test_cores_are_shared_as_by_nodes() -> None:
    def dealt(nodes: int) -> list[list[int]]:
        cores = list(range(4))
        each = max(1, 4 // nodes)
        return [cores[(n * each) % 4 :][:each] for n in range(nodes)]

    with patch.object(matmuls, "divide_cores", dealt):
        found = {(len(cores), len(cores[0])) for cores in core_sharings(6)}
    assert found == {(1, 4), (1, 2), (2, 2), (1, 1), (3, 1), (4, 1)}


def test_steps_are_found_again_from_their_times(tmp_path: Path) -> None:
    """Times as the planner has them, with matmuls slower by a tenth than it thinks."""
    rates = tuple(
        MatmulRate(format, nodes, threads, 1e10, 1e10, 0.0, 1e12)
        for format in ("bf16", "cache")
        for nodes, threads in ((1, 2), (2, 1))
    )
    machine = Machine("m", 2**40, 1e10, 1e12, "a test", sync_s=0.0, cores=2, rates=rates[:2])
    with patch.object(steps, "make_model", lambda path, layers: _config_only(path, layers)):
        found = steps.Steps(tmp_path)
        truth = {
            case: (20e-6 * case.nodes + 5e-6 * (case.policy != "selected"), 1e-4 * case.nodes)
            for nodes in (1, 2)
            for case in steps.cases(nodes)
        }
        for case, (layer_s, step_s) in truth.items():
            for model, layers in zip(found._models, (steps.FEW, steps.MANY)):
                bare = replace(machine, rates=rates, layer_s=0.0)
                planned = steps._planned(model, bare, case)
                total = 1.1 * planned.decode.total + layers * layer_s + step_s
                found._found[case, model] = (total, 1.1 * steps._leaders_matmuls(planned))
        size = steps.MANY * (steps.FAR - steps.NEAR) * 2 * steps.WIDTH * 2
        near = {nodes: found._found[steps.Case(nodes), found._models[1]][0] for nodes in (1, 2)}
        found._far = {nodes: seconds + size / 1e10 for nodes, seconds in near.items()}
        made = found.add_to(machine)
    cached = [rate for rate in made.rates if rate.format == "cache"]
    assert [rate.dense for rate in cached] == pytest.approx([1e10, 1e10], rel=1e-6)
    for step in made.steps:
        case = steps.Case(step.nodes, step.schedule, step.policy)
        assert (step.layer_s, step.step_s) == pytest.approx(truth[case], rel=1e-6), case
    assert (made.layer_s, made.step_s) == pytest.approx(truth[steps.Case(1)])


def test_the_leader_computes_as_much_as_all_where_all_compute_alike(tmp_path: Path) -> None:
    rates = tuple(
        MatmulRate(format, nodes, threads, 1e10, 1e10, 0.0, 1e15)
        for format in ("bf16", "cache")
        for nodes, threads in ((1, 2), (2, 1))
    )
    machine = Machine("m", 2**40, 1e10, 1e12, "", sync_s=0.0, layer_s=0.0, cores=2, rates=rates)
    model = _config_only(tmp_path / "m", 3)
    for nodes, policy, whole in (
        (1, "selected", True),
        (1, "busy-full", True),
        (2, "busy-full", True),
        (2, "router-aided", True),
        (2, "selected", False),  # the others wait for the busiest
    ):
        planned = steps._planned(model, machine, steps.Case(nodes, policy=policy))
        share = steps._leaders_matmuls(planned) / planned.decode.total
        assert share == pytest.approx(1) if whole else 0.5 < share < 0.95


def _config_only(path: Path, layers: int) -> Path:
    """make_model's configuration; its weights are not needed."""
    with patch.object(steps.mx, "save_safetensors"), patch.object(steps.mx, "eval"):
        return REAL(path, layers)


REAL = steps.make_model


def test_the_model_runs(tmp_path: Path) -> None:
    model = steps.make_model(tmp_path / "m", 1)
    with patch.object(steps, "STEPS", 16), steps.running(model, steps.Case(1)) as clock:
        total, spent = clock(steps.NEAR)
    assert 0 < spent < total
    link = Link("none", 0.0, float("inf"), "a test", per_peer_s=0.0)
    machine = Machine("m", 2**40, 1e10, 1e12, "a test")
    setup = Setup(steps._shape(model), (machine,), link, Workload(context=10))
    assert predict(setup, 1).fits


def test_ctrl_c_is_for_the_command_alone(tmp_path: Path) -> None:
    """A terminal sends it to the processes that measure, too; each would print a traceback."""
    path = tmp_path / "weights"
    write_weights(path, 8 * expert_bytes("f32", LARGE))
    with matmuls._group([(min(usable_cores()),)], path) as group:
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        group.measure("f32")
        assert group.rate("f32", 0).dense > 0
    assert not multiprocessing.active_children()
