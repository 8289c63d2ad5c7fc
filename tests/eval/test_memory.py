import os

import pytest
import torch

from longspan.eval.memory import PeakMemory

MIB = 2**20
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


def test_peak_of_memory_that_is_freed_again():
    with PeakMemory(CPU) as memory:
        block = torch.ones(64 * MIB // 4)
        block += torch.ones(64 * MIB // 4)
        del block
    assert 110 * MIB < memory.peak_bytes < 160 * MIB
    assert memory.method == "resident size sampled every 2 ms"


def test_memory_freed_before_does_not_hide_the_growth():
    small = [torch.ones(MIB // 8) for _ in range(200)]  # 512 KiB each: kept in the heap when freed
    del small
    with PeakMemory(CPU) as memory:
        again = [torch.ones(MIB // 8) for _ in range(200)]
    assert memory.peak_bytes > 90 * MIB
    assert len(again) == 200


def test_nothing_costs_little():
    with PeakMemory(CPU) as memory:
        pass
    assert 0 <= memory.peak_bytes < 8 * MIB


def test_other_devices_are_not_measured():
    with PeakMemory(torch.device("meta")) as memory:
        pass
    assert memory.peak_bytes is None
    assert memory.method == "unavailable on this system"
