"""Distances between all rows, written out in float64, and what a label or a neighbour owes them."""

from __future__ import annotations

import torch
from tolerances import TOLERANCES


def scaled(rows, scale=None):
    wide = rows.double()
    return wide if scale is None else wide * scale.double().unsqueeze(-1)


def all_distances(x, y, x_scale=None, y_scale=None):
    """|x_scale_i x_i - y_scale_j y_j|^2 from differences, [B, N, M]; a NaN is further than all."""
    u, v = scaled(x, x_scale), scaled(y, y_scale)
    found = torch.stack([(u - row.unsqueeze(1)).square().sum(2) for row in v.unbind(1)], dim=2)
    return torch.where(found.isnan(), torch.inf, found)


def strided_views(x):
    """The same values in other layouts; the last one shifts the storage by one element."""
    batch, n, d = x.shape
    every_other = torch.full((batch, n, 2 * d), torch.nan, dtype=x.dtype)[..., ::2]
    padded = torch.full((batch, n + 1, d + 3), torch.nan, dtype=x.dtype)[:, 1:, 1 : d + 1]
    transposed = torch.empty(batch, d, n, dtype=x.dtype).mT
    heads = torch.full((n, batch, d), torch.nan, dtype=x.dtype).transpose(0, 1)
    shifted = torch.full((batch * n * d + 1,), torch.nan, dtype=x.dtype)[1:].view(batch, n, d)
    for view in (every_other, padded, transposed, heads, shifted):
        view.copy_(x)
        yield view


def rows_with(indices, values):
    """values[b, i, indices[b, i]]."""
    return values.gather(2, indices.unsqueeze(2)).squeeze(2)


def assert_near_labels(labels, exact, what="labels"):
    """No label's distance is above the smallest by more than fp32 makes of the largest.

    That is the accuracy of a product in fp32 once the centroids' mean is the origin.
    """
    assert labels.dtype is torch.int64
    assert labels.numel() == 0 or (labels.min() >= 0 and labels.max() < exact.shape[2]), what
    excess = rows_with(labels, exact) - exact.amin(2)
    allowed = TOLERANCES[torch.float32].relative * exact.amax(2)
    assert torch.all(excess <= allowed), f"{what}: {(excess - allowed).max():.3e} too far"


def assert_near_distances(squared, indices, x, y, x_scale=None, y_scale=None):
    """Each distance is its pair's, to fp32's digits of the difference (of the rows when scaled)."""
    u, v = scaled(x, x_scale), scaled(y, y_scale)
    batch, rows, *k = indices.shape
    flat = indices.flatten(1)
    chosen = v.gather(1, flat.unsqueeze(2).expand(-1, -1, v.shape[2]))
    chosen = chosen.view(batch, rows, *k, v.shape[2])
    if k:
        u = u.unsqueeze(2)
    difference = (u - chosen).norm(dim=-1)
    allowed = TOLERANCES[squared.dtype].relative * difference.square()
    if x_scale is not None or y_scale is not None:
        # each scaled row was rounded once
        slack = torch.finfo(squared.dtype).eps * (u.norm(dim=-1) + chosen.norm(dim=-1))
        allowed = allowed + 2 * difference * slack + slack.square()
    error = (squared.double() - difference.square()).abs()
    assert torch.all(error <= allowed), f"distances: {(error - allowed).max():.3e} beyond"
