"""The CPU forward on torch's kernel: every place of a block, and the same bits in a longer text."""

from __future__ import annotations

import pytest
import torch

from longspan import WindowConfig, window_attention_with_lse
from longspan._validation import validate
from longspan.testing import make_qkv
from longspan.window.impl import cpu
from longspan.window.impl.eager import _height

# n_q, n_k, query_offset, window, num_sinks, is_causal, heads, kv_heads, batch
CASES = [
    (700, 700, 0, 300, 4, True, 4, 2, 2),
    (700, 700, 0, 130, 0, True, 2, 2, 1),
    (500, 700, 200, 90, 7, True, 4, 1, 1),
    (500, 900, 300, 90, 150, True, 2, 2, 2),  # sinks that reach over several blocks
    (400, 900, 20, 66, 500, False, 4, 2, 1),  # sinks behind the window
    (600, 800, 0, 100, 4, False, 4, 2, 2),
    (500, 500, -100, 66, 5, True, 2, 2, 1),  # rows before the first key
    (500, 500, -100, 66, 5, False, 2, 2, 1),
    (700, 500, 0, 66, 5, True, 4, 2, 1),  # rows behind the last key
    (700, 500, 0, 66, 5, False, 4, 2, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_kernel_blocks_equal_reference(case, transposed, nan_scratch, monkeypatch):
    n_q, n_k, offset, window, sinks, is_causal, heads, kv_heads, batch = case
    monkeypatch.setattr(cpu, "_ELEMENTS_AT_ONCE", heads * 64 * 16 * 3)  # several calls
    q, k, v = make_qkv(batch, heads, n_q, 16, n_k=n_k, kv_heads=kv_heads, dtype=torch.float64,
                       transposed=transposed)  # fmt: skip
    config = WindowConfig(window=window, num_sinks=sinks)
    common = {"is_causal": is_causal, "query_offset": offset, "enable_gqa": True}
    call = validate("window_attention", q, k, v, **common)
    assert cpu.kernel_blocks(call, config, _height(config))
    got, want = (window_attention_with_lse(q, k, v, config=config, impl=impl, **common)
                 for impl in ("eager", "reference"))  # fmt: skip
    torch.testing.assert_close(got.output, want.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_a_longer_text(dtype):
    q, k, v = make_qkv(1, 4, 900, 16, kv_heads=2, dtype=dtype)
    config = WindowConfig(window=128, num_sinks=4)

    def run(length):
        return window_attention_with_lse(*(t[:, :, :length] for t in (q, k, v)), is_causal=True,
                                         enable_gqa=True, config=config, impl="eager")  # fmt: skip

    whole = run(900)
    for length in (70, 150, 333, 640):
        part = run(length)
        assert torch.equal(part.output, whole.output[:, :, :length])
        assert torch.equal(part.lse, whole.lse[:, :, :length])


def test_few_operations_for_many_blocks():
    """The time of short blocks is the time of their calls: those far from the start share one."""
    q, k, v = make_qkv(1, 2, 4096, 16)
    config = WindowConfig(window=128, num_sinks=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        window_attention_with_lse(q, k, v, is_causal=True, config=config, impl="eager")
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    calls = sum(event.count for event in profile.key_averages() if event.key == name)
    assert 0 < calls <= 5  # three blocks at the start, then windows and sinks
