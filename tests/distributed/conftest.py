"""Fixtures: processes that outlive a test. What they run is importable by name, hence elsewhere."""

from __future__ import annotations

import pytest
from gloo_ranks import close_all, ranks_of


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"])
def ranks(request):
    """Two processes, and four in the slow suite."""
    return ranks_of(request.param)


@pytest.fixture
def two_ranks():
    return ranks_of(2)


@pytest.fixture(scope="session", autouse=True)
def close_ranks():
    yield
    close_all()
