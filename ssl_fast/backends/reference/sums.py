"""Sums in an order that no number of threads changes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ordered_sum", "row_squares"]

# torch cuts a sum that stands alone into as many pieces as there are threads, from this many
# elements on; of sums side by side, each has one thread.
_CUT = 32768


def ordered_sum(
    values: Tensor,  # [B, N]
) -> Tensor:
    """``values.sum(1)`` in float64, [B]."""
    block = 1024
    while values.shape[1] > block:
        whole = values.shape[1] // block * block
        sums = values[:, :whole].reshape(len(values), -1, block).sum(2, dtype=torch.float64)
        rest = values[:, whole:].sum(1, keepdim=True, dtype=torch.float64)
        values = torch.cat([sums, rest], dim=1)
    return values.sum(1, dtype=torch.float64)


def row_squares(
    values: Tensor,  # [..., D]
) -> Tensor:
    """``values.double().square().sum(-1)``, [...]."""
    if values.shape[-1] < _CUT:
        if values.dtype is torch.float64:
            return values.square().sum(-1)
        # half of the time of a float64 copy; the root costs a float64 rounding
        norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
        return norms.square_()
    rows = values.double().square_().reshape(-1, values.shape[-1])
    return ordered_sum(rows).view(values.shape[:-1])
