"""Head exchange equals one process, for every mechanism of the registry."""

from __future__ import annotations

import pytest
from context_checks import check_ulysses, check_ulysses_packed

from longspan.mechanisms import MECHANISMS

NAMES = sorted(MECHANISMS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "length", "kv_heads", "lengths"),
    [("zigzag", 37, 4, [37, 20]), ("contiguous", 24, 1, None), ("zigzag", 18, 2, None)],
)
def test_ulysses_equals_one_process(ranks, name, kind, length, kv_heads, lengths):
    ranks.run(
        check_ulysses, name=name, kind=kind, length=length, kv_heads=kv_heads, lengths=lengths
    )


@pytest.mark.parametrize("name", [name for name in NAMES if MECHANISMS[name].has_varlen])
def test_packed_documents(ranks, name):
    ranks.run(check_ulysses_packed, name=name, kind="zigzag", marks=[0, 5, 5, 18, 19, 33])
