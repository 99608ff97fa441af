"""nearest and lloyd on the CPU: from tensors to the pointers of csrc/cpu/nearest.cpp.

The functions and their arguments are the reference's (backends/reference/nearest.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import batch_address, batch_of, check, hold_batch, run

__all__ = ["lloyd", "nearest"]


def _assign(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    weight: Tensor | None,  # [B, N]
    lengths: Tensor | None,  # [B]
    distances: bool,
    previous: Tensor | None,  # [B, N]
    columns: int,
    written: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    (b, n, d), k = x.shape, centroids.shape[1]
    check("x", x, (b, n, d), x.dtype)
    check("centroids", centroids, (b, k, d), x.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    x, centroids = batch_of(x), batch_of(centroids)
    held = hold_batch(
        {
            "x_scale": (x_scale, (b, n), torch.float32),
            "centroid_scale": (centroid_scale, (b, k), torch.float32),
            "weight": (weight, (b, n), torch.float32),
            "lengths": (lengths, (b,), torch.int64),
            "previous": (previous, (b, n), torch.int64),
        }
    )
    labels = torch.empty((b, n), dtype=torch.int64)
    squared = torch.empty((b, n if distances else 0), dtype=torch.float32)
    written = {"labels": labels, **({"distances": squared} if distances else {}), **written}
    run(
        _native.nearest(
            DTYPES[x.dtype],
            b,
            n,
            k,
            d,
            columns,
            batch_address(x),
            batch_address(centroids),
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in (*held.items(), *written.items())},
        )
    )
    return labels, squared


def nearest(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    lengths: Tensor | None,  # [B]
    distances: bool,
) -> tuple[Tensor, Tensor]:
    """Labels and, where asked for, squared distances in one product."""
    return _assign(x, centroids, x_scale, centroid_scale, None, lengths, distances, None, 0, {})


def lloyd(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    weight: Tensor | None,  # [B, N]
    lengths: Tensor | None,  # [B]
    distances: bool,
    previous: Tensor | None = None,  # [B, N]
    columns: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the clusters' sums and counts while the rows are in cache."""
    sums = torch.zeros(centroids.shape, dtype=torch.float64)
    counts = torch.zeros(centroids.shape[:2], dtype=torch.float64)
    labels, squared = _assign(
        x, centroids, x_scale, centroid_scale, weight, lengths, distances, previous, columns,
        {"sums": sums, "counts": counts},
    )  # fmt: skip
    return labels, squared, sums, counts
