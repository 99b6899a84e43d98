"""What decides how a node rounds, so that nodes can be compared before they run.

All nodes route from their own activations. Where these differ in the last bit, two
nodes sooner or later pick different experts, and the run ends in the middle of a
text. Only the C kernels promise equal bits on all CPUs; MLX promises them on equal
devices with equal versions.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from zmoe.config import EngineConfig
from zmoe.kernels.threads import is_native


@dataclass(frozen=True)
class Arithmetic:
    """compute: "native" or "mlx", whose matmuls are run.
    device: what MLX runs on, such as "cpu x86_64" or "metal applegpu_g15s".
    mlx, mlx_lm: versions.
    probe: hex digest of a few results of MLX's on this device.
    """

    compute: str
    device: str
    mlx: str
    mlx_lm: str
    probe: str


def arithmetic_of(config: EngineConfig) -> Arithmetic:
    """That of this process. Takes some milliseconds."""
    compute = "native" if is_native(config) else "mlx"
    return Arithmetic(compute, _device(), version("mlx"), version("mlx-lm"), _probe())


def _device() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return f"cpu {platform.machine()}"
    kind = "metal" if mx.metal.is_available() else "cuda"
    return f"{kind} {mx.device_info(mx.gpu).get('architecture', 'unknown')}"


def _probe() -> str:
    """Digest of what a model's layers do, on fixed numbers: it finds other libraries'
    exponentials, contracted multiply-adds, and sums in another order.
    """
    digest = hashlib.sha256()
    random = np.random.default_rng(0)
    x32 = mx.array(random.standard_normal((4, 256), np.float32))
    w32 = mx.array(random.standard_normal((256, 256), np.float32))
    quantized = mx.quantize(w32, group_size=64, bits=4)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        x, w = x32.astype(dtype), w32.astype(dtype)
        y = x @ w.T
        heads = y.reshape(1, 4, 4, 64).transpose(0, 2, 1, 3)
        results = [
            y,
            x[:1] @ w.T,
            mx.dequantize(*quantized, group_size=64, bits=4).astype(dtype) * x[0],
            mx.quantized_matmul(x32, *quantized, group_size=64, bits=4),
            mx.fast.rms_norm(x, w[0], 1e-5),
            mx.fast.layer_norm(x, w[0], w[1], 1e-5),
            mx.fast.rope(heads, 64, traditional=False, base=10000.0, scale=1.0, offset=7),
            mx.fast.scaled_dot_product_attention(heads, heads, heads, scale=0.125),
            mx.softmax(x, axis=-1, precise=True),
            *(f(x) for f in (mx.exp, mx.sigmoid, mx.tanh, mx.erf, mx.sin, mx.cos)),
            mx.log1p(mx.abs(x)),
        ]
        for result in results:
            digest.update(np.array(result.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]
