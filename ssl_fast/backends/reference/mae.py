"""mae in plain torch: the definition, in chunks of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype, chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["mae", "mae_backward", "mae_with_gradient", "patches_of", "with_gradient"]

EPSILON = 1e-6  # added to a patch's variance


def patches_of(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Patches [B, L, P] of images [B, C, H, W]; elements ordered (row, column, channel)."""
    batch, channels, height, width = images.shape
    rows, columns = patch_size
    blocks = images.reshape(
        batch, channels, height // rows, rows, width // columns, columns
    )  # fmt: skip
    count = (height // rows) * (width // columns)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, count, rows * columns * channels)


def _images_of(patches: Tensor, shape: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """The inverse of ``patches_of`` for images of that shape."""
    batch, channels, height, width = shape
    rows, columns = patch_size
    blocks = patches.reshape(
        batch, height // rows, width // columns, rows, columns, channels
    )  # fmt: skip
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def _normalized(target: Tensor, norm_pix_loss: bool) -> tuple[Tensor, Tensor | None]:
    """The patches as the prediction should be; 1 / their standard deviations."""
    if not norm_pix_loss:
        return target, None
    mean = target.mean(dim=-1, keepdim=True)
    # As torch's var, whose one element has none: NaN.
    squares = (target - mean).square().sum(dim=-1, keepdim=True)
    inverse = (squares / (target.shape[-1] - 1) + EPSILON).rsqrt() if target.shape[-1] > 1 else (
        squares * torch.nan
    )  # fmt: skip
    return (target - mean) * inverse, inverse


def _masked(
    pred: Tensor, target: Tensor, mask: Tensor, patch_size: Sequence[int], part: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and target patches in the accumulation dtype, 0 where the mask is."""
    wide = accumulation_dtype(pred)
    kept = (mask[part] != 0.0).unsqueeze(-1)
    patches = target[part]
    if len(patch_size):
        patches = patches_of(patches, patch_size)
    return (
        torch.where(kept, pred[part].to(wide), 0.0),
        torch.where(kept, patches.to(wide), 0.0),
        kept,
    )


def mae(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L] in the accumulation dtype
    patch_size: Sequence[int],
    norm_pix_loss: bool,
) -> tuple[Tensor, Tensor]:
    """sum(mask * mean over P of (pred - t)^2) / sum(mask), and 1 / sum(mask); 0 where that is 0."""
    wide = accumulation_dtype(pred)
    total = torch.zeros((), dtype=torch.float64, device=pred.device)
    for start, stop in chunks(pred.shape[0], pred.shape[1] * pred.shape[2], wide.itemsize):
        part = slice(start, stop)
        values, patches, kept = _masked(pred, target, mask, patch_size, part)
        goal, _ = _normalized(patches, norm_pix_loss)
        rows = (values - goal).square().mean(dim=-1)
        rows = torch.where(kept.squeeze(-1), mask[part] * rows, 0.0)
        total = total + rows.sum(dtype=torch.float64)
    count = mask.sum(dtype=torch.float64)
    empty = count == 0.0
    scale = torch.where(empty, 0.0, 1.0 / torch.where(empty, 1.0, count))
    return torch.where(empty, 0.0, total * scale).to(wide), scale.to(wide)


def mae_backward(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
    mask: Tensor,  # [B, L] in the accumulation dtype
    scale: Tensor,  # []
    weight: Tensor,  # []
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of weight * loss for pred and target, [0] where not needed."""
    wide = accumulation_dtype(pred)
    depth = pred.shape[2]
    of_pred, of_target = [pred[:0]], [target[:0]]
    factor = weight.to(wide) * scale * (2.0 / depth)
    for start, stop in chunks(pred.shape[0], pred.shape[1] * depth, wide.itemsize):
        part = slice(start, stop)
        values, patches, kept = _masked(pred, target, mask, patch_size, part)
        goal, inverse = _normalized(patches, norm_pix_loss)
        grad = (values - goal) * (factor * mask[part]).unsqueeze(-1)
        if need_pred:
            of_pred.append(torch.where(kept, grad, 0.0).to(pred.dtype))
        if not need_target:
            continue
        grad = -grad
        if inverse is not None:
            along = (grad * goal).sum(dim=-1, keepdim=True) / max(depth - 1, 1)
            grad = (grad - grad.mean(dim=-1, keepdim=True) - goal * along) * inverse
        grad = torch.where(kept, grad, 0.0).to(target.dtype)
        if len(patch_size):
            grad = _images_of(grad, target[part].shape, patch_size)
        of_target.append(grad)
    return (
        torch.cat(of_pred) if need_pred else pred.new_empty(0),
        torch.cat(of_target) if need_target else target.new_empty(0),
    )


def with_gradient(
    forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``mae_with_gradient`` from a backend's ``mae`` and ``mae_backward``."""

    def mae_with_gradient(
        pred: Tensor,  # [B, L, P]
        target: Tensor,  # [B, L, P], or [B, C, H, W] with a patch size
        mask: Tensor,  # [B, L] in the accumulation dtype
        patch_size: Sequence[int],
        norm_pix_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``mae`` and the gradient of its loss for the prediction."""
        rules = patch_size, norm_pix_loss
        loss, scale = forward(pred, target, mask, *rules)
        weight = torch.ones_like(loss)
        grad_pred, _ = backward(pred, target, mask, scale, weight, *rules, True, False)
        return loss, scale, grad_pred

    return mae_with_gradient


mae_with_gradient = with_gradient(mae, mae_backward)
