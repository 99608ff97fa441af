"""mae on the CPU: from tensors to the pointers of csrc/cpu/mae.cpp.

The functions and their arguments are the reference's (backends/reference/mae.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import (
    batch_address,
    batch_of,
    check,
    gradient,
    hold_batch,
    run,
    threads_for,
)
from ssl_fast.backends.reference import mae as reference

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["mae", "mae_backward", "mae_with_gradient"]


def _run(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    arrays: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]],
) -> None:
    b, count, p = pred.shape
    check("pred", pred, (b, count, p), pred.dtype)
    check("target", target, tuple(target.shape), target.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    pred = batch_of(pred)
    where: tuple[int, ...]
    if len(patch_size):
        target = target.resolve_neg()
        columns = target.shape[3] // patch_size[1]
        where = (
            target.data_ptr(), *target.stride(), target.shape[1], *patch_size, columns,
        )  # fmt: skip
    else:
        target = batch_of(target)
        where = batch_address(target)
    held = hold_batch({"mask": (mask, (b, count), torch.float32), **arrays})
    run(
        _native.mae(
            DTYPES[pred.dtype],
            DTYPES[target.dtype],
            b,
            count,
            p,
            batch_address(pred),
            where,
            norm_pix_loss,
            threads_for(pred.numel()),
            {name: value.data_ptr() for name, value in held.items()},
        )
    )


def mae(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L]
    patch_size: Sequence[int],
    norm_pix_loss: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, from one read of the patches whose mask isn't 0."""
    results = {name: torch.empty((), dtype=torch.float32) for name in ("loss", "scale")}
    arrays: Any = {name: (value, (), torch.float32) for name, value in results.items()}
    _run(pred, target, mask, patch_size, norm_pix_loss, arrays)
    return results["loss"], results["scale"]


def mae_with_gradient(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L]
    patch_size: Sequence[int],
    norm_pix_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradient of it for the prediction, from one read."""
    results = {name: torch.empty((), dtype=torch.float32) for name in ("loss", "scale")}
    grad_pred = gradient(pred, True)
    arrays: Any = {name: (value, (), torch.float32) for name, value in results.items()}
    arrays["grad_pred"] = (grad_pred, tuple(pred.shape), pred.dtype)
    _run(pred, target, mask, patch_size, norm_pix_loss, arrays)
    return results["loss"], results["scale"], grad_pred


def mae_backward(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L]
    scale: Tensor,  # []
    weight: Tensor,  # []
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """The prediction's gradient from one more read; the target's, which few ask for, by torch."""
    grad_pred = gradient(pred, need_pred)
    if need_pred:
        _run(
            pred, target, mask, patch_size, norm_pix_loss,
            {
                "scale": (scale, (), torch.float32),
                "weight": (weight, (), torch.float32),
                "grad_pred": (grad_pred, tuple(pred.shape), pred.dtype),
            },
        )  # fmt: skip
    if not need_target:
        return grad_pred, target.new_empty(0)
    _, grad_target = reference.mae_backward(
        pred, target, mask, scale, weight, patch_size, norm_pix_loss, False, True
    )
    return grad_pred, grad_target
