"""Profiles: what is written can be read, and what is malformed is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.errors import InputError
from zmoe.perf.measured import MatmulRate, StepRate
from zmoe.perf.profile import Profile, is_profile, read_profile, write_profile

MEASURED = replace(
    MACHINES["epyc"],
    cores=2,
    rates=(
        MatmulRate("bf16", 1, 2, 40e9, 35e9, 0.0, 1e11),
        MatmulRate("bf16", 2, 1, 3e10, 2e10, 1e-6, 5e10),
    ),
    steps=(StepRate(1, "decentralized", "selected", 5e-5, 0.0),),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    write_profile(path, Profile(MEASURED, LINKS["1gbe"]))
    return path


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_round_trip(name: str, tmp_path: Path) -> None:
    for link in LINKS.values():
        machine = replace(MACHINES[name], cores=2, rates=MEASURED.rates, steps=MEASURED.steps)
        profile = Profile(machine, link)
        write_profile(tmp_path / "p.json", profile)
        assert read_profile(tmp_path / "p.json") == profile
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(extra=1), "unknown field extra"),
        (lambda p: p["machine"].update(colour="red"), "unknown field machine.colour"),
        (lambda p: p["link"].update(mtu=9000), "unknown field link.mtu"),
        (lambda p: p["machine"].pop("bandwidth"), "field machine.bandwidth is missing"),
        (lambda p: p["machine"].update(bandwidth=0), "field machine.bandwidth is 0"),
        (lambda p: p["machine"].update(bandwidth="fast"), 'machine.bandwidth is "fast"'),
        (lambda p: p["machine"].update(bandwidth=None), "machine.bandwidth is null"),
        (lambda p: p["machine"].update(rate=True), "machine.rate is true"),
        (lambda p: p["machine"].update(rate=float("nan")), "machine.rate is NaN"),
        (lambda p: p["machine"].update(rate=float("inf")), "machine.rate is Infinity"),
        (lambda p: p["machine"].update(memory_bytes=1.5), "machine.memory_bytes is 1.5"),
        (lambda p: p["machine"].update(usable_share=1.1), "machine.usable_share is 1.1"),
        (lambda p: p["machine"].update(name=""), 'machine.name is ""'),
        (lambda p: p["link"].update(latency_s=-1), "link.latency_s is -1"),
        (lambda p: p["link"].update(supported=1), "link.supported is 1"),
        (lambda p: p.pop("link"), "field link: expected an object"),
        (lambda p: p["machine"].update(cores=0), "machine.cores is 0: expected a whole number"),
        (lambda p: p["machine"].update(cores=1.5), "machine.cores is 1.5"),
        (lambda p: p["machine"].update(rates={}), "field machine.rates: expected a list"),
        (lambda p: p["machine"].update(rates=[3]), "machine.rates[0]: expected an object"),
        (lambda p: p["machine"]["rates"][1].pop("many"), "machine.rates[1].many is missing"),
        (lambda p: p["machine"]["rates"][1].update(dense=0), "machine.rates[1].dense is 0"),
        (lambda p: p["machine"]["rates"][0].update(colour=1), "field machine.rates[0].colour"),
        (lambda p: p["machine"]["steps"][0].update(layer_s=-1), "machine.steps[0].layer_s is -1"),
        (lambda p: p.update(zmoe_profile=4), "zmoe_profile is 4: expected 3"),
        (lambda p: p.pop("zmoe_profile"), "zmoe_profile is null: expected 3"),
    ],
)
def test_a_malformed_field_is_named(
    change: Callable[[dict[str, Any]], None], words: str, path: Path
) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_profile(path: Path) -> None:
    for text, words in (("{", "is not JSON"), ("[]", "expected a JSON object"), ("\xff", "JSON")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_profile(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_profile(path.parent / "absent.json")
    with pytest.raises(InputError, match="cannot be written"):
        write_profile(path.parent / "no" / "p.json", Profile(MACHINES["epyc"], LINKS["1gbe"]))


def test_a_profile_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder cannot be written: Is a directory"):
        write_profile(tmp_path / "folder", Profile(MACHINES["epyc"], LINKS["1gbe"]))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_price_may_be_unknown_and_zero_time_is_time(path: Path) -> None:
    record = json.loads(path.read_text())
    record["machine"].update(price_usd=None, sync_s=0, wiring=None)
    path.write_text(json.dumps(record))
    assert read_profile(path).machine.price_usd is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_profile_of_an_earlier_version_is_to_be_measured_again(path: Path, version: int) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "zmoe_profile": version}))
    with pytest.raises(InputError, match=r"expected 3: measure again with zmoe-plan --calibrate"):
        read_profile(path)
    assert is_profile(path)  # and may be written over
    for other in ("{}", "[]", "{", '{"zmoe_profile": 2}'):
        path.write_text(other)
        assert not is_profile(path)
