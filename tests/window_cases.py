"""Cases and comparisons shared by the tests of window attention, on the CPU and on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from longspan import WindowConfig, window_attention_with_lse
from longspan.testing import assert_within_budget, make_qkv


class Case(NamedTuple):
    n_q: int
    n_k: int
    offset: int = 0
    window: int = 9
    sinks: int = 3
    is_causal: bool = True
    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    padded: bool = False  # the second entry has 5 keys less
    transposed: bool = False
    kind: str = "normal"
    scale: float | None = None

    @property
    def id(self) -> str:
        changed = (
            f"{n}={v}" for n, v in self._asdict().items() if v != self._field_defaults.get(n)
        )
        return ",".join(changed)


# Windows and lengths on both sides of the 16-wide tiles that the interpreter runs.
CASES = [
    Case(1, 1, heads=4, kv_heads=2),
    Case(1, 1, window=1, sinks=0),
    Case(33, 33, heads=4, kv_heads=2),
    Case(50, 50, window=1, sinks=0),
    Case(50, 50, window=16, sinks=0),
    Case(50, 50, window=17, sinks=1),
    Case(70, 70, window=40, sinks=20, batch=1),
    Case(70, 70, window=33, sinks=4, batch=1, transposed=True),
    Case(48, 48, window=100),
    Case(48, 48, window=48, sinks=48),
    Case(1, 60, 59, window=20),
    Case(7, 60, 53, window=20),
    Case(20, 60, 17, window=8, sinks=30),
    Case(40, 20, -10, heads=4, kv_heads=2),
    Case(40, 20, -30, window=5, sinks=2),
    Case(10, 20, 30, window=8, sinks=0),
    Case(10, 20, 30, window=8, sinks=2),
    Case(6, 9, -6),
    Case(45, 45, heads=4, kv_heads=2, padded=True),
    Case(45, 45, window=30, sinks=0, padded=True, transposed=True),
    Case(37, 37, is_causal=False),
    Case(40, 20, -10, is_causal=False),
    Case(40, 20, -10, window=4, sinks=12, is_causal=False),
    Case(10, 20, 40, is_causal=False, sinks=0),
    Case(50, 70, 10, window=17, sinks=5, is_causal=False, padded=True),
    Case(34, 34, heads=3, kv_heads=3, dim=8, value_dim=24),
    Case(34, 34, heads=6, kv_heads=1, dim=20, value_dim=5, transposed=True),
    Case(40, 40, dim=40, value_dim=33, scale=-0.3),
    Case(40, 40, scale=0.0),
    Case(40, 40, kind="large"),
    Case(40, 40, kind="peaked"),
    Case(40, 40, kind="shifted"),
    Case(40, 40, kind="zero"),
]


class Result(NamedTuple):
    output: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def attend(case: Case, impl: str, q, k, v, low=False) -> Result:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    config = WindowConfig(window=case.window, num_sinks=case.sinks)
    common = {"is_causal": case.is_causal, "query_offset": case.offset}
    lengths = None
    if case.padded:
        lengths = torch.full((case.batch,), case.n_k, dtype=torch.int32, device=q.device)
        lengths[1:] -= 5
    if low:
        output, lse = plain(case, q, k, v, lengths)
    else:
        output, lse = window_attention_with_lse(q, k, v, enable_gqa=True, key_lengths=lengths,
                                                scale=case.scale, config=config, impl=impl,
                                                **common)  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    shape = (case.batch, case.n_q, case.heads)
    up_o = torch.randn((*shape, case.value_dim), generator=generator, dtype=torch.float64)
    up_l = torch.randn(shape, generator=generator, dtype=torch.float64)
    up_o = up_o.to(output.dtype).to(q.device).transpose(1, 2)
    up_l = up_l.to(lse.dtype).to(q.device).transpose(1, 2)
    seen = torch.isfinite(lse.detach())
    loss_grads = (up_o.to(output), torch.where(seen, up_l.to(lse), 0.0))
    grads = torch.autograd.grad((output, lse), (q, k, v), loss_grads)
    return Result(output.detach(), lse.detach(), *grads)


def plain(case: Case, q, k, v, lengths):
    """Dense window attention as one would write it in torch, in the dtype of the inputs."""
    groups = case.heads // case.kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    scores = (q @ k.transpose(-1, -2)) * scale
    p = torch.arange(case.n_q, device=q.device)[:, None] + case.offset
    j = torch.arange(case.n_k, device=q.device)
    hidden = ((p - j).abs() >= case.window) & (j >= case.sinks)
    if case.is_causal:
        hidden = hidden | (j > p)
    hidden = hidden[None, None]
    if lengths is not None:
        hidden = hidden | (j >= lengths[:, None, None, None])
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden & ~empty, float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores.float() if q.dtype is not torch.float64 else scores, -1)
    return weights @ v, lse.masked_fill(empty.squeeze(-1), float("-inf"))


def assert_matches_reference(case: Case, impl: str, dtype: torch.dtype, device="cpu") -> None:
    """Every output and gradient is within twice the error of plain torch in the same dtype."""
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, dtype=dtype,
                       device=device, kind=case.kind, transposed=case.transposed)  # fmt: skip
    got = attend(case, impl, q, k, v)
    oracle = attend(case, "reference", q.double(), k.double(), v.double())
    low = attend(case, "", q, k, v, low=True)
    for name, a, b, c in zip(Result._fields, got, oracle, low, strict=True):
        assert a.dtype == (c.dtype if name != "lse" else torch.promote_types(dtype, torch.float32))
        # dp - delta cancels terms of this size: for a single key the gradient is their rounding.
        magnitude = case.value_dim**0.5 if name in ("dq", "dk") else 1.0
        if impl == "triton" and dtype is torch.float32 and name in ("dq", "dk", "dv"):
            # The kernels recompute p = exp(s - lse) from an lse rounded to float32.
            magnitude = max(magnitude, oracle.lse.masked_fill(oracle.lse.isinf(), 0.0).abs().max())
        if dtype is torch.float64:  # the oracle itself rounds: sums of up to this many terms
            magnitude *= max(case.n_q, case.n_k) ** 0.5
        assert_within_budget(a, b, c, magnitude=magnitude, label=f"{name} of {case.id}")
