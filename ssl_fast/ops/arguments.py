"""What the ops check before a kernel reads tensors by their addresses.

The operators can be called without the public functions, so the check runs inside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssl_fast.backends.reference.pairs import accumulation_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["check_problems", "check_tensor"]


def check_tensor(
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    beside: Tensor,
) -> None:
    """ValueError unless the value is absent, or such a tensor on the device of ``beside``."""
    if value is None:
        return
    if value.shape != shape or value.dtype is not dtype or value.device != beside.device:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(shape)} on {beside.device}; got a "
            f"{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
        )


def check_problems(
    x: Tensor,  # [B, N, D]
    others: Tensor,  # [B, M, D], M >= 1
    others_name: str,
    x_scale: Tensor | None,  # [B, N]
    others_scale: Tensor | None,  # [B, M]
    others_scale_name: str,
) -> None:
    """Two sets of rows for each of B problems, with a factor per row."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [B, N, D]; got {x.dtype} {tuple(x.shape)}")
    if others.dim() != 3 or others.shape[1] < 1:
        raise ValueError(
            f"{others_name} must be three-dimensional with a row at least for each problem; got "
            f"shape {tuple(others.shape)}"
        )
    batch, rows, depth = x.shape
    count = others.shape[1]
    check_tensor(others_name, others, (batch, count, depth), x.dtype, x)
    wide = accumulation_dtype(x)
    check_tensor("x_scale", x_scale, (batch, rows), wide, x)
    check_tensor(others_scale_name, others_scale, (batch, count), wide, x)
