"""top_k: the k nearest of other rows, for a batch of problems, never storing all distances.

The arguments of the operator ``torch.ops.ssl_fast.top_k`` are those of the backends' function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_problems
from ssl_fast.ops.registration import implementation, register

__all__ = ["top_k"]


def _check(x: Tensor, y: Tensor, x_scale: Tensor | None, y_scale: Tensor | None, k: int) -> None:
    check_problems(x, y, "y", x_scale, y_scale, "y_scale")
    if not 1 <= k <= y.shape[1]:
        raise ValueError(f"k must be from 1 to the number of rows of y, {y.shape[1]}; got {k}")


def _fake(x: Tensor, *rest: Any, **_: str) -> tuple[Tensor, Tensor]:
    batch, rows, _depth = x.shape
    distances = x.new_empty(batch, rows, rest[-1], dtype=accumulation_dtype(x))
    return distances, x.new_empty(batch, rows, rest[-1], dtype=torch.int64)


_top_k = register(
    "top_k(Tensor x, Tensor y, Tensor? x_scale, Tensor? y_scale, SymInt k, *, "
    'str backend="") -> (Tensor, Tensor)',
    implementation("top_k", 1, "top_k", _check, count_at=4),
    _fake,
)


def top_k(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    k: int,
    *,
    x_scale: Tensor | None = None,  # [B, N]
    y_scale: Tensor | None = None,  # [B, M]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.cdist(x_scale * x, y_scale * y).square().topk(k, largest=False)``, no gradient.

    Gives squared_distances [B, N, k] in fp32 (float64 for float64) and indices (int64), in the
    order of (distance, index). Scales are in the distances' dtype, None standing for 1. ValueError
    for arguments that don't fit each other and for a k that isn't from 1 to M.
    """
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = _top_k(x, y, x_scale, y_scale, k, backend=backend or "")
    return found
