"""linear_reconstruction on the CPU: from tensors to csrc/cpu/linear_reconstruction.cpp.

The function and its arguments are the reference's (backends/reference/linear_reconstruction.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import address, check, gradient, rows_of, run, threads_for
from ssl_fast.backends.reference.pointwise import KINDS

__all__ = ["linear_reconstruction"]

_ELEMENTS = {**DTYPES, torch.uint8: 3}


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
    """Loss and gradients, three products in one pass."""
    (n, h), d = input.shape, linear_weight.shape[0]
    check("input", input, (n, h), input.dtype)
    check("linear_weight", linear_weight, (d, h), input.dtype)
    check("target", target, (n, d), target.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    input, linear_weight, target = rows_of(input), rows_of(linear_weight), rows_of(target)
    held: dict[str, Tensor] = {}
    for name, vector in (("bias", linear_bias), ("pos_weight", pos_weight)):
        if vector is not None:
            held[name] = vector.to(torch.float32).contiguous()
            check(name, held[name], (d,), torch.float32)
    element_weight = element_kept = None
    if weight is not None:
        check("weight", weight, (n, d) if weight.dim() == 2 else (n,), torch.float32)
        if weight.dim() == 1:
            held["row_weight"] = weight.contiguous()
        else:
            element_weight = rows_of(weight)
    if mask is not None:
        check("mask", mask, (n, d) if mask.dim() == 2 else (n,), torch.bool)
        if mask.dim() == 2:
            element_kept = rows_of(mask)
        held["row_kept"] = (mask if mask.dim() == 1 else mask.any(dim=1)).contiguous()
    loss = torch.empty((), dtype=torch.float32)
    losses = torch.empty((n, d) if elements else (0,), dtype=torch.float32)
    outside = torch.zeros((), dtype=torch.int64)
    grad_input = gradient(input, need_input, torch.float32)
    grad_weight = gradient(linear_weight, need_weight, torch.float32)
    grad_bias = torch.empty(d if need_bias else 0, dtype=torch.float32)
    held |= {"loss": loss, "outside": outside}
    for name, written, asked in (
        ("losses", losses, elements),
        ("grad_input", grad_input, need_input),
        ("grad_weight", grad_weight, need_weight),
        ("grad_bias", grad_bias, need_bias),
    ):
        if asked:
            held[name] = written
    run(
        _native.linear_reconstruction(
            KINDS.index(kind),
            DTYPES[input.dtype],
            _ELEMENTS[target.dtype],
            n,
            h,
            d,
            address(input),
            address(linear_weight),
            address(target),
            None if element_weight is None else address(element_weight),
            None if element_kept is None else address(element_kept),
            parameter,
            target_scale,
            target_shift,
            threads_for(n * d * max(1, h // 16)),
            {name: value.data_ptr() for name, value in held.items()},
        )
    )
    if int(outside):
        raise ValueError("target must be between 0 and 1 for bce; got numbers outside")
    return losses if elements else loss, grad_input, grad_weight, grad_bias
