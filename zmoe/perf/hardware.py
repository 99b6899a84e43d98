"""A node's hardware as the equations take it: memory, bandwidth, rates and price."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zmoe.perf.measured import MatmulRate, StepRate

GIB = 2**30

# Share of the bandwidth that decoding reaches: 68% for llama.cpp on one core of
# an EPYC, against the core's read bandwidth (docs/performance-model.md). An
# estimate elsewhere.
EFFICIENCY = 0.7
# One host synchronisation with Metal, or one crossing from its graph to the CPU and back:
# reported as 180 us on an M3 Ultra (ml-explore/mlx issue 4438).
METAL_SYNC_S = METAL_CROSSING_S = 180e-6
FAST_CROSSING_S = 20e-6  # with MLX_METAL_FAST_SYNCH=1: 15 to 20 us are reported
CUDA_SYNC_S = 20e-6  # estimate, of a crossing, too
CPU_SYNC_S = 50e-6  # one mx.eval of MLX on CPU, measured on an EPYC
LAYER_S = 50e-6  # estimate: some 25 operations of 2 us each (MLX on CPU, measured)
# What mlx-lm's decoding takes for a MoE layer beside reading weights: some 30 small kernels, each
# begun when the one before has ended. As cycles of the GPU, since generations differ by their
# clocks. Derived from rows of one machine (docs/performance-model.md).
METAL_LAYER_CYCLES = 160e3


@dataclass(frozen=True)
class Device:
    """What computes the layers of a run, of which nothing is known but its kind; see Machine."""

    sync_s: float
    crossing_s: float | None
    layer_s: float


KERNELS = Device(0.0, None, 60e-6)  # zmoe's own; measured (zmoe-run --stats)
METAL = Device(METAL_SYNC_S, METAL_CROSSING_S, METAL_LAYER_CYCLES / 1.6e9)  # 1.4 to 1.8 GHz
CUDA = Device(CUDA_SYNC_S, CUDA_SYNC_S, LAYER_S)
CPU = Device(CPU_SYNC_S, 0.0, LAYER_S)  # MLX's, which exchanges where it computes


@dataclass(frozen=True)
class Machine:
    """One node's hardware.

    memory_bytes: all of it; `usable_share` of it may hold weights and cache.
    bandwidth: bytes/s of reading memory; decode reaches `bandwidth_efficiency` of it.
    rate: operations/s of dense 16 bit matmuls; they reach `rate_efficiency` of it.
    overlap: share of a matmul's loading that hides its computing. 1: a matmul
        takes the longer of both; 0: the sum, as in the paper's model.
    sync_s: one wait of the host for the accelerator (mx.eval).
    crossing_s: one exchange's way from MLX's graph to the CPU and back, without the exchange;
        None where zmoe does not compute in MLX's graph.
    layer_s: building and launching one layer. step_s: the same of a step apart from its layers.
    wiring: bytes/s at which the driver of Metal wires weights that went cold;
        None where they stay wired (mx.set_wired_limit) and wherever no driver does.
    price_usd: None where unknown.
    supported: zmoe runs on it as modelled here.
    cores: what its nodes can share out among them; None: one device, which all would use.
    rates, steps: what calibration measured; matmuls of a format in `rates` go by these,
        and not by bandwidth and rate.
    source: where the figures come from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    rate: float
    source: str
    usable_share: float = 0.9
    bandwidth_efficiency: float = EFFICIENCY
    rate_efficiency: float = EFFICIENCY
    overlap: float = 1.0
    sync_s: float = METAL_SYNC_S
    crossing_s: float | None = None
    layer_s: float = LAYER_S
    wiring: float | None = None
    price_usd: float | None = None
    supported: bool = True
    step_s: float = 0.0
    cores: int | None = None
    rates: tuple[MatmulRate, ...] = ()
    steps: tuple[StepRate, ...] = ()

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * self.usable_share

    @property
    def reached_bandwidth(self) -> float:
        return self.bandwidth * self.bandwidth_efficiency

    @property
    def reached_rate(self) -> float:
        return self.rate * self.rate_efficiency

    def divided(self, nodes: int) -> Machine:
        """What each of `nodes` processes has of this machine when they share it evenly.

        How `rates` and `steps` share it was measured.
        """
        price = self.price_usd
        return replace(
            self,
            memory_bytes=self.memory_bytes // nodes,
            bandwidth=self.bandwidth / nodes,
            rate=self.rate / nodes,
            price_usd=None if price is None else price / nodes,
        )
