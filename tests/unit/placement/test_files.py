"""Placement files and usage profiles: what is read back, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.placement.conftest import described
from zmoe.errors import InputError, PlacementError
from zmoe.placement.file import read_placement
from zmoe.placement.types import Placement
from zmoe.placement.usage import Usage, UsageRecorder, add_usage, check_usage_file, read_usage

GOOD = {"experts": 3, "nodes": 2, "owned": [[1, 0], [2]]}


def written(tmp_path: Path, record: Any) -> Path:
    path = tmp_path / "file.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def test_one_layer_stands_for_all(tmp_path: Path) -> None:
    layer = ((0, 1), (2,))
    assert read_placement(written(tmp_path, GOOD), 2) == Placement(2, 3, (layer, layer))


def test_everything_at_once(tmp_path: Path) -> None:
    every, some = [[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [2, 0, 1]]
    record = {**GOOD, "owned": [every, some], "slices": [[0, 64], [64, 128]], "speeds": [2, 3]}
    layer = ((0, 1, 2), (0, 1, 2))
    assert read_placement(written(tmp_path, record), 2) == Placement(
        2, 3, (layer, layer), ((0, 64), (64, 128)), (2, 3)
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "expected a JSON object"),
        ({**GOOD, "node": 2}, "unknown field node"),
        ({"experts": 3, "nodes": 2}, "field owned is missing"),
        ({**GOOD, "nodes": 65}, "field nodes is 65: expected a whole number from 1 to 64"),
        ({**GOOD, "experts": True}, "field experts is true"),
        ({**GOOD, "owned": [1]}, "field owned: expected a list of lists"),
        ({**GOOD, "owned": [[0, 1.5], [2]]}, r"field owned\[0\]\[0\] is 1.5"),
        ({**GOOD, "owned": [[[0, 1], 2]]}, r"field owned\[0\]\[1\]: expected a list"),
        ({**GOOD, "owned": [[[0, 1], [-2]]]}, r"field owned\[0\]\[1\] is -2"),
        ({**GOOD, "slices": [[0, 1], [1]]}, r"field slices\[1\]: expected .start, end."),
        ({**GOOD, "speeds": "fast"}, "field speeds: expected a list"),
    ],
)
def test_placements_that_are_none(tmp_path: Path, record: Any, words: str) -> None:
    path = written(tmp_path, record)
    with pytest.raises(PlacementError, match=words) as caught:
        read_placement(path, 1)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="nowhere.json cannot be read: No such file"):
        read_placement(tmp_path / "nowhere.json", 1)


# ---- usage -----------------------------------------------------------------------


def test_usage_adds_up(tmp_path: Path) -> None:
    info = described(3, 2)
    path = tmp_path / "usage.json"
    usage = Usage(info.fingerprint, ((1, 0, 5), (2, 2, 2)))
    check_usage_file(path, info)
    add_usage(path, usage, info)
    assert read_usage(path, info) == usage
    check_usage_file(path, info)
    add_usage(path, usage, info)
    assert read_usage(path, info).counts == ((2, 0, 10), (4, 4, 4))
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_run_selects_is_counted() -> None:
    recorder, none = UsageRecorder(described(3, 2)), np.empty(0, np.int32)
    for step, ids in enumerate(([[0, 2], [2, 3]], [[2, -1]]), 1):  # 3 and -1 are nobody's
        with recorder.step(step):
            recorder(1, np.array(ids, np.int32), none, none)
    assert recorder.take() == Usage("f00d", ((0, 0, 0), (1, 0, 3)))
    assert recorder.take() == Usage("f00d", ((0, 0, 0), (0, 0, 0)))


def test_steps_that_are_repeated_count_once() -> None:
    recorder, none = UsageRecorder(described(3, 2)), np.empty(0, np.int32)

    def run(step: int, expert: int, *, is_lost: bool = False) -> None:
        with recorder.step(step):
            recorder(0, np.array([[expert]], np.int32), none, none)
            if is_lost:
                raise ConnectionError

    for step in range(1, 6):
        run(step, 0)
    with pytest.raises(ConnectionError):
        run(6, 1, is_lost=True)
    run(5, 0)
    run(6, 1)
    assert recorder.take() == Usage("f00d", ((5, 1, 0), (0, 0, 0)))
    run(6, 1)  # what was taken already
    run(7, 2)
    run(6, 1)
    run(7, 2)
    assert recorder.take() == Usage("f00d", ((0, 0, 1), (0, 0, 0)))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("[1", "is not JSON"),
        ([], "is no usage profile"),
        ({"zmoe_usage": 2}, "is no usage profile"),
        ({"zmoe_usage": 1, "fingerprint": "f00d"}, "field counts is missing"),
        ({"zmoe_usage": 1, "fingerprint": "f00d", "counts": [], "more": 1}, "field more is unkn"),
        ({"zmoe_usage": 1, "fingerprint": "beef", "counts": []}, "another model.*beef, not f00d"),
        ({"zmoe_usage": 1, "fingerprint": "f00d", "counts": [[1, 2]]}, "2 lists of 3"),
        ({"zmoe_usage": 1, "fingerprint": "f00d", "counts": [[1, 2, -3]] * 2}, "2 lists of 3"),
        ({"zmoe_usage": 1, "fingerprint": "f00d", "counts": [[1, 2, True]] * 2}, "2 lists of 3"),
    ],
)
def test_profiles_that_are_none(tmp_path: Path, record: Any, words: str) -> None:
    path = written(tmp_path, record)
    with pytest.raises(InputError, match=words) as caught:
        read_usage(path, described(3, 2))
    assert str(path) in str(caught.value)


def test_a_profile_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, usage = described(1, 1), Usage("f00d", ((1,),))
    with pytest.raises(InputError, match="cannot be written: no such folder"):
        check_usage_file(tmp_path / "nowhere" / "usage.json", info)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(InputError, match="usage.json cannot be written: No space left"):
        add_usage(tmp_path / "usage.json", usage, info)
    assert list(tmp_path.iterdir()) == []
