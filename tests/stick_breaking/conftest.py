from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan._triton.launch import interpreting

torch.set_num_threads(1)

# On a CPU the kernels run only in Triton's interpreter; tests marked `gpu` call them on a device.
IMPLS = ["reference", "eager", *(["triton"] if interpreting() else [])]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gradients() -> Callable[..., list[Tensor]]:
    """Results and the gradients of a random linear function of them, for the given leaves."""

    def run(call: Callable[[], Any], leaves: tuple[Tensor, ...], seed: int = 7) -> list[Tensor]:
        results = call()
        generator = torch.Generator().manual_seed(seed)
        # leaves that no result depends on (a single token sees no key) have gradient zero
        loss = sum(0.0 * leaf.double().sum() for leaf in leaves)
        for result in results:
            upstream = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            loss = loss + (result.double() * upstream).sum()
        return [*results, *torch.autograd.grad(loss, leaves)]

    return run
