"""What nodes compare of their rounding."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmoe.config import EngineConfig
from zmoe.errors import InputError
from zmoe.kernels.arithmetic import arithmetic_of
from zmoe.kernels.threads import best_isa_name, check_isa


def test_a_node_is_like_itself() -> None:
    assert arithmetic_of(EngineConfig()) == arithmetic_of(EngineConfig())


@pytest.mark.parametrize("name", ["exp", "dequantize", "quantized_matmul"])
def test_the_probe_notices_a_last_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ours, original = arithmetic_of(EngineConfig()), getattr(mx, name)

    def other(*given: object, **options: object) -> mx.array:
        result: mx.array = original(*given, **options)
        return result * (1 + 2**-11) if result.dtype == mx.float32 else result

    monkeypatch.setattr(mx, name, other)
    assert arithmetic_of(EngineConfig()).probe != ours.probe


def test_only_instructions_that_this_cpu_has_are_taken() -> None:
    assert check_isa(best_isa_name()) == best_isa_name()
    with pytest.raises(InputError, match="instruction set 'SSE9' is not one that this CPU has"):
        check_isa("SSE9")
