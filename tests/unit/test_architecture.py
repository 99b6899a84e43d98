"""The README's import table is the law: who may import whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "zmoe"


def table() -> dict[str, set[str]]:
    """Room -> rooms that it may import, as the README says."""
    section = (ROOT / "README.md").read_text().split("## Architecture")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path) -> None:
    allowed = table()
    room = room_of(path)
    assert room in allowed, f"the README's table lacks `{room}`"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "zmoe" or name == "zmoe.__version__":
            continue
        assert parts[1] != "_native" or room == "native", f"{path.name} imports the compiled module"
        assert parts[1] in allowed[room] | {room, "_native"}, f"{room} may not import {parts[1]}"


def test_the_engine_never_imports_the_cluster() -> None:
    assert "cluster" not in table()["engine"]
