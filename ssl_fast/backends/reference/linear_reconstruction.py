"""linear_reconstruction in plain torch: the definition.

Differentiable torch without in-place writes, in chunks of rows, as reference/pair_softmax.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype, chunks
from ssl_fast.backends.reference.pointwise import pointwise

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_probabilities", "linear_reconstruction", "made"]


def check_probabilities(target: Tensor, mask: Tensor | None, scale: float, shift: float) -> None:
    """ValueError where a target that counts is not in [0, 1]; on a GPU nobody looks."""
    if target.device.type != "cpu":
        return
    values = target if target.is_floating_point() else target.float()
    outside = (values * scale + shift < 0) | (values * scale + shift > 1)
    if mask is not None:
        outside = outside & (mask if mask.dim() == 2 else mask[:, None])
    if bool(outside.any()):
        raise ValueError("target must be between 0 and 1 for bce; got numbers outside")


def _of_chunk(
    target: Tensor,  # [n, D]
    weight: Tensor | None,  # [n] or [n, D]
    mask: Tensor | None,  # [n] or [n, D]
    pos_weight: Tensor | None,  # [D]
    kind: str,
    parameter: float,
) -> Callable[..., Tensor]:
    """The losses [n, D] of a chunk's rows, as a function of input, weight and bias."""
    formula = "bce_with_logits" if kind == "bce" else kind

    def losses(rows: Tensor, linear_weight: Tensor, bias: Tensor | None) -> Tensor:
        goal, kept = target, None
        if mask is not None:
            kept = mask if mask.dim() == 2 else mask[:, None]
            # A row that counts nowhere may hold NaN: 0 times it would be NaN.
            rows = torch.where(kept.any(dim=1, keepdim=True), rows, 0.0)
            goal = torch.where(kept, goal, 0.0)
        outputs = rows @ linear_weight.T
        if bias is not None:
            outputs = outputs + bias
        if kept is not None:
            outputs = torch.where(kept, outputs, 0.0)
        found = pointwise(formula, outputs, goal, parameter=parameter, pos_weight=pos_weight)
        if weight is not None:
            found = found * (weight if weight.dim() == 2 else weight[:, None])
        return found if kept is None else torch.where(kept, found, 0.0)

    return losses


def made(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    kind: str,
    parameter: float,
    target_scale: float,
    target_shift: float,
    elements: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``linear_reconstruction`` without the look at bce's targets."""
    wide = accumulation_dtype(input)
    rows, columns = input.to(wide), linear_weight.to(wide)
    bias = None if linear_bias is None else linear_bias.to(wide)
    goal = target.to(wide)
    if (target_scale, target_shift) != (1.0, 0.0):
        goal = goal * target_scale + target_shift
    needed = need_input or need_weight or need_bias
    found = [goal[:0]]
    sums = [rows.new_zeros((), dtype=torch.float64)]
    grad_input, grad_weight = [rows[:0]], torch.zeros_like(columns)
    grad_bias = columns.new_zeros(columns.shape[0])
    for start, stop in chunks(rows.shape[0], columns.shape[0], rows.element_size()):
        losses = _of_chunk(
            goal[start:stop],
            None if weight is None else weight[start:stop],
            None if mask is None else mask[start:stop],
            None if pos_weight is None else pos_weight.to(wide),
            kind,
            parameter,
        )
        own = rows[start:stop]
        if needed:
            at = bias if bias is not None else torch.zeros_like(grad_bias)
            results, pullback, *_ = torch.func.vjp(losses, own, columns, at)
            by_input, by_weight, by_bias = pullback(torch.ones_like(results))
            grad_input.append(by_input)
            grad_weight, grad_bias = grad_weight + by_weight, grad_bias + by_bias
        else:
            results = losses(own, columns, bias)
        if elements:
            found.append(results)
        else:
            sums.append(results.sum(dtype=torch.float64))
    loss = torch.cat(found) if elements else torch.stack(sums).sum().to(wide)
    return (
        loss,
        torch.cat(grad_input) if need_input else rows.new_empty(0),
        grad_weight if need_weight else rows.new_empty(0),
        grad_bias if need_bias else rows.new_empty(0),
    )


def linear_reconstruction(
    input: Tensor,  # [N, H]
    linear_weight: Tensor,  # [D, H]
    linear_bias: Tensor | None,  # [D]
    target: Tensor,  # [N, D]
    weight: Tensor | None,  # [N] or [N, D]
    mask: Tensor | None,  # [N] or [N, D], bool
    pos_weight: Tensor | None,  # [D]
    kind: str,
    parameter: float,
    target_scale: float,
    target_shift: float,
    elements: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum of the losses where the mask is True, or each loss [N, D] (``elements``).

    Then the gradients of the sum for input [N, H], weight [D, H] and bias [D], [0] where not
    needed. All in fp32, float64 of float64.
    """
    if kind == "bce":
        check_probabilities(target, mask, target_scale, target_shift)
    return made(
        input, linear_weight, linear_bias, target, weight, mask, pos_weight, kind, parameter,
        target_scale, target_shift, elements, need_input, need_weight, need_bias,
    )  # fmt: skip
