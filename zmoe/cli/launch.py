"""zmoe-launch: run any MLX program on several nodes, over zmoe's exchange."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import select
import signal
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zmoe.cli.cluster import cluster_spec
from zmoe.cli.common import Parser, add_hosts, add_settings, run_command, warn_unencrypted
from zmoe.cli.node import end_with_input, pin, told_by_leader
from zmoe.cluster.hosts import check_bind, check_leader
from zmoe.cluster.spec import ClusterSpec, RemoteOptions, WorkerSpec
from zmoe.config import Timing
from zmoe.errors import InputError, PeerError, ZmoeError

if TYPE_CHECKING:
    from zmoe.cluster.program import Rank

PROG = "zmoe-launch"
_WATCH_S = 0.05
_SIGNAL_S = 1.0  # after Ctrl-C or SIGTERM, for the program to end by itself
_OF_THE_FIRST = {
    "nodes",
    "manual",
    "starting_port",
    "python",
    "env",
    "cwd",
    "peer_timeout",
    "ports",
}


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Run an MLX program on several nodes, with zmoe's exchange as its mx.distributed group. "
        "Standard output is that of the first node; what the others print goes to standard error, "
        "each line with their rank.",
    )
    parser.usage = f"{PROG} [options] (SCRIPT | -m MODULE) [ARGS ...]"
    add = parser.add_argument
    help_of_module = "Run this module, with all the arguments after it"
    add("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help=help_of_module)
    add("script", nargs=argparse.REMAINDER, metavar="SCRIPT", help="Run this file of Python")
    add = parser.add_argument_group("nodes").add_argument
    add_settings(add, ClusterSpec, "nodes")
    add_hosts(add)
    add_settings(add, ClusterSpec, "manual", "bind", "port", "ports", "key", "insecure")
    add_settings(add, RemoteOptions)
    add_settings(add, Timing, "join", "peer")
    add = parser.add_argument_group("a node that is started by hand").add_argument
    add("--leader", metavar="HOST:PORT", help="Where the first node's zmoe-launch listens")
    add("--rank", type=int, help="Rank of this node, counted from 1")
    add("--cores", metavar="CPUS", help="CPUs to run on, such as 0-3,8 (Linux)")
    add("--tied", action="store_true", help="As zmoe-node's")
    return parser


# ---- the program ---------------------------------------------------------------------


class _Program:
    """What the command line says to run."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises InputError for none."""
        self.is_module = options.module is not None
        self.words: list[str] = options.module if self.is_module else options.script
        if not self.words:
            name = "MODULE" if self.is_module else "SCRIPT"
            raise InputError(f"no {name}: give a program to run (see {PROG} --help)")

    @property
    def arguments(self) -> list[str]:
        """For another node's command line."""
        name, *given = self.words
        return ["-m", name, *given] if self.is_module else [str(Path(name).resolve()), *given]

    def check(self) -> None:
        """Raise InputError if there is no such program."""
        name = self.words[0]
        if not self.is_module:
            if not Path(name).is_file():
                raise InputError(f"SCRIPT {name}: no such file")
            return
        sys.path.insert(0, os.getcwd())
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise InputError(f"-m {name}: no such module")

    def run(self) -> int:
        """Run it as Python would, and return its exit code."""
        name, *_ = sys.argv = self.words[:]
        try:
            if self.is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(Path(name).resolve().parent))
                runpy.run_path(name, run_name="__main__")
            for thread in threading.enumerate():
                if thread is not threading.main_thread() and not thread.daemon:
                    thread.join()
        except SystemExit as end:
            return _code_of(end)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BaseException as error:
            _print_traceback(error)
            return 1
        return 0


def _code_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """Without what is not the program's."""
    trace = error.__traceback__
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace))


# ---- joining ---------------------------------------------------------------------------


def _leader(options: argparse.Namespace, program: _Program) -> Rank | None:
    """Rank 0; None where it is the only one. Raises InputError."""
    for name in ("leader", "cores"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for a node that is started by hand: give its --rank")
    if options.tied:
        raise InputError("--tied is for a node that is started by hand: give its --rank")
    spec = cluster_spec(options)
    program.check()
    if spec.nodes == 1:
        return None
    warn_unencrypted(PROG, spec.address, spec.insecure)
    from zmoe.cluster.launch import ask_for_nodes
    from zmoe.cluster.program import ProgramLeader

    return ProgramLeader(
        spec,
        program.arguments,
        lambda lines: print(f"{PROG}: {ask_for_nodes(lines)}", file=sys.stderr),
        _print_line,
    )


def _print_line(rank: int, line: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads any more
        print(f"[{rank}] {line}", file=sys.stderr, flush=True)


def _worker(options: argparse.Namespace, program: _Program) -> Rank:
    """The rank that the flags say. Raises InputError."""
    for name in sorted(vars(options).keys() & _OF_THE_FIRST):
        raise InputError(f"--{name.replace('_', '-')} is for the first node, and not with --rank")
    if options.hosts is not None or options.hostfile is not None:
        raise InputError("--hosts and --hostfile are for the first node, and not with --rank")
    if options.leader is None:
        raise InputError("--rank is for a node that is started by hand: give its --leader")
    bind = getattr(options, "bind", "127.0.0.1")
    patience = getattr(options, "join_timeout", Timing().join)
    key, insecure = getattr(options, "key", None), getattr(options, "insecure", False)
    spec = WorkerSpec(
        options.leader, options.rank, bind, key=key, insecure=insecure, join_timeout=patience
    )
    if options.tied:
        spec = told_by_leader(spec)
        alive = os.dup(0)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)  # for the program
        threading.Thread(target=end_with_input, args=(alive,), daemon=True).start()
    if options.cores is not None:
        pin(options.cores)
    check_leader(options.leader, "--leader")
    check_bind(bind)
    spec.pinned()  # raises where there has to be a key
    warn_unencrypted(f"{PROG}[{options.rank}]", bind, spec.insecure)
    program.check()
    from zmoe.cluster.program import ProgramWorker
    from zmoe.exchange.sockets import Context

    return ProgramWorker(spec, Context())


def _join(options: argparse.Namespace, program: _Program) -> Rank | None:
    rank = (_leader if options.rank is None else _worker)(options, program)
    if rank is None:
        return None
    try:
        from zmoe.exchange.groups import Door, can_open_door

        if not can_open_door():
            raise InputError("MLX_MPI_LIBNAME is set: MLX would load that MPI library, not zmoe's")
        rank.come_up()
        Door(rank.exchange, is_program=True)
    except BaseException as error:
        rank.abandon(str(error))
        raise
    return rank


# ---- while it runs -----------------------------------------------------------------------


class _Watch:
    """Looks, beside the program, at what would end it: signals, and what happens to other ranks."""

    def __init__(self, prog: str, rank: Rank, quiet: bool) -> None:
        """`quiet`: the leader, which is told, says what has happened."""
        self._prog, self._rank, self._quiet = prog, rank, quiet
        self.code = 0  # of a signal that has come
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The program has ended."""
        self._over.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        while not self._over.is_set():
            if select.select([self._ends[0]], [], [], _WATCH_S)[0]:
                for number in os.read(self._ends[0], 4096):
                    if number in (signal.SIGINT, signal.SIGTERM):
                        self._end_by_signal(number)
                        return
            try:
                self._rank.watch()
            except Exception as error:
                self._end(_words(error), getattr(error, "exit_code", 1))

    def _end_by_signal(self, number: int) -> None:
        """Collectives that wait return, so that Python can raise what it has for the signal."""
        self.code = 128 + number
        self._rank.exchange.cancel()
        if not self._over.wait(_SIGNAL_S):
            self._end("", self.code)

    def _end(self, words: str, code: int) -> NoReturn:
        """End this process at once: what the program would compute from here on is void."""
        with suppress(OSError):
            if words and not self._quiet:
                print(f"{self._prog}: {' '.join(words.split())}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self._rank.abandon(words)
        os._exit(code)


def _words(error: Exception) -> str:
    """One line for the user of a program, who knows of no layers and steps."""
    if isinstance(error, PeerError):
        return f"rank {error.rank} {error.reason}"
    if isinstance(error, ZmoeError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    prog = PROG if options.rank is None else f"{PROG}[{options.rank}]"
    joined: list[tuple[_Program, Rank | None]] = []

    def join() -> None:
        program = _Program(options)
        joined.append((program, _join(options, program)))

    failed = run_command(prog, options.debug, join)
    if failed:
        return failed
    ((program, rank),) = joined
    if rank is None:
        return program.run()
    if rank.exchange.rank > 0 and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # the first node passes lines on
    watch = _Watch(prog, rank, options.tied)
    code = program.run()
    watch.stop()
    code = watch.code or code
    failed = run_command(prog, options.debug, partial(_finish, rank, code, options.tied))
    rank.exchange.close()
    return code or failed


def _finish(rank: Rank, code: int, quiet: bool) -> None:
    try:
        rank.finish(code)
    except ZmoeError as error:
        if quiet:
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    sys.exit(main())
