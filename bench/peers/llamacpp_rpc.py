"""One RPC server of llama.cpp on loopback, for llamacpp.py, with which it ends.

usage: llamacpp_rpc.py PORT CORES
"""

from __future__ import annotations

import signal
import sys
from ctypes import c_char_p, c_int, c_size_t, c_void_p

from process import cores, end_with_parent, pin

CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's would wait for the C call to return
end_with_parent()
port, mine = sys.argv[1], cores(sys.argv[2])
pin(mine)

from llama_cpp._ggml import libggml  # noqa: E402 - its threads stay where it was loaded

find, serve = libggml.ggml_backend_dev_by_type, libggml.ggml_backend_rpc_start_server
find.restype, find.argtypes = c_void_p, (c_int,)
serve.restype = None
serve.argtypes = (c_char_p, c_char_p, c_size_t, c_size_t, c_void_p)
devices = (c_void_p * 1)(find(CPU_DEVICE))
serve(f"127.0.0.1:{port}".encode(), None, len(mine), 1, devices)
sys.exit("the RPC server cannot listen")
