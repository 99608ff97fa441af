"""mae on Triton: a program for each patch, whose loss torch adds up in float64.

The functions and their arguments are the reference's (backends/reference/mae.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.reference import mae as reference
from ssl_fast.backends.triton import mae_kernels as kernels
from ssl_fast.backends.triton.device import launching_on, written_dtype

__all__ = ["mae", "mae_backward", "mae_with_gradient"]

MOST_ELEMENTS = 1024  # of a patch that a program holds at a time


def _launch(
    kernel: Any,
    pred: Tensor,
    target: Tensor,
    arrays: Sequence[Tensor],
    patch_size: Sequence[int],
    norm_pix_loss: bool,
) -> None:
    batch, count, depth = pred.shape
    if batch * count == 0:
        return
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    images = len(patch_size) > 0
    if images:
        rows, columns = patch_size
        strides = target.stride(0), target.stride(2), target.stride(3), target.stride(1)
        sizes = target.shape[1], rows, columns, target.shape[3] // columns
    else:
        target = target if target.stride(2) == 1 else target.contiguous()
        strides, sizes = (target.stride(0), target.stride(1), 1, 1), (1, 1, 1, 1)
    kernel[(batch * count,)](
        pred, target, *arrays, count, depth, float(depth - 1),
        pred.stride(0), pred.stride(1), *strides, *sizes,
        IMAGES=images, NORMALIZE=norm_pix_loss,
        BLOCK=min(MOST_ELEMENTS, triton.next_power_of_2(depth)),
    )  # fmt: skip


def mae(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L]
    patch_size: Sequence[int],
    norm_pix_loss: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and 1 / sum(mask), 0 where that is 0; the host learns of neither."""
    with launching_on(pred):
        mask = mask.contiguous()
        losses = torch.empty_like(mask)
        _launch(kernels.loss_kernel, pred, target, (mask, losses), patch_size, norm_pix_loss)
        total = mask.sum(dtype=torch.float64)
        scale = torch.where(total == 0.0, 0.0, 1.0 / total)
        loss = torch.where(total == 0.0, 0.0, losses.sum(dtype=torch.float64) * scale)
    return loss.float(), scale.float()


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
    """The prediction's gradient in one launch; the target's, which few ask for, by torch."""
    grad_pred, grad_target = pred.new_empty(0), target.new_empty(0)
    with launching_on(pred):
        if need_pred:
            shape, dtype = pred.shape, written_dtype(pred)
            grad = torch.empty(shape, dtype=dtype, device=pred.device)
            arrays = (mask.contiguous(), scale * weight, grad)
            _launch(kernels.gradient_kernel, pred, target, arrays, patch_size, norm_pix_loss)
            grad_pred = grad.to(pred.dtype)
        if need_target:
            _, grad_target = reference.mae_backward(
                pred, target, mask, scale, weight, patch_size, norm_pix_loss, False, True
            )
    return grad_pred, grad_target


mae_with_gradient = reference.with_gradient(mae, mae_backward)
