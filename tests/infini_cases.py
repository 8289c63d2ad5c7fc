"""Cases of Infini-attention that the interpreter and a GPU both run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan import InfiniConfig, InfiniState, infini_attention

NAMES = ("output", "memory", "normaliser", "dq", "dk", "dv", "dmq", "dmk", "dgate", "dM", "dz")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: shapes in tokens, `state` continues a stream, `own` passes unrotated keys."""

    n: int = 20
    n_q: int | None = None
    offset: int = 0
    length: int = 8
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 8
    update: str = "linear"
    local: str = "segment"
    first: str = "local"
    lengths: tuple[int, ...] | None = None
    state: bool = False
    own: bool = False
    transposed: bool = False
    shift: float = 0.0

    @property
    def id(self) -> str:
        changed = {
            name: value for name, value in vars(self).items()
            if value != type(self).__dataclass_fields__[name].default
        }  # fmt: skip
        return "-".join(f"{name}{value}" for name, value in changed.items()) or "plain"


CASES = [
    Case(),
    Case(batch=2, heads=4, kv_heads=2, lengths=(20, 9)),
    Case(batch=2, lengths=(20, 0), first="gated"),
    Case(local="sliding", first="gated", state=True, own=True),
    Case(n_q=9, offset=7, state=True),
    Case(n=30, n_q=12, offset=-3, length=5),
    Case(n=30, n_q=5, offset=40, length=5),
    Case(n=30, length=5, heads=2, kv_heads=2, local="sliding", update="delta"),
    Case(n=22, length=5, batch=2, heads=4, kv_heads=2, lengths=(22, 8), update="delta"),
    Case(n=21, length=4, update="delta", state=True, own=True, value_dim=24, shift=-1.0),
    Case(n=80, length=37, dim=24, value_dim=40, transposed=True),
    Case(n=16, length=5, own=True, shift=-9.0),
    Case(n=18, n_q=1, offset=17, state=True),
]


def run(case: Case, impl: str, dtype: torch.dtype, storage: torch.dtype, device="cpu"):
    """Output, final memory and normaliser, and all gradients; values rounded to `storage`."""
    config = InfiniConfig(
        segment_length=case.length, update=case.update, local=case.local, first_segment=case.first
    )
    generator = torch.Generator().manual_seed(1)
    n_q = case.n if case.n_q is None else case.n_q
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*shape, dtype=dtype, round_to=storage, shift=0.0):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64) + shift
        made = made.to(round_to).to(device=device, dtype=dtype)
        if case.transposed and made.ndim == 4:
            made = made.transpose(1, 2).contiguous().transpose(1, 2)
        return made.requires_grad_()

    b, h, kv, d, dv = case.batch, case.heads, case.kv_heads, case.dim, case.value_dim
    q, k = draw(b, h, n_q, d), draw(b, kv, case.n, d)
    v = draw(b, kv, case.n, dv)
    mq, mk = draw(b, h, n_q, d, shift=case.shift), draw(b, kv, case.n, d, shift=case.shift)
    gate = draw(h, dtype=wide, round_to=torch.float32)
    memory = draw(b, kv, d, dv, dtype=wide, round_to=torch.float32)
    z = draw(b, kv, d, dtype=wide, round_to=torch.float32)
    up = draw(b, h, n_q, dv).detach()
    up_memory = draw(b, kv, d, dv, dtype=wide, round_to=torch.float32).detach()
    state = None
    if case.state:
        state = InfiniState.empty(config, b, kv, d, dv, dtype=dtype, device=device)
        written = torch.full((b,), 5, device=device)
        state = state._replace(memory=memory, normaliser=z.abs(), written=written, seen=case.length)
    own = {"memory_query": mq, "memory_key": mk} if case.own else {}
    lengths = case.lengths
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    result = infini_attention(
        q, k, v, gate=gate, enable_gqa=True, config=config, query_offset=case.offset,
        key_lengths=lengths, initial_state=state, impl=impl, **own,
    )  # fmt: skip
    final = result.final_state
    total = (result.output * up).sum().to(wide) + (final.memory * up_memory).sum()
    total = total + final.normaliser.sum()
    leaves = (q, k, v, mq, mk, gate, memory, z)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]  # noqa: B905
    return [result.output, final.memory, final.normaliser, *grads]


def assert_matches(case: Case, impl: str, dtype: torch.dtype, tolerance: float, device="cpu"):
    """Every result within `tolerance` of float64, relative to its largest element or 1."""
    got = run(case, impl, dtype, dtype, device)
    want = run(case, "reference", torch.float64, dtype, device)
    for name, actual, oracle in zip(NAMES, got, want, strict=True):
        actual, oracle = actual.detach(), oracle.detach()
        size = max(1.0, float(oracle.abs().max()) if oracle.numel() else 0.0)
        error = float((actual.double() - oracle).abs().max()) / size if oracle.numel() else 0.0
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.1e}"
