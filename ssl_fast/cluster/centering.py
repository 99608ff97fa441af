"""Whether the mean of the data is taken from its rows before they are clustered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Centered", "center", "worth_centering"]

# A copy up to here is always made; a larger one only where the mean would cost digits.
_SMALL_BYTES = 16 << 20


class Centered(NamedTuple):
    """Rows less their mean, where that is worth a copy."""

    x: Tensor  # [N, D]
    mean: Tensor | None  # [D], what was taken from x
    shift: Tensor | None  # [D], what scikit-learn would have taken


def column_means(x: Tensor) -> Tensor:
    """The mean of the rows [N, D], in the arithmetic of ``numpy.mean`` where that is at hand."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.numpy().mean(axis=0))
    return x.mean(dim=0)


def worth_centering(bytes_: int, mean: Tensor, variance: float) -> bool:
    """Whether distances from the origin would lose digits, or a copy is small.

    scikit-learn always takes the mean from a copy. fp32 products keep their digits where the mean
    isn't more than twice as long as the rows deviate from it.
    """
    if bytes_ <= _SMALL_BYTES:
        return True
    return float(mean.double().square().mean()) > 4.0 * variance


def center(x: Tensor, variance: float, *, allowed: bool, asked: bool) -> Centered:
    """Take the mean from a copy of the rows, where that is allowed and needed or ``asked``."""
    if not allowed:
        return Centered(x, None, None)
    mean = column_means(x)
    if asked or worth_centering(x.numel() * x.element_size(), mean, variance):
        return Centered(x - mean, mean, None)
    return Centered(x, None, mean)
