"""Settings out of range are refused by their name, in a command by that of their flag."""

from __future__ import annotations

import re
import signal
from dataclasses import asdict
from typing import Any

import pytest

from zmoe.cli.common import run_command
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import EngineConfig, Sampling, Timing
from zmoe.errors import SettingError


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Sampling, "max_tokens", 0),
        (Sampling, "max_tokens", -3),
        (Sampling, "temp", -0.1),
        (Sampling, "temp", float("nan")),
        (Sampling, "temp", float("inf")),
        (Sampling, "max_tokens", 2.5),
        (Sampling, "max_tokens", True),
        (Sampling, "temp", "1"),
        (Sampling, "top_p", 0.0),
        (Sampling, "top_p", 1.1),
        (Sampling, "top_k", -1),
        (Sampling, "min_p", 2.0),
        (Sampling, "seed", -1),
        (Sampling, "repetition_penalty", -1.0),
        (Sampling, "repetition_penalty", 0.001),
        (Sampling, "repetition_context_size", 0),
        (Sampling, "presence_penalty", 2.5),
        (Sampling, "frequency_penalty", float("nan")),
        (Sampling, "logit_bias", [1, 2]),
        (Sampling, "logit_bias", {"5": 1.0}),
        (Sampling, "logit_bias", {-1: 1.0}),
        (Sampling, "logit_bias", {5: 101}),
        (Sampling, "logit_bias", {5: None}),
        (Sampling, "logprobs", 21),
        (Sampling, "logprobs", True),
        (ClusterSpec, "nodes", 0),
        (ClusterSpec, "nodes", "2"),
        (ClusterSpec, "nodes", True),
        (Timing, "peer", 0.0),
        (Timing, "join", float("nan")),
        (EngineConfig, "prefill_chunk", 0),
        (EngineConfig, "max_kv_size", 2),
        (EngineConfig, "kv_bits", 4),
        (EngineConfig, "wire_dtype", "int4"),
        (EngineConfig, "schedule", "federal"),
    ],
)
def test_out_of_range(kind: Any, field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"^{field} is {re.escape(repr(value))}: expected "):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("field", "flag"),
    [("max_tokens", "--max-tokens"), ("prefill_chunk", "--prefill-step-size")],
)
def test_a_command_names_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: str, flag: str
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def refuse() -> None:
        raise SettingError(field, "is 0: expected more")

    assert run_command("zmoe-run", False, refuse) == 2
    assert f"{flag} is 0: expected more" in capsys.readouterr().err


def test_defaults_are_greedy() -> None:
    assert Sampling().temp == 0.0


def test_a_bias_is_the_settings_own() -> None:
    given = {5: -1.0}
    sampling = Sampling(logit_bias=given, seed=1)
    given[5] = 1000.0
    assert sampling.logit_bias == {5: -1.0}
    assert hash(sampling) == hash(Sampling(**asdict(sampling)))
    assert sampling == Sampling(**asdict(sampling)) != Sampling(logit_bias={5: 1.0}, seed=1)
