"""What a node says that it brings."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmoe.cluster import resources
from zmoe.cluster.resources import machine_id, machine_memory, read_speed, resources_of
from zmoe.config import EngineConfig

PHYSICAL = 64 << 30


@given(st.floats(1, 2000), st.floats(0.98, 1.02))
def test_like_machines_are_equal(speed: float, noise: float) -> None:
    """Rounded to steps of a tenth; the fastest pass counts, since noise only slows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "_speeds", lambda _: [speed * 0.5, speed, speed * 0.9])
        rounded = read_speed(EngineConfig())
        assert abs(rounded - speed) <= 0.05 * speed + 0.5
        patch.setattr(resources, "_speeds", lambda _: [speed * noise])
        assert abs(read_speed(EngineConfig()) - rounded) <= 0.1 * speed + 1


@pytest.mark.parametrize("compute", ["native", "mlx"])
def test_a_measurement(compute: str) -> None:
    offer = resources_of(EngineConfig(compute=compute), 1 << 30)
    assert offer.speed >= 1 and offer.limit == 1 << 30
    assert offer.machine == machine_id() == resources_of(EngineConfig(), None, False).machine
    assert resources_of(EngineConfig(), None, measure=False).speed == 0


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB whose files under /proc and /sys are in a folder."""
    (tmp_path / "meminfo").write_text("MemTotal:  1 kB\nMemAvailable:   31457280 kB\n")
    monkeypatch.setattr(resources, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "memory_limit", lambda: None)
    monkeypatch.setattr(mx, "device_info", lambda: {})
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": PHYSICAL >> 12}.get)
    return tmp_path


def test_memory(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_memory(mapped=True) == PHYSICAL
    assert machine_memory(mapped=False) == 30 << 30
    monkeypatch.setattr(resources, "memory_limit", lambda: 8 << 30)
    assert machine_memory(mapped=True) == machine_memory(mapped=False) == 8 << 30
    (system / "meminfo").unlink()
    assert machine_memory(mapped=False) == 8 << 30
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 5})
    assert machine_memory(mapped=True) == 5
