"""The sum of squared errors of a linear layer through Gram matrices: two large products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssl_fast.backends.reference.pairs import accumulation_dtype, chunks
from ssl_fast.ops.registration import without_autocast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gram_sum"]


def gram_sum(
    input: Tensor,  # [N, H]
    linear_weight: Tensor,  # [D, H]
    linear_bias: Tensor | None,  # [D]
    target: Tensor,  # [N, D]
    target_scale: float = 1.0,
    target_shift: float = 0.0,
) -> Tensor:
    """``(F.linear(input, linear_weight, linear_bias) - target).square().sum()``.

    Expanded: sum of x (W^T W) x - 2 x (t W) + t^2, and the bias's terms. Only t W here, and t^T x
    in the backward, are as large as a product with the layer; the rest are H x H. Plain torch,
    differentiable to any order.
    """
    with without_autocast(input.device.type):
        wide = accumulation_dtype(input)
        rows, columns = input.to(wide), linear_weight.to(wide)
        goal = target.to(wide)
        if (target_scale, target_shift) != (1.0, 0.0):
            goal = goal * target_scale + target_shift
        along = rows @ (columns.T @ columns) - 2.0 * (goal @ columns)  # [N, H]
        total = (along * rows).sum()
        for start, stop in chunks(goal.shape[0], goal.shape[1], goal.element_size()):
            total = total + goal[start:stop].square().sum()
        if linear_bias is not None:
            bias = linear_bias.to(wide)
            total = total + 2.0 * (rows.sum(dim=0) @ (columns.T @ bias))
            total = total + bias @ (rows.shape[0] * bias - 2.0 * goal.sum(dim=0))
        return total
