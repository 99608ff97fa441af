"""l2_sp on Triton: one launch over a table of addresses, for all tensors.

The functions and their arguments are the reference's (backends/reference/l2_sp.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_fast.backends.dense import matched, places_of, put_back
from ssl_fast.backends.triton import l2_sp_kernels as kernels
from ssl_fast.backends.triton.device import launching_on

__all__ = ["l2_sp", "l2_sp_accumulate", "l2_sp_backward"]

BLOCK = 2048


def _run(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor | None] | None,
    step: Tensor | float,
    *,
    add: bool = False,
) -> Tensor:
    """The squared distance in float64, of tensors that match element by element in memory."""
    first = parameters[0]
    device = first.device
    sizes = torch.tensor([x.numel() for x in parameters])
    table = torch.stack(
        [
            sizes,
            torch.tensor([x.data_ptr() for x in parameters]),
            torch.tensor([x.data_ptr() for x in anchors]),
            torch.tensor([0 if x is None else x.data_ptr() for x in grads or [None] * len(sizes)]),
        ]
    )
    counts = (sizes + (BLOCK - 1)) // BLOCK
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    blocks = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    # From pageable memory: staged when it is called, and nothing waits for the device.
    table, tensors, blocks = (x.to(device, non_blocking=True) for x in (table, tensors, blocks))
    sums = torch.empty(len(tensors), dtype=torch.float32, device=device)
    factor = step if isinstance(step, Tensor) else sums.new_full((), step)
    if len(tensors):
        kernels.distance_kernel[(len(tensors),)](
            table, tensors, blocks, factor, sums, first, len(sizes),
            HAS_GRAD=grads is not None, ADD=add, BLOCK=BLOCK,
        )  # fmt: skip
    return sums.sum(dtype=torch.float64)


def l2_sp(parameters: Sequence[Tensor], anchors: Sequence[Tensor], weight: float) -> Tensor:
    """The value, from one read of all tensors."""
    with launching_on(parameters[0]):
        left, right = matched(parameters, anchors)
        return (0.5 * weight * _run(left, right, None, 0.0)).float()


def l2_sp_backward(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grad_value: Tensor,  # []
    weight: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of those that need one, in one launch."""
    chosen = [i for i, need in enumerate(needed) if need]
    results = [parameters[0].new_empty(0) for _ in needed]
    if chosen:
        with launching_on(parameters[0]):
            left, right = matched([parameters[i] for i in chosen], [anchors[i] for i in chosen])
            grads = [torch.empty_like(x) for x in left]
            _run(left, right, grads, weight * grad_value)
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
    """The value, and the gradients written or added to, in the same launch."""
    with launching_on(parameters[0]):
        left, right = matched(parameters, anchors)
        places = places_of(grads, left, add)
        total = _run(left, right, places, weight, add=add)
        put_back(grads, places)
        return (0.5 * weight * total).float()
