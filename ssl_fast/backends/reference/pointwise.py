"""Losses of an input and a target, element by element, as torch.nn.functional defines them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype

__all__ = ["KINDS", "pointwise", "slope"]

# The places are the numbers of csrc/core/pointwise.h.
KINDS = ("mse", "l1", "smooth_l1", "huber", "bce", "bce_with_logits")


def pointwise(
    kind: str,
    input: Tensor,
    target: Tensor,  # the shape of input
    *,
    parameter: float = 1.0,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """``F.<kind>(input, target, reduction="none")`` in fp32, or float64 of a float64 input.

    ``parameter`` is smooth_l1's beta or huber's delta; ``pos_weight`` is bce_with_logits' alone.
    """
    wide = accumulation_dtype(input)
    x, t = input.to(wide), target.to(wide)
    if kind == "mse":
        return F.mse_loss(x, t, reduction="none")
    if kind == "l1":
        return F.l1_loss(x, t, reduction="none")
    if kind == "smooth_l1":
        return F.smooth_l1_loss(x, t, reduction="none", beta=parameter)
    if kind == "huber":
        return F.huber_loss(x, t, reduction="none", delta=parameter)
    if kind == "bce":
        return F.binary_cross_entropy(x, t, reduction="none")
    if kind != "bce_with_logits":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    factor = None if pos_weight is None else pos_weight.to(wide)
    return F.binary_cross_entropy_with_logits(x, t, reduction="none", pos_weight=factor)


def slope(
    kind: str,
    input: Tensor,
    target: Tensor,  # the shape of input
    *,
    parameter: float = 1.0,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The derivative of ``pointwise`` by its input, itself differentiable."""
    wide = accumulation_dtype(input)
    x, t = input.to(wide), target.to(wide)
    d = x - t
    if kind == "mse":
        return 2.0 * d
    if kind == "l1" or (kind == "smooth_l1" and parameter == 0.0):
        return d.sign()
    if kind == "smooth_l1":
        return torch.where(d.abs() >= parameter, d.sign(), d / parameter)
    if kind == "huber":
        return torch.where(d.abs() >= parameter, parameter * d.sign(), d)
    if kind == "bce":
        return d / ((1.0 - x) * x).clamp_min(1e-12)
    if pos_weight is None:
        # Neither cancels where the loss is near 0.
        return torch.where(x > 0.0, (1.0 - t) - (-x).sigmoid(), x.sigmoid() - t)
    factor = (pos_weight.to(wide) - 1.0) * t + 1.0
    return (1.0 - t) - factor * (-x).sigmoid()
