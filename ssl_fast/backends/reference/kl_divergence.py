"""kl_divergence in plain torch: the definition, of any shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype

__all__ = ["kl_divergence"]

# The largest number of a dtype whose exponential is finite there.
LARGEST_EXPONENT = {torch.float32: 88.72283, torch.float64: 709.78271}


def _minus_one_minus(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) - 1 and exp(x) - 1 - x, to the last digits near 0; exp stops growing, +inf stays."""
    limited = x.clamp(max=LARGEST_EXPONENT[x.dtype])
    minus_one = torch.where(x == torch.inf, x, torch.expm1(limited))
    near = torch.where(x.abs() <= 1.0, x, 0.0)
    series = torch.zeros_like(near)
    # (exp(x) - 1 - x) / x^2; the terms left out are below 1e-17 at |x| = 1.
    for power in range(17, -1, -1):
        series = series * near + 1.0 / math.factorial(power + 2)
    return minus_one, torch.where(x.abs() <= 1.0, near * near * series, minus_one - x)


def kl_divergence(mu: Tensor, logvar: Tensor, need_logvar: bool) -> tuple[Tensor, Tensor]:
    """-1/2 sum(1 + logvar - mu^2 - exp(logvar)), and its gradient for logvar, [0] if not needed.

    Both in the accumulation dtype. exp(logvar) stops at the dtype's largest number, and so does a
    sum of finite terms; +inf and NaN stay what they are.
    """
    wide = accumulation_dtype(mu)
    mu, logvar = mu.to(wide), logvar.to(wide)
    minus_one, rest = _minus_one_minus(logvar)
    # Halves: the terms are summed in float64, whose own largest number several could pass.
    terms = 0.5 * (mu * mu) + 0.5 * rest
    largest = torch.finfo(wide).max
    total = terms.sum(dtype=torch.float64)
    finite = torch.where(terms.isinf().any(), total, total.clamp(-largest, largest))
    grad = 0.5 * minus_one if need_logvar else logvar.new_empty(0)
    return finite.to(wide), grad
