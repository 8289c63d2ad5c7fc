"""Calls of the paper's recursion that its kernels must get right, and how they are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan import HyperConfig
from longspan._validation import validate
from longspan.hyper.impl.recursion import geometry_of, recursion_index
from longspan.hyper.impl.reference import recursion_reference
from longspan.hyper.impl.triton.backward import triton_backward
from longspan.hyper.impl.triton.forward import triton_forward
from longspan.hyper.index.lsh import draw_projections
from longspan.testing import make_qkv

PAPER = {"block_size": 8, "min_length": 16, "num_samples": 8}
SETTINGS = {
    "paper": HyperConfig.paper(**PAPER),
    "stratified": HyperConfig.paper(residual="stratified", center_keys=True, **PAPER),
    "value_norm": HyperConfig.paper(residual="value_norm", **PAPER),
    "kmeans": HyperConfig.paper(index="kmeans", num_projections=4, **PAPER),
    "none": HyperConfig.paper(residual="none", **PAPER),
    "odd": HyperConfig.paper(block_size=12, min_length=24, num_samples=5, num_projections=3),
    "large": HyperConfig.paper(block_size=64, min_length=256, num_samples=48),
    "official": HyperConfig.paper(),
}


@dataclass(frozen=True)
class Case:
    """One call; `settings` names the configuration."""

    n_q: int
    n_k: int
    offset: int = 0
    settings: str = "paper"
    is_causal: bool = True
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    kind: str = "normal"
    transposed: bool = False
    scale: float | None = None

    @property
    def id(self) -> str:
        causal = "causal" if self.is_causal else "full"
        return (f"{self.settings}-{causal}-{self.n_q}x{self.n_k}+{self.offset}-h{self.heads}"
                f"k{self.kv_heads}d{self.dim}v{self.value_dim}-{self.kind}")  # fmt: skip


CASES = [
    Case(64, 64),
    Case(61, 61, settings="stratified", batch=2, kv_heads=2),
    Case(50, 50, settings="none", dim=20, value_dim=5, transposed=True),
    Case(53, 53, settings="odd", heads=3, scale=-0.3),
    Case(37, 37, settings="kmeans", dim=8, value_dim=24),
    Case(37, 37, settings="value_norm", kind="peaked"),
    Case(30, 70, 40),
    Case(20, 75, 33, settings="stratified"),
    Case(60, 40, 0, settings="odd"),
    Case(40, 30, -13),
    Case(1, 40, 39),
    Case(9, 9),
    Case(8, 20, 90),
    Case(48, 48, is_causal=False),
    Case(45, 61, is_causal=False, settings="odd", heads=4, kv_heads=2, batch=2),
    Case(40, 12, is_causal=False),
    Case(33, 70, is_causal=False, settings="none"),
]


def assert_kernels_match(
    case: Case, dtype: torch.dtype, device: str = "cpu", index_impl: str = "triton"
) -> None:
    """Output, lse and gradients against the float64 definition with the same index."""
    from longspan.hyper.impl.triton.index import triton_index

    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, kind=case.kind,
                       dtype=dtype, device=device, transposed=case.transposed)  # fmt: skip
    config = SETTINGS[case.settings]
    call = validate("test", q, k, v, is_causal=case.is_causal, scale=case.scale, enable_gqa=True,
                    query_offset=case.offset)  # fmt: skip
    planes = None
    if config.index == "lsh":
        planes = draw_projections(3, case.kv_heads, case.dim, config.num_projections, q.device)
    make = triton_index if index_impl == "triton" else recursion_index
    index = make(call, config, planes, 5)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    exact = call._replace(query=wide[0], key=wide[1], value=wide[2])
    want = recursion_reference(exact, config, geometry_of(call, config), index)
    up = torch.randn(want.output.shape, generator=torch.Generator().manual_seed(7)).to(device)
    up_lse = torch.randn(want.lse.shape, generator=torch.Generator().manual_seed(8)).to(device)
    up = up.to(dtype)
    visible = want.lse.isfinite()
    total = (want.output * up.double()).sum() + (want.lse * up_lse)[visible].sum()
    grads = torch.autograd.grad(total, wide, allow_unused=True)
    up_lse = up_lse.masked_fill(~visible, 0.0)
    output, lse = triton_forward(call, config, index)
    _close(output, want.output, dtype, "output")
    _close(lse.masked_fill(~visible, 0.0), want.lse.masked_fill(~visible, 0.0), torch.float32,
           "lse")  # fmt: skip
    assert (lse[~visible] == float("-inf")).all()
    assert output.dtype == dtype
    got = triton_backward(call, config, index, up, up_lse, output, lse)
    again = triton_backward(call, config, index, up, up_lse, output, lse)
    for name, a, b, t, repeat in zip("qkv", got, grads, (q, k, v), again, strict=True):
        assert a.shape == t.shape
        assert a.is_contiguous()
        assert torch.equal(a, repeat), f"d{name} changes from run to run"
        _close(a, torch.zeros_like(wide[0]) if b is None else b, dtype, f"d{name}")


_LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def _close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Relative error in the Frobenius norm, and no element far off."""
    error, size = torch.dist(got.double(), want).item(), want.norm().item()
    limit = _LIMITS[dtype]
    assert error <= limit * size + 1e-6, f"{name}: relative error {error / max(size, 1e-30):.2e}"
    worst = (got.double() - want).abs().max().item() if want.numel() else 0.0
    assert worst <= 5 * limit * max(1.0, want.abs().max().item() if want.numel() else 0.0), name
