"""l2_sp: from tensors to the table of addresses that csrc's l2_sp walks over, on CPU and CUDA.

The functions and their arguments are the reference's (backends/reference/l2_sp.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.dense import matched, places_of, put_back
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import on_cpu, run, threads_for

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["l2_sp", "l2_sp_accumulate", "l2_sp_backward"]

_HUGE_PAGE = 2 << 20


def _run(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor | None] | None,
    weight: float,
    *,
    add: bool = False,
    grad_value: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """One pass over tensors of one dtype, which match element by element in memory."""
    dtype, device = parameters[0].dtype, parameters[0].device
    sizes = [x.numel() for x in parameters]
    addresses = [[x.data_ptr() for x in parameters], [x.data_ptr() for x in anchors]]
    if grads is not None:
        addresses.append([0 if x is None else x.data_ptr() for x in grads])
    table = torch.tensor([sizes, *addresses], dtype=torch.int64)
    names = ("sizes", "parameters", "anchors", "grads")
    arrays = {name: row.data_ptr() for name, row in zip(names, table, strict=False)}
    if grad_value is not None:
        arrays["grad_value"] = grad_value.data_ptr()
    if value is not None:
        arrays["value"] = value.data_ptr()
    threads = threads_for(sum(sizes))
    run(_native.l2_sp(DTYPES[dtype], len(sizes), weight, add, threads, arrays), device)


def l2_sp(parameters: Sequence[Tensor], anchors: Sequence[Tensor], weight: float) -> Tensor:
    """The value, from one read of all tensors."""
    value = torch.empty((), dtype=torch.float32, device=parameters[0].device)
    left, right = matched(parameters, anchors)
    _run(left, right, None, weight, value=value)
    return value


def _advise(room: Tensor) -> None:
    """Huge pages for what is about to be written for the first time."""
    if on_cpu(room) and room.nbytes >= _HUGE_PAGE:
        _native.advise_huge_pages(room.data_ptr(), room.nbytes)


def l2_sp_backward(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grad_value: Tensor,  # []
    weight: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of those that need one, from one read of their tensors."""
    chosen = [i for i, need in enumerate(needed) if need]
    results = [parameters[0].new_empty(0) for _ in needed]
    if chosen:
        left, right = matched([parameters[i] for i in chosen], [anchors[i] for i in chosen])
        grads = [torch.empty_like(x) for x in left]
        for grad in grads:
            _advise(grad)
        _run(left, right, grads, weight, grad_value=grad_value.contiguous())
        for i, grad in zip(chosen, grads, strict=True):
            results[i] = grad
    return results


def l2_sp_accumulate(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    weight: float,
    add: bool,
) -> Tensor:
    """The value, and the gradients written or added to, in the same pass."""
    value = torch.empty((), dtype=torch.float32, device=parameters[0].device)
    if not add:
        for grad in grads:
            if grad is not None:
                _advise(grad)
    left, right = matched(parameters, anchors)
    places = places_of(grads, left, add)
    _run(left, right, places, weight, add=add, value=value)
    put_back(grads, places)
    return value
