"""The engines that decode.py and batch.py measure: processes, their cores and their commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common import BENCH, Absent, BenchError, ChildError, run_json

from zmoe.topology import cores as topology

ABOUT_SECONDS = 60.0
ABSENT_STATUS = 3  # as bench/peers/process.py has it
SLOW_BYTES = 2 * 10**9  # a checkpoint of more takes mlx-lm minutes a token on a CPU
SLOW_PROMPT, SLOW_TOKENS = 16, 4


@dataclass(frozen=True)
class Layout:
    """So many nodes, each on so many cores."""

    nodes: int
    each: int

    @property
    def cores(self) -> int | None:
        """Cores in use: as many as there are when the nodes want more; None where none can pin."""
        available = usable_cores()
        return None if available is None else min(len(available), self.nodes * self.each)


@dataclass(frozen=True)
class Engine:
    """One row of the report: `command` is run once a round, in `rounds` of them at most."""

    name: str
    nodes: int
    cores: int | None
    command: tuple[str, ...]
    rounds: int | None = None


def usable_cores() -> list[int] | None:
    """The cores that this process may use; None where the system can't pin."""
    return topology.usable_cores() if hasattr(os, "sched_getaffinity") else None


def layout(text: str) -> Layout:
    """An argparse type: NODES, each on a core of its own, or NODESxCORES."""
    words = text.split("x") if "x" in text else [text, "1"]
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is neither NODES nor NODESxCORES")
    wanted, available = Layout(int(words[0]), int(words[1])), usable_cores()
    if wanted.each > 1 and available is not None and wanted.nodes * wanted.each > len(available):
        raise argparse.ArgumentTypeError(f"{text} wants more than the {len(available)} cores here")
    return wanted


def script(name: str, model: str, cores: int | None, *words: str) -> tuple[str, ...]:
    """The command of a program in peers/, on the first `cores` cores that are usable."""
    available = usable_cores()
    command = [sys.executable, str(BENCH / "peers" / name), model, *words]
    if cores is not None and available is not None:
        command += ["--cores", ",".join(map(str, available[:cores]))]
    return tuple(command)


def _counts(options: argparse.Namespace) -> list[str]:
    words = ["-p", str(options.prompt_tokens), "-n", str(options.max_tokens)]
    words += ["-r", str(options.repetitions)]
    return words if options.warm_up else [*words, "--no-warm-up"]


def _context(options: argparse.Namespace) -> list[str]:
    """What stands before the prompt, for those that can hold it."""
    return ["--context", str(options.context)] if options.context else []


def _without_context(options: argparse.Namespace) -> None:
    if options.context:
        raise Absent("it is measured without --contexts only")


def zmoe(options: argparse.Namespace) -> list[Engine]:
    """Ours, one engine per layout."""
    return layouts("zmoe_cluster.py", options, [*_counts(options), *_context(options)])


def layouts(program: str, options: argparse.Namespace, words: list[str]) -> list[Engine]:
    """Our `program` in peers/, one engine per layout, with what `options` say of the run."""
    for name in ("prompt", "compute", "activations", "wire_dtype"):
        value = getattr(options, name, None)
        if value is not None:
            words = [*words, f"--{name.replace('_', '-')}={value}"]
    return [
        Engine(
            "zmoe",
            each.nodes,
            each.cores,
            script(program, options.model, each.cores, "--nodes", str(each.nodes), *words),
        )
        for each in options.nodes
    ]


def _about(engine: Engine) -> str:
    """What `engine` is built of; Absent when it isn't installed, BenchError when it fails."""
    try:
        answer = run_json([*engine.command, "--about"], ABOUT_SECONDS)
    except ChildError as error:
        if error.status == ABSENT_STATUS:
            raise Absent(error.said) from None
        raise
    return str(answer["build"])


def gguf_file(options: argparse.Namespace) -> str:
    """The model's GGUF file: the one given, or that of the same name beside the folder."""
    folder = Path(options.model).absolute()
    path: Path = options.gguf or folder.with_name(f"{folder.name}.gguf")
    if not path.is_file():
        raise Absent(f"no {path.name}: bench/peers/gguf_model.py makes it, of some families")
    return str(path)


def core_counts(options: argparse.Namespace) -> list[int | None]:
    """How many cores our layouts take, without repetition."""
    return sorted({each.cores for each in options.nodes}, key=lambda cores: cores or 0)


def _llama(options: argparse.Namespace) -> list[Engine]:
    """One process on as many cores as our layouts take."""
    model, words = gguf_file(options), [*_counts(options), *_context(options)]
    return [
        Engine("llama.cpp", 1, cores, script("llamacpp_bench.py", model, cores, *words))
        for cores in core_counts(options)
    ]


def _llama_rpc(options: argparse.Namespace) -> list[Engine]:
    """As many servers as our layouts have nodes, where that is several."""
    _without_context(options)
    model, words = gguf_file(options), _counts(options)
    # Our tokens come after the prompt, so llama.cpp's do too.
    words += ["-d", str(options.prompt_tokens)]
    several = [each for each in options.nodes if each.nodes > 1]
    if not several:
        raise Absent("it needs at least 2 --nodes")
    return [
        Engine(
            "llama.cpp-rpc",
            each.nodes,
            each.cores,
            script("llamacpp.py", model, each.cores, *words, "--rpc", str(each.nodes)),
        )
        for each in several
    ]


def _mlx_lm(options: argparse.Namespace) -> list[Engine]:
    """One process; few tokens, and in one round only, where MLX runs on a CPU."""
    import mlx.core as mx

    _without_context(options)
    words, rounds = _counts(options), None
    if mx.default_device() == mx.Device(mx.cpu) and not options.slow:
        files = Path(options.model).glob("model*.safetensors")
        if sum(path.stat().st_size for path in files) > SLOW_BYTES:
            raise Absent("a model of this size takes it minutes a token on a CPU; --slow measures")
        prompt = min(SLOW_PROMPT, options.prompt_tokens)
        steps, rounds = min(SLOW_TOKENS, options.max_tokens), 1
        words = ["-p", str(prompt), "-n", str(steps), "-r", "1", "--no-warm-up"]
    cores = max((each.cores or 0 for each in options.nodes), default=0) or None
    return [
        Engine("mlx-lm", 1, cores, script("mlx_lm_alone.py", options.model, cores, *words), rounds)
    ]


Maker = Callable[[argparse.Namespace], list[Engine]]


@dataclass
class Peers:
    """The peers that can run here, what they are built of, and why the others can't."""

    engines: list[Engine] = field(default_factory=list)
    builds: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: bool = False

    def fail(self, name: str, error: BenchError) -> None:
        """What is installed and doesn't work is an error; the others go on."""
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        self.absent[name] = f"failed: {error}"
        self.failed = True


MAKERS: dict[str, Maker] = {
    "llama.cpp": _llama,
    "llama.cpp-rpc": _llama_rpc,
    "mlx-lm": _mlx_lm,
}


def find_peers(options: argparse.Namespace, makers: Mapping[str, Maker]) -> Peers:
    """Look for those that `makers` make."""
    found = Peers()
    for name, make in makers.items():
        try:
            engines = make(options)
            found.builds[name] = _about(engines[0])
            found.engines += engines
        except Absent as reason:
            found.absent[name] = str(reason)
        except BenchError as error:
            found.fail(name, error)
    return found
