"""Every production kernel compiles for GPUs that are not there, without spills."""

from __future__ import annotations

import json

import pytest

from longspan._triton import resources
from longspan.mechanisms import MECHANISMS

pytest.importorskip("triton")
WITH_KERNELS = [m.name for m in MECHANISMS.values() if m.has_triton]


@pytest.mark.parametrize("capability", resources.CAPABILITIES)
@pytest.mark.parametrize("mechanism", WITH_KERNELS)
def test_kernels_compile_without_spills(mechanism, capability):
    assert resources.check([mechanism], [capability]) == []


def test_table_covers_every_mechanism():
    rows = json.loads(resources.TABLE.read_text())["rows"]
    assert {name.split("/")[1] for name in rows} == set(WITH_KERNELS)
    for name, row in rows.items():
        known = {
            "stick_breaking": {"dkv": 448, "forward": 8},
            "infini": {"mix_bwd": 400, "sums_bwd": 40},
            "hyper": {"leaf_key": 192, "chunks tree 512": 392},
            "window": {"fwd_tma": 32, "key_bwd_tma": 24},
        }
        allowed = known.get(name.split("/")[1], {}).get(name.split("/")[2], 0)
        assert row["spill_bytes"] <= allowed, name


def test_shared_memory_fits_the_device():
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes a block may have
    for name, row in json.loads(resources.TABLE.read_text())["rows"].items():
        assert row["shared_bytes"] <= limits[name.split("/")[0]], name


def test_names_are_unique():
    for mechanism in WITH_KERNELS:
        for capability in resources.CAPABILITIES:
            names = [case.name for case in resources.collect(mechanism, capability)]
            assert len(names) == len(set(names))
            assert all(name.startswith(f"{mechanism}/") for name in names)


def test_faults_are_reported(monkeypatch, tmp_path, capsys):
    table = tmp_path / "resources.json"
    fine = {"registers": 9, "spill_bytes": 0, "shared_bytes": 1}
    compiled = {"sm_80/window/a": fine, "sm_80/window/b": {**fine, "spill_bytes": 16}}
    monkeypatch.setattr(resources, "TABLE", table)
    monkeypatch.setattr(resources, "compile_all", lambda *_: iter(compiled.items()))
    assert resources.main(["--write"]) == 1
    assert resources.main(["--check"]) == 1
    assert "sm_80/window/b: spills 16 bytes a thread" in capsys.readouterr().out
    compiled["sm_80/window/b"] = {**fine, "registers": 10}
    assert "now {'registers': 10" in resources.check()[0]
    del compiled["sm_80/window/b"]
    assert resources.check() == ["sm_80/window/b: in resources.json but no longer compiled; "
                                 "run --write"]  # fmt: skip
    compiled["sm_80/window/c"] = fine
    assert any("c: not in resources.json" in fault for fault in resources.check())
    stored = json.loads(table.read_text())
    table.write_text(json.dumps({**stored, "triton": "another"}))
    assert resources.check() == []
