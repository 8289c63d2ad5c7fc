"""What every test gets: fixed seeds, and scratch memory in which an unwritten element shows."""

from __future__ import annotations

import pytest
import torch

_FACTORIES = ("empty", "empty_like", "empty_strided")
_METHODS = ("new_empty",)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and a CUDA device where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def nan_scratch(monkeypatch):
    """`torch.empty` and its relatives return NaN, so that what was never written is noticed."""

    def poisoned(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point() and not torch.compiler.is_compiling():
                tensor.fill_(float("nan"))
            return tensor

        return call

    for name in _FACTORIES:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in _METHODS:
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
