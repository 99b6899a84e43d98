"""llama.cpp in llama-bench's manner: tokens/s of a prompt in one batch, and of single tokens.

Through llama-cpp-python's bindings of the C interface, on token ids. With
`--rpc N` the layers are split over N server processes on loopback, which share
the cores out among them; this process then only sends them work. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_float, c_size_t, c_void_p, cast
from pathlib import Path
from typing import Any

from process import (
    ABSENT,
    BAD_INPUT,
    PARENT,
    PeerFailure,
    checked,
    count,
    main,
    parser,
    peak_bytes,
    report,
    tokens,
)

SERVER_SECONDS = 30.0
SEED = 1
ALL_LAYERS = 999
RPC_ADVICE = "llama-cpp-python was built without RPC: CMAKE_ARGS=-DGGML_RPC=ON pip install ..."


def bindings() -> Any:
    """The llama_cpp module, its log kept off standard error."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the last: a library of it is missing
        raise PeerFailure(f"cannot import llama_cpp: {error}", ABSENT) from None
    return llama_cpp


def about(llama: Any, rpc: int) -> dict[str, Any]:
    """Version and what the CPU backend was built for."""
    if rpc and not llama.llama_supports_rpc():
        raise PeerFailure(RPC_ADVICE, ABSENT)
    system = " ".join(llama.llama_print_system_info().decode().split())
    return {"build": f"llama-cpp-python {llama.__version__}: {system.rstrip(' |')}"}


class Context:
    """A loaded model and one sequence."""

    def __init__(self, llama: Any, path: str, threads: int, room: int, devices: list[int]) -> None:
        self._llama = llama
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, None)
        llama.llama_backend_init()
        wanted = llama.llama_model_default_params()
        wanted.n_gpu_layers = ALL_LAYERS if devices else 0
        # The structures point into these: they must live as long as the model.
        self._devices = (c_void_p * (len(devices) + 1))(*devices, None)
        self._even = (c_float * llama.llama_max_devices())(*[1.0] * len(devices))
        if devices:
            wanted.devices = cast(self._devices, c_void_p)
            wanted.tensor_split = self._even
        self._model = llama.llama_model_load_from_file(path.encode(), wanted)
        if not self._model:
            raise PeerFailure(f"llama.cpp cannot load {path}", BAD_INPUT)
        shape = llama.llama_context_default_params()
        shape.n_ctx = room
        shape.n_threads = shape.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, shape)
        if not self._context:
            raise PeerFailure(f"llama.cpp cannot make a context for {path}")
        vocabulary = llama.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama.llama_vocab_n_tokens(vocabulary)

    def clear(self) -> None:
        """Forget the sequence."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def append(self, ids: Sequence[int]) -> None:
        """Run `ids` as one batch; the logits after the last are there on return."""
        array = (self._llama.llama_token * len(ids))(*ids)
        status = self._llama.llama_decode(
            self._context, self._llama.llama_batch_get_one(array, len(ids))
        )
        self._llama.llama_synchronize(self._context)
        if status != 0:
            raise PeerFailure(f"llama_decode returned {status}")

    def close(self) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def remote_devices(endpoints: Sequence[str]) -> list[int]:
    """The devices of RPC servers, as pointers; these servers are known from here on."""
    from llama_cpp._ggml import libggml

    def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        found = libggml[name]
        found.restype, found.argtypes = result, arguments
        return found  # type: ignore[no-any-return]

    add = function("ggml_backend_rpc_add_server", c_void_p, c_char_p)
    device = function("ggml_backend_reg_dev_get", c_void_p, c_void_p, c_size_t)
    registries = [add(endpoint.encode()) for endpoint in endpoints]
    if not all(registries):
        raise PeerFailure("llama.cpp cannot reach its RPC servers")
    return [device(registry, 0) for registry in registries]


def free_ports(wanted: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(wanted)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def shares(cores: Sequence[int], parts: int) -> list[list[int]]:
    """`cores` dealt to `parts`; with fewer cores than parts, several share one."""
    if parts == 0 or parts >= len(cores):
        return [[cores[part % len(cores)]] for part in range(parts)]
    size = len(cores) // parts
    return [list(cores[part * size : (part + 1) * size]) for part in range(parts)]


@contextmanager
def servers(wanted: int, cores: Sequence[int]) -> Iterator[list[str]]:
    """`wanted` RPC servers on loopback that have begun to listen; their endpoints."""
    program = str(Path(__file__).with_name("llamacpp_rpc.py"))
    ports = free_ports(wanted)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for port, share in zip(ports, shares(cores, wanted)):
            command = [sys.executable, program, str(port), ",".join(map(str, share))]
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, PARENT: str(os.getpid())},
                )
            )
        until = time.monotonic() + SERVER_SECONDS
        for server, port in zip(running, ports):
            _await(server, port, until)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for server in running:
            server.kill()
        for server in running:
            server.wait()


def _await(server: subprocess.Popen[bytes], port: int, until: float) -> None:
    while time.monotonic() < until:
        if server.poll() is not None:
            raise PeerFailure(f"an RPC server ended with status {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise PeerFailure(f"an RPC server was not up within {SERVER_SECONDS:g} s")


def measure(options: argparse.Namespace, context: Context) -> dict[str, Any]:
    """Tokens/s over the repetitions, after one that isn't counted."""
    prompt = tokens(SEED, options.prompt_tokens, context.vocabulary)
    before = tokens(SEED + 1, options.depth, context.vocabulary)
    steps = tokens(SEED + 2, options.tokens, context.vocabulary)
    prompt_s, decode_s = [], []
    for _ in range(options.repetitions + (not options.no_warm_up)):
        context.clear()
        begun = time.perf_counter()
        context.append(prompt)
        prompt_s.append(time.perf_counter() - begun)
        context.clear()
        if before:
            context.append(before)
        begun = time.perf_counter()
        for step in steps:
            context.append([step])
        decode_s.append(time.perf_counter() - begun)
    counted = slice(-options.repetitions, None)
    return report(len(prompt), prompt_s[counted], len(steps), decode_s[counted])


def program() -> dict[str, Any]:
    made = parser((__doc__ or "").splitlines()[0], 128, 64, 5)
    made.add_argument("-d", "--depth", type=count, default=0, help="tokens before the decoded ones")
    made.add_argument("--threads", type=count, default=0, help="default: one for each core")
    made.add_argument("--rpc", type=count, default=0, help="servers to split the layers over")
    options = checked(made)
    llama = bindings()
    build = about(llama, options.rpc)
    if options.about:
        return build
    if not Path(options.model).is_file():
        raise PeerFailure(f"no file {options.model}", BAD_INPUT)
    cores = options.cores or list(range(os.cpu_count() or 1))
    threads = options.threads or len(cores)
    room = max(options.prompt_tokens, options.depth + options.tokens)
    with servers(options.rpc, cores) as endpoints:
        context = Context(llama, options.model, threads, room, remote_devices(endpoints))
        measured = measure(options, context)
        context.close()
    memory = [peak_bytes()]
    if options.rpc:
        memory.append(peak_bytes(resource.RUSAGE_CHILDREN))
    return {**measured, **build, "threads": threads, "peak_memory": memory}


if __name__ == "__main__":
    main(program)
