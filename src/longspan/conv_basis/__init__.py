"""Conv-Basis attention: scores as few Toeplitz matrices, and the Toeplitz engine on its own."""

from .api import (
    conv_basis_apply,
    conv_basis_attention,
    conv_basis_attention_varlen,
    conv_basis_attention_with_lse,
    conv_basis_check,
    conv_basis_recover,
)
from .basis import ConvBasis, ConvBasisStats
from .config import ConvBasisConfig
from .toeplitz import toeplitz_attention, toeplitz_attention_with_lse

__all__ = [
    "ConvBasis",
    "ConvBasisConfig",
    "ConvBasisStats",
    "conv_basis_apply",
    "conv_basis_attention",
    "conv_basis_attention_varlen",
    "conv_basis_attention_with_lse",
    "conv_basis_check",
    "conv_basis_recover",
    "toeplitz_attention",
    "toeplitz_attention_with_lse",
]
