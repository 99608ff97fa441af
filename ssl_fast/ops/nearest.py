"""nearest: the centroid closest to each row, for a batch of problems, never storing a distance.

With u_i = x_scale_i x_i and v_k = centroid_scale_k c_k, label_i = argmin_k |u_i - v_k|^2: a sweep
over the products with an arg-min per row. ``lloyd`` sums the rows by their labels in the same pass.
The arguments of the operators ``torch.ops.ssl_fast.nearest`` and ``lloyd`` are those of the
backends' functions. Neither has a gradient here: labels have none, and the distances' is in closed
form, 2 (u_i - v_label).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_problems, check_tensor
from ssl_fast.ops.registration import implementation, register

__all__ = ["lloyd", "nearest"]


def _check(
    x: Tensor,
    centroids: Tensor,
    x_scale: Tensor | None,
    centroid_scale: Tensor | None,
    lengths: Tensor | None,
    _distances: bool,
) -> None:
    check_problems(x, centroids, "centroids", x_scale, centroid_scale, "centroid_scale")
    check_tensor("lengths", lengths, (x.shape[0],), torch.int64, x)


def _check_lloyd(*arguments: Any) -> None:
    *scaled, weight, lengths, distances, previous, columns = arguments
    check: Any = _check
    check(*scaled, lengths, distances)
    x = scaled[0]
    check_tensor("weight", weight, x.shape[:2], accumulation_dtype(x), x)
    check_tensor("previous", previous, x.shape[:2], torch.int64, x)
    clusters = scaled[1].shape[1]
    if previous is not None and not 1 <= columns <= clusters:
        raise ValueError(
            f"columns must be between 1 and the number of centroids, {clusters}; got {columns}"
        )


def _fake_nearest(x: Tensor, *rest: Any, **_: str) -> tuple[Tensor, Tensor]:
    batch, rows, _depth = x.shape
    distances = x.new_empty(batch, rows if rest[-1] else 0, dtype=accumulation_dtype(x))
    return x.new_empty(batch, rows, dtype=torch.int64), distances


def _fake_lloyd(
    x: Tensor, centroids: Tensor, *rest: Any, **_: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *scaled, _previous, _columns = rest
    return (
        *_fake_nearest(x, *scaled),
        x.new_empty(centroids.shape, dtype=torch.float64),
        x.new_empty(centroids.shape[:2], dtype=torch.float64),
    )


_SCALED = "Tensor x, Tensor centroids, Tensor? x_scale, Tensor? centroid_scale"
_nearest = register(
    f'nearest({_SCALED}, Tensor? lengths, bool distances, *, str backend="") -> (Tensor, Tensor)',
    implementation("nearest", 1, "nearest", _check),
    _fake_nearest,
)
_lloyd = register(
    f"lloyd({_SCALED}, Tensor? weight, Tensor? lengths, bool distances, Tensor? previous, "
    'int columns, *, str backend="") -> (Tensor, Tensor, Tensor, Tensor)',
    implementation("lloyd", 1, "nearest", _check_lloyd),
    _fake_lloyd,
)


def nearest(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    *,
    x_scale: Tensor | None = None,  # [B, N]
    centroid_scale: Tensor | None = None,  # [B, K]
    lengths: Tensor | None = None,  # [B]
    distances: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.cdist(x_scale * x, centroid_scale * centroids).square().min(dim=2)``, no gradient.

    Gives labels [B, N] (int64; ties to the lowest) and squared_distances [B, N], or [B, 0] without
    ``distances``, in fp32 (float64 for float64). K is 1 at least. Scales are in that dtype too,
    None standing for 1; lengths are int64, and rows from a problem's length on get label -1 and
    distance 0, whatever they hold. ValueError for arguments that don't fit each other.
    """
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = _nearest(
            x, centroids, x_scale, centroid_scale, lengths, distances, backend=backend or ""
        )
    return found


def lloyd(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    *,
    x_scale: Tensor | None = None,  # [B, N]
    centroid_scale: Tensor | None = None,  # [B, K]
    weight: Tensor | None = None,  # [B, N]
    lengths: Tensor | None = None,  # [B]
    distances: bool = True,
    previous: Tensor | None = None,  # [B, N]
    columns: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``nearest(...)`` and ``centroid_update`` of its labels in one pass over x.

    Gives labels, squared_distances, sums [B, K, D] and counts [B, K], the last two in float64. One
    step of Lloyd, Least squares quantization in PCM (1982); the division is the caller's.

    ``previous`` and ``columns`` change the speed alone: with the labels that the rows had before, a
    backend may rule centroids out by their distance in so many of their leading directions.
    """
    with torch.no_grad():
        found: tuple[Tensor, Tensor, Tensor, Tensor] = _lloyd(
            x, centroids, x_scale, centroid_scale, weight, lengths, distances, previous, columns,
            backend=backend or "",
        )  # fmt: skip
    return found
