"""A small model as it is published, and its store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import build
from tests.unit.store.stores import store_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build("mixtral", tmp_path / "source", layout="hf")


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Path:
    return store_of(source, tmp_path / "whole")
