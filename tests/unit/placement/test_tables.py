"""A run needs the performance model's equations, not zmoe-plan's tables and advice."""

from __future__ import annotations

import subprocess
import sys

RUN = """
import sys
from zmoe.cli.run import main

assert main(["--explain", "--nodes", "1", "--max-tokens", "1", "ROMEO:"]) == 0
tables = {"MACHINES", "LINKS", "MODELS", "PUBLISHED", "purchases", "look_up"}
found = [
    name
    for name, module in sys.modules.items()
    if name.startswith("zmoe.cli.plan") or (name.startswith("zmoe.") and tables & {*vars(module)})
]
sys.exit(f"loaded: {found}" if found else 0)
"""


def test_a_run_with_explain_loads_no_table_of_the_planner() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "predicted by the cost model" in done.stderr
