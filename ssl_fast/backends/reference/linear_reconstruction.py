"""linear_reconstruction in plain torch: the definition.

Differentiable torch without in-place writes, in chunks of rows, as reference/pair_softmax.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype, chunks
from ssl_fast.backends.reference.pointwise import pointwise, slope

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


class _Chunk(NamedTuple):
    """Losses [n, D] of a chunk's rows, what they are derived by, and the rows that count [n, H]."""

    losses: Tensor
    slopes: Tensor | None
    rows: Tensor


def _chunk(
    rows: Tensor,  # [n, H]
    linear_weight: Tensor,  # [D, H]
    linear_bias: Tensor | None,  # [D]
    goal: Tensor,  # [n, D]
    weight: Tensor | None,  # [n] or [n, D]
    mask: Tensor | None,  # [n] or [n, D]
    pos_weight: Tensor | None,  # [D]
    kind: str,
    parameter: float,
    needed: bool,
) -> _Chunk:
    formula = "bce_with_logits" if kind == "bce" else kind
    kept = None
    if mask is not None:
        kept = mask if mask.dim() == 2 else mask[:, None]
        # A row that counts nowhere may hold NaN: 0 times it would be NaN.
        rows = torch.where(kept.any(dim=1, keepdim=True), rows, 0.0)
        goal = torch.where(kept, goal, 0.0)
    outputs = rows @ linear_weight.T
    if linear_bias is not None:
        outputs = outputs + linear_bias
    if kept is not None:
        outputs = torch.where(kept, outputs, 0.0)

    def weighed(values: Tensor) -> Tensor:
        if weight is not None:
            values = values * (weight if weight.dim() == 2 else weight[:, None])
        return values if kept is None else torch.where(kept, values, 0.0)

    options: Any = {"parameter": parameter, "pos_weight": pos_weight}
    losses = weighed(pointwise(formula, outputs, goal, **options))
    return _Chunk(
        losses, weighed(slope(formula, outputs, goal, **options)) if needed else None, rows
    )


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
        chunk = _chunk(
            rows[start:stop],
            columns,
            bias,
            goal[start:stop],
            None if weight is None else weight[start:stop],
            None if mask is None else mask[start:stop],
            None if pos_weight is None else pos_weight.to(wide),
            kind,
            parameter,
            needed,
        )
        if chunk.slopes is not None:
            grad_input.append(chunk.slopes @ columns)
            grad_weight = grad_weight + chunk.slopes.T @ chunk.rows
            grad_bias = grad_bias + chunk.slopes.sum(dim=0)
        if elements:
            found.append(chunk.losses)
        else:
            sums.append(chunk.losses.sum(dtype=torch.float64))
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
