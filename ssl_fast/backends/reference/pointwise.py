"""Losses of an input and a target, element by element, as torch.nn.functional defines them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype

__all__ = ["KINDS", "pointwise"]

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
