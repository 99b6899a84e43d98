"""The README's import table is the law: who may import whom, and who does."""

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


def rooms_imported(path: Path) -> set[str]:
    """The package's other rooms that a file imports."""
    ours = (n for n in imports(path) if n.startswith("zmoe.") and n != "zmoe.__version__")
    return {name.split(".")[1] for name in ours} - {room_of(path)}


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
ROOMS = sorted({room_of(path) for path in SOURCES})


def test_the_table_has_every_room() -> None:
    assert sorted(table()) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_those_of_the_table(room: str) -> None:
    """No file imports what its row lacks, and the row names nothing that no file imports."""
    allowed, used = table()[room], set()
    for path in (path for path in SOURCES if room_of(path) == room):
        found = rooms_imported(path)
        if room == "native":
            found.discard("_native")
        assert found <= allowed, f"{path}: {room} may not import {sorted(found - allowed)}"
        used |= found
    assert used == allowed, f"nothing in {room} imports {sorted(allowed - used)}"
