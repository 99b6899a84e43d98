"""zmoe-doctor as a user runs it, with two of the modes of a CPU."""

from __future__ import annotations

import json

import pytest

from zmoe.cli.doctor import command, selftest


def test_this_machine_is_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = "MLX, 2 nodes, graph over ring"
    monkeypatch.setattr(selftest, "KERNELS", {})
    broken = {"broken": ("--compute", "mlx", "--nodes", "65")}
    monkeypatch.setattr(selftest, "MLX", {ring: selftest.MLX[ring]} | broken)
    assert command.main(["--json"]) == 1
    out, errors = capsys.readouterr()
    found = {result["check"]: result for result in json.loads(out)["results"]}
    assert [name for name, result in found.items() if not result["ok"]] == ["broken"]
    assert found["broken"]["value"].startswith("zmoe-run: --nodes is 65")
    assert found[ring]["value"] == "the same 24 tokens"
    assert found["device"]["value"].startswith("cpu, ")
    assert found["exchange on this machine"]["value"].endswith(" GB/s")
    assert found["crossing"]["value"].endswith(" us the exchange")
    assert errors.splitlines()[-1] == "zmoe-doctor: failed: broken"
