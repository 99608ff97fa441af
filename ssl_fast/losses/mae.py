"""The loss of masked autoencoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl_fast.backends.dispatch import BACKENDS
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.losses.contrastive import check_choice, describe
from ssl_fast.ops.mae import mae

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAELoss", "mae_loss"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _patch_size(patch_size: Any) -> tuple[int, ...]:
    """Rows and columns of a patch, nothing for None."""
    if patch_size is None:
        return ()
    pair = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if not isinstance(pair, (tuple, list)) or not all(
        isinstance(size, int) and not isinstance(size, bool) for size in (*pair, patch_size)[:-1]
    ):
        raise TypeError(f"patch_size must be an int or a pair of them; got {describe(patch_size)}")
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"patch_size must be positive, one number or two; got {patch_size!r}")
    return tuple(pair)


def _floating(name: str, value: Any, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64; got {describe(value)}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")


def _check_sizes(pred: Tensor, target: Tensor, sizes: tuple[int, ...]) -> None:
    if not sizes:
        if target.shape != pred.shape:
            raise ValueError(
                f"target must have the shape of pred, {tuple(pred.shape)}, or be images beside a "
                f"patch_size; got {tuple(target.shape)}"
            )
        return
    batch, channels, height, width = target.shape
    rows, columns = sizes
    if height % rows or width % columns:
        raise ValueError(
            f"patch_size {sizes} must divide the height and width of the images in target; got "
            f"shape {tuple(target.shape)}"
        )
    wanted = (batch, (height // rows) * (width // columns), rows * columns * channels)
    if pred.shape != wanted:
        raise ValueError(
            f"pred must have shape {wanted} for images {tuple(target.shape)} in patches of "
            f"{rows} x {columns}; got {tuple(pred.shape)}"
        )


def _weights(mask: Any, pred: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor [B, L]; got {describe(mask)}")
    if mask.dtype is not torch.bool and mask.dtype not in DTYPES:
        raise TypeError(f"mask must be boolean or floating; got {describe(mask)}")
    if mask.shape != pred.shape[:2]:
        raise ValueError(
            f"mask must have shape {tuple(pred.shape[:2])}, one number a patch; got "
            f"{tuple(mask.shape)}"
        )
    if mask.device != pred.device:
        raise ValueError(f"mask must be on the device of pred, {pred.device}; got {mask.device}")
    if mask.requires_grad:
        raise ValueError("mask must not require a gradient, it gets none; pass mask.detach()")
    return mask.to(dtype)


def mae_loss(
    pred: Tensor,  # [B, L, P]
    target: Tensor,  # [B, L, P] or [B, C, H, W]
    mask: Tensor,  # [B, L]
    *,
    norm_pix_loss: bool = True,
    patch_size: int | Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """``(((pred - t) ** 2).mean(-1) * mask).sum() / mask.sum()``.

    With ``norm_pix_loss`` t is ``(target - mean) / (var + 1e-6) ** 0.5``, mean and unbiased
    variance those of each patch; without it, the target. The loss of He et al., "Masked
    Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377). Patches with mask 0 are not read,
    whatever they hold, and their gradient is 0.

    Args:
        pred: the decoder's patches [B, L, P], without a class token (``x[:, 1:]`` needs no copy).
        target: the patches [B, L, P], or images [B, C, H, W] beside a ``patch_size``, which are
            read in place; the elements of a patch are in the order (row, column, channel) of MAE's
            ``patchify``.
        mask: [B, L], boolean or floating: 1 for the removed patches, which count, 0 for those that
            the encoder saw. Other numbers weigh patches. It gets no gradient.
        norm_pix_loss: normalise each patch of the target.
        patch_size: rows and columns of a patch of the images, one int where they are equal.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    pred and target are float32, bfloat16, float16 or float64 (the reference's), each of its own
    dtype, and are read as they are under autocast too; sums are fp32 or wider. Differentiable in
    pred and target, to any order; both must be unchanged when the backward runs.

    Returns:
        The loss, fp32 (float64 where pred or target is); 0 with zero gradients where the mask sums
        to 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that don't fit, devices that differ, a mask that requires a gradient.
        RuntimeError: ``backend`` can't serve this call.
    """
    sizes = _patch_size(patch_size)
    _floating("pred", pred, "[B, L, P]")
    _floating("target", target, "[B, C, H, W]" if sizes else "[B, L, P]")
    if pred.shape[2] < 1:
        raise ValueError(f"pred must have patches of an element at least; got {tuple(pred.shape)}")
    if target.device != pred.device:
        raise ValueError(
            f"target must be on the device of pred, {pred.device}; got {target.device}"
        )
    _check_sizes(pred, target, sizes)
    if not isinstance(norm_pix_loss, bool):
        raise TypeError(f"norm_pix_loss must be True or False; got {describe(norm_pix_loss)}")
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    if torch.float64 in (pred.dtype, target.dtype):
        pred, target = pred.double(), target.double()
    weights = _weights(mask, pred, accumulation_dtype(pred))
    return mae(
        pred, target, weights, patch_size=sizes, norm_pix_loss=norm_pix_loss, backend=backend
    )


class MAELoss(nn.Module):
    """``mae_loss`` as a module: ``MAELoss(patch_size=16)(pred, images, mask)``."""

    def __init__(
        self,
        norm_pix_loss: bool = True,
        patch_size: int | Sequence[int] | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _patch_size(patch_size)
        if not isinstance(norm_pix_loss, bool):
            raise TypeError(f"norm_pix_loss must be True or False; got {describe(norm_pix_loss)}")
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        self.norm_pix_loss = norm_pix_loss
        self.patch_size = patch_size
        self.backend = backend

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss of predicted patches [B, L, P], their target and the mask [B, L]."""
        return mae_loss(
            pred, target, mask,
            norm_pix_loss=self.norm_pix_loss, patch_size=self.patch_size, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return (
            f"norm_pix_loss={self.norm_pix_loss}, patch_size={self.patch_size!r}, "
            f"backend={self.backend!r}"
        )
