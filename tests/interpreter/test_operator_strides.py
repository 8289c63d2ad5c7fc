"""What operators return on transposed inputs has the strides that their fakes promise.

torch.compile asserts them; a mismatch ends a compiled training step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_utils import CrossRefFakeMode

import longspan
from longspan import ConvBasisConfig, InfiniConfig
from longspan.mechanisms import MECHANISMS
from longspan.testing import make_qkv

CONFIGS = {
    "infini": InfiniConfig(segment_length=16),
    "conv_basis": ConvBasisConfig(num_bases=2, probe_length=2, min_length=16),
}
HOME = Path(longspan.__file__).parent
CASES = [
    (name, impl)
    for name, mechanism in MECHANISMS.items()
    for impl in ("eager", "triton")
    if any((HOME / mechanism.package / "impl").glob(f"{impl}*"))
]


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_real_strides_equal_fake_ones(name, impl):
    q, k, v = make_qkv(1, 2, 40, 16, dtype=torch.bfloat16, transposed=True, requires_grad=True)
    assert not q.is_contiguous()
    seen = []

    def ignored(op) -> bool:
        if op.namespace == "longspan":
            seen.append(op.name())
        return op.namespace != "longspan"

    with CrossRefFakeMode(ignore_op_fn=ignored, check_strides=True):
        config = CONFIGS.get(name) or MECHANISMS[name].config_class()
        out = MECHANISMS[name].function(q, k, v, is_causal=True, impl=impl, config=config)
        out = out if isinstance(out, torch.Tensor) else out[0]
        out.float().square().sum().backward()
    assert len(seen) >= 2 or impl == "eager"
