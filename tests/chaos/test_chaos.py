"""A short part of tests.chaos, with fixed seeds; its programs take as long as they are told."""

from __future__ import annotations

import random

import pytest

from tests.chaos.kills import KINDS, Results
from tests.chaos.stops import stopped_for_long
from tests.cluster.conftest import Commands, commands

__all__ = ["commands"]


@pytest.mark.parametrize(("kind", "seed", "rounds"), [("workers", 44, 4), ("serve", 1, 2)])
def test_kills(kind: str, seed: int, rounds: int) -> None:
    results = Results()
    KINDS[kind](random.Random(seed), rounds, results, kind)
    assert results.counts == {"same text": rounds}


def test_a_node_that_hung_comes_back(commands: Commands) -> None:
    stopped_for_long(commands)
