"""reconstruction in plain torch: elementwise losses, their sum and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.backends.reference.pointwise import KINDS, pointwise, slope

__all__ = ["check_range", "losses", "reconstruction", "reconstruction_", "slopes"]

# What takes the place of an element that is left out: it is legal for every kind.
_LEFT_OUT = 0.5


def _operands(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    target_scale: float,
    target_shift: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both in the wide dtype, without what is left out, and the mask with as many dimensions."""
    wide = accumulation_dtype(input)
    x, t = input.to(wide), target.to(wide)
    if target_scale != 1.0 or target_shift != 0.0:
        t = t * target_scale + target_shift
    if mask is None:
        return x, t, None
    full = mask.view(*mask.shape, *[1] * (input.dim() - mask.dim()))
    # Before the loss, since the gradient of a NaN that isn't used is NaN all the same.
    return torch.where(full, x, _LEFT_OUT), torch.where(full, t, _LEFT_OUT), full


def _weighed(values: Tensor, weight: Tensor | None, full: Tensor | None) -> Tensor:
    if weight is not None:
        values = values * weight
    return values if full is None else torch.where(full, values, 0.0)


def losses(
    input: Tensor,
    target: Tensor,  # the shape of input, as weight
    weight: Tensor | None,
    mask: Tensor | None,  # leading dimensions of input
    pos_weight: Tensor | None,  # trailing dimensions of input
    kind: str,
    parameter: float,
    target_scale: float = 1.0,
    target_shift: float = 0.0,
) -> Tensor:
    """The loss of each element, differentiable in all tensors; 0 where the mask is."""
    x, t, full = _operands(input, target, mask, target_scale, target_shift)
    found = pointwise(kind, x, t, parameter=parameter, pos_weight=pos_weight)
    return _weighed(found, weight, full)


def slopes(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    kind: str,
    parameter: float,
    target_scale: float = 1.0,
    target_shift: float = 0.0,
) -> Tensor:
    """The derivative of each loss by its input, differentiable."""
    x, t, full = _operands(input, target, mask, target_scale, target_shift)
    found = slope(kind, x, t, parameter=parameter, pos_weight=pos_weight)
    return _weighed(found, weight, full)


def check_range(
    x: Tensor,
    target: Tensor,
    mask: Tensor | None,
    target_scale: float,
    target_shift: float,
) -> None:
    """ValueError where "bce" takes no logarithm: of numbers outside [0, 1], and of NaN."""
    x, t, _ = _operands(x, target, mask, target_scale, target_shift)
    inside = (x >= 0.0) & (x <= 1.0) & (t >= 0.0) & (t <= 1.0)
    number = int((~inside).sum())
    if number:
        raise ValueError(
            f"input and target must be between 0 and 1 for kind 'bce'; {number} of {x.numel()} "
            "elements are not in either"
        )


def reconstruction(
    input: Tensor,
    target: Tensor,  # the shape of input, as weight
    weight: Tensor | None,
    mask: Tensor | None,  # leading dimensions of input
    pos_weight: Tensor | None,  # trailing dimensions of input
    kind: int,
    parameter: float,
    target_scale: float,
    target_shift: float,
    factor: float,
    grad_factor: float,
    reduce: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``factor`` times the sum of the losses, or the losses, and the gradient.

    The gradient is ``grad_factor`` times the derivative of each loss, in the input's dtype; [0]
    where it isn't needed. What the mask leaves out takes no part, whatever it holds.
    """
    name = KINDS[kind]
    arguments = (
        input, target, weight, mask, pos_weight, name, parameter, target_scale, target_shift,
    )  # fmt: skip
    if name == "bce" and input.device.type == "cpu":
        check_range(input, target, mask, target_scale, target_shift)
    found = losses(*arguments)
    if reduce:
        found = (found.sum(dtype=torch.float64) * factor).to(found.dtype)
    if not need_grad:
        return found, input.new_empty(0)
    return found, (slopes(*arguments) * grad_factor).to(input.dtype)


def reconstruction_(
    input: Tensor,  # overwritten with the gradient
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    parameter: float,
    target_scale: float,
    target_shift: float,
    factor: float,
    grad_factor: float,
) -> Tensor:
    """The value; the input becomes its gradient."""
    value, grad = reconstruction(
        input, target, weight, mask, pos_weight, kind, parameter, target_scale, target_shift,
        factor, grad_factor, True, True,
    )  # fmt: skip
    input.copy_(grad)
    return value
