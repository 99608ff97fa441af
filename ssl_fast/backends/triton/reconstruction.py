"""reconstruction on Triton: one pass, whose sums of blocks torch adds up in float64.

The functions and their arguments are the reference's (backends/reference/reconstruction.py).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import reconstruction_kernels as kernels
from ssl_fast.backends.triton.device import launching_on

__all__ = ["reconstruction", "reconstruction_"]

BLOCK = 1024


def _run(
    input: Tensor,  # contiguous
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    parameters: tuple[float, float, float, float, float],
    reduce: bool,
    grad: Tensor | None,
) -> Tensor:
    parameter, target_scale, target_shift, factor, grad_factor = parameters
    size = input.numel()
    target = target.resolve_neg().contiguous()
    factors = input if weight is None else weight.contiguous()
    span = 1 if mask is None else max(1, size // max(1, mask.numel()))
    flags = input if mask is None else mask.contiguous().view(torch.int8)
    positive = input if pos_weight is None else pos_weight.contiguous()
    programs = triton.cdiv(size, BLOCK)
    sums = torch.empty(programs if reduce else 0, dtype=torch.float32, device=input.device)
    losses = torch.empty(0 if reduce else input.shape, dtype=torch.float32, device=input.device)
    if size:
        kernels.reconstruction_kernel[(programs,)](
            input, target, factors, flags, positive, sums, losses,
            input if grad is None else grad, size, span,
            1 if pos_weight is None else pos_weight.numel(), parameter, target_scale,
            target_shift, grad_factor,
            KIND=kind, HAS_WEIGHT=weight is not None, HAS_MASK=mask is not None,
            POSITIVE=pos_weight is not None, REDUCE=reduce, HAS_GRAD=grad is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return (sums.sum(dtype=torch.float64) * factor).float() if reduce else losses


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
    """The value, or the losses, and the gradient, from one pass."""
    with launching_on(input):
        dense = input.resolve_neg().contiguous()
        grad = torch.empty_like(dense) if need_grad else dense.new_empty(0)
        result = _run(
            dense, target, weight, mask, pos_weight, kind,
            (parameter, target_scale, target_shift, factor, grad_factor), reduce,
            grad if need_grad else None,
        )  # fmt: skip
    return result, grad


def reconstruction_(
    input: Tensor,  # contiguous, overwritten with the gradient
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
    with launching_on(input):
        return _run(
            input, target, weight, mask, pos_weight, kind,
            (parameter, target_scale, target_shift, factor, grad_factor), True, input,
        )  # fmt: skip
