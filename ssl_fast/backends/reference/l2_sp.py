"""l2_sp in plain torch: the definition, tensor by tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["l2_sp", "l2_sp_accumulate", "l2_sp_backward"]


def _away(parameter: Tensor, anchor: Tensor) -> Tensor:
    wide = accumulation_dtype(parameter)
    return parameter.to(wide) - anchor.to(wide)


def l2_sp(parameters: Sequence[Tensor], anchors: Sequence[Tensor], weight: float) -> Tensor:
    """Half the sum of |parameter - anchor|^2 over all tensors, times the weight."""
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for parameter, anchor in zip(parameters, anchors, strict=True):
        total = total + _away(parameter, anchor).square().sum(dtype=torch.float64)
    return (0.5 * weight * total).to(accumulation_dtype(parameters[0]))


def l2_sp_backward(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grad_value: Tensor,  # []
    weight: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of grad_value * l2_sp, [0] for a parameter that needs none."""
    return [
        (_away(parameter, anchor) * (weight * grad_value)).to(parameter.dtype)
        if need
        else parameter.new_empty(0)
        for parameter, anchor, need in zip(parameters, anchors, needed, strict=True)
    ]


def l2_sp_accumulate(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    weight: float,
    add: bool,
) -> Tensor:
    """``l2_sp``; weight * (parameter - anchor) is added to the gradients, or written there."""
    for parameter, anchor, grad in zip(parameters, anchors, grads, strict=True):
        if grad is not None:
            step = _away(parameter, anchor) * weight
            grad.copy_(grad.to(step.dtype) + step if add else step)
    return l2_sp(parameters, anchors, weight)
