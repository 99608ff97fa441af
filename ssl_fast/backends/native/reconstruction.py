"""reconstruction: from tensors to the pointers of csrc's reconstruction, on CPU and CUDA.

The functions and their arguments are the reference's (backends/reference/reconstruction.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import check, gradient, on_cpu, run, threads_for
from ssl_fast.backends.reference.pointwise import KINDS

__all__ = ["reconstruction", "reconstruction_"]

# uint8 targets are bytes to the kernel.
_TARGETS = {**DTYPES, torch.uint8: 3}


def _run(
    input: Tensor,
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
    count, device = input.numel(), input.device
    host = on_cpu(input)
    if not host and target.dtype not in (input.dtype, torch.uint8):
        # CUDA kernels are compiled for bytes, the input's dtype and fp32.
        target = target.float()
    # Contiguous copies must outlive the call: they are held by these names.
    held = {"input": input, "target": target.resolve_neg().contiguous()}
    if weight is not None:
        check("weight", weight, tuple(input.shape), torch.float32, device)
        held["weight"] = weight.contiguous()
    if mask is not None:
        check("mask", mask, tuple(input.shape[: mask.dim()]), torch.bool, device)
        held["mask"] = mask.contiguous()
    if pos_weight is not None:
        shape = tuple(input.shape[input.dim() - pos_weight.dim() :])
        check("pos_weight", pos_weight, shape, torch.float32, device)
        held["pos_weight"] = pos_weight.contiguous()
    result = torch.empty(() if reduce else input.shape, dtype=torch.float32, device=device)
    held["value" if reduce else "losses"] = result
    if grad is not None:
        held["grad"] = grad
    if host:
        held["outside"] = torch.empty((), dtype=torch.int64)
    run(
        _native.reconstruction(
            kind,
            DTYPES[input.dtype],
            _TARGETS[target.dtype],
            count,
            (target_scale, target_shift),
            parameter,
            1 if mask is None else max(1, count // max(1, mask.numel())),
            1 if pos_weight is None else pos_weight.numel(),
            (factor, grad_factor),
            threads_for(count),
            {name: value.data_ptr() for name, value in held.items()},
        ),
        device,
    )
    if host and KINDS[kind] == "bce" and (number := int(held["outside"])):
        raise ValueError(
            f"input and target must be between 0 and 1 for kind 'bce'; {number} of {count} "
            "elements are not in either"
        )
    return result


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
    check("target", target, tuple(input.shape), target.dtype, input.device)
    dense = input.resolve_neg().contiguous()
    grad = gradient(dense, need_grad)
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
    check("target", target, tuple(input.shape), target.dtype, input.device)
    return _run(
        input, target, weight, mask, pos_weight, kind,
        (parameter, target_scale, target_shift, factor, grad_factor), True, input,
    )  # fmt: skip
