"""centroid_update in plain torch: weighted sums of the rows of each cluster, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import chunks

__all__ = ["centroid_update"]


def centroid_update(
    x: Tensor,  # [B, N, D]
    labels: Tensor,  # [B, N] int64
    x_scale: Tensor | None,  # [B, N]
    weight: Tensor | None,  # [B, N]
    n_clusters: int,
) -> tuple[Tensor, Tensor]:
    """The sums [B, K, D] of weight_i x_scale_i x_i over the rows with label k; counts [B, K].

    Both are float64; counts are the sums of the weights. A row with a negative label or the weight
    0 takes no part, whatever it holds. A label from ``n_clusters`` up raises ValueError on the CPU;
    elsewhere, where looking at it would wait for the device, its row takes no part either.
    """
    batch, _, depth = x.shape
    if labels.device.type == "cpu" and labels.numel() and (top := int(labels.max())) >= n_clusters:
        raise ValueError(f"labels must be below n_clusters={n_clusters}; got {top}")
    sums = torch.zeros(batch * n_clusters, depth, dtype=torch.float64, device=x.device)
    counts = torch.zeros(batch * n_clusters, dtype=torch.float64, device=x.device)
    taken = (labels >= 0) & (labels < n_clusters)
    if weight is not None:
        taken = taken & (weight != 0.0)
    firsts = torch.arange(batch, device=x.device)[:, None] * n_clusters
    places = torch.where(taken, labels + firsts, firsts)  # [B, N]
    factors = taken.double() if weight is None else torch.where(taken, weight.double(), 0.0)
    counts.index_add_(0, places.flatten(), factors.flatten())
    for first, last in chunks(batch, x.shape[1] * depth, 8):
        for start, stop in chunks(x.shape[1], (last - first) * depth, 8):
            part = slice(first, last), slice(start, stop)
            rows = x[part].double()
            if x_scale is not None:
                rows = rows * x_scale[part].double().unsqueeze(2)
            rows = torch.where(taken[part].unsqueeze(2), rows * factors[part].unsqueeze(2), 0.0)
            sums.index_add_(0, places[part].flatten(), rows.flatten(0, 1))
    return sums.view(batch, n_clusters, depth), counts.view(batch, n_clusters)
