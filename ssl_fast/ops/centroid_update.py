"""centroid_update: the rows of each cluster summed, for a batch of problems.

The arguments of the operator ``torch.ops.ssl_fast.centroid_update`` are those of the backends'
function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_tensor
from ssl_fast.ops.registration import implementation, register

__all__ = ["centroid_update"]


def _check(
    x: Tensor, labels: Tensor, x_scale: Tensor | None, weight: Tensor | None, n_clusters: int
) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [B, N, D]; got {x.dtype} {tuple(x.shape)}")
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be at least 1; got {n_clusters}")
    check_tensor("labels", labels, x.shape[:2], torch.int64, x)
    check_tensor("x_scale", x_scale, x.shape[:2], accumulation_dtype(x), x)
    check_tensor("weight", weight, x.shape[:2], accumulation_dtype(x), x)


def _fake(x: Tensor, *rest: Any, **_: str) -> tuple[Tensor, Tensor]:
    batch, _rows, depth = x.shape
    n_clusters = rest[-1]
    sums = x.new_empty(batch, n_clusters, depth, dtype=torch.float64)
    return sums, x.new_empty(batch, n_clusters, dtype=torch.float64)


_centroid_update = register(
    "centroid_update(Tensor x, Tensor labels, Tensor? x_scale, Tensor? weight, SymInt n_clusters, "
    '*, str backend="") -> (Tensor, Tensor)',
    implementation("centroid_update", 4, "centroid_update", _check),
    _fake,
)


def centroid_update(
    x: Tensor,  # [B, N, D]
    labels: Tensor,  # [B, N]
    n_clusters: int,
    *,
    x_scale: Tensor | None = None,  # [B, N]
    weight: Tensor | None = None,  # [B, N]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``one_hot(labels).T.double() @ (weight * x_scale * x)`` and ``one_hot(labels).T @ weight``.

    Gives sums [B, K, D] and counts [B, K], both float64 and without a gradient. labels are int64;
    a row with a negative label or the weight 0 takes no part, whatever it holds. x_scale and weight
    (>= 0) are fp32, or float64 beside a float64 x; None stands for 1. ValueError for arguments that
    don't fit each other and, on the CPU, for a label from ``n_clusters`` up, whose row takes no
    part on a GPU.
    """
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = _centroid_update(
            x, labels, x_scale, weight, n_clusters, backend=backend or ""
        )
    return found
