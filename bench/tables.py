"""Writes the tables of the documentation anew, from what --save kept in results/.

A table stands between `<!-- begin: bench/PROGRAM ARGUMENTS -->`, the command that prints it, and
`<!-- end -->`. Nothing is measured: a command without --kept is refused. A table whose figures were
not kept stays as it is, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys

from common import BENCH, BenchError, main

DEADLINE_S = 60
TABLE = re.compile(r"(<!-- begin: bench/(\S+\.py) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def printed(program: str, arguments: str) -> str:
    """What a program of bench/ prints of what was kept."""
    words = shlex.split(arguments)
    if not {"--kept", "--markdown"} <= set(words):
        raise BenchError(f"{program} {arguments}: a table takes --kept --markdown")
    command = [sys.executable, str(BENCH / program), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def benchmark() -> int:
    made = argparse.ArgumentParser(description="Write the documentation's tables from results/.")
    made.parse_args()
    root, status = BENCH.parent, 0

    def table(found: re.Match[str]) -> str:
        nonlocal status
        try:
            return found[1] + printed(found[2], found[3]) + found[4]
        except BenchError as error:
            print(f"tables.py: {error}", file=sys.stderr)
            status = 1
            return found[0]

    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        before = path.read_text()
        after = TABLE.sub(table, before)
        if after != before:
            path.write_text(after)
            print(path.relative_to(root))
    return status


if __name__ == "__main__":
    main(benchmark)
