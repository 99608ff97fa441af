"""top_k in plain torch: the k nearest of the other rows, by brute force in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast.backends.reference.nearest import ranking, scaled, squared_differences, tiles
from ssl_fast.backends.reference.pairs import accumulation_dtype

__all__ = ["top_k"]


def top_k(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    x_scale: Tensor | None,  # [B, N]
    y_scale: Tensor | None,  # [B, M]
    k: int,
) -> tuple[Tensor, Tensor]:
    """squared_distances [B, N, k] of the k rows of y nearest to each row of x, and their indices.

    In the order of (distance, index): of equal distances the lowest indices are taken, and stand
    first. A row of NaN in y comes after all others, a row of NaN in x has the first k.
    """
    batch, rows, depth = x.shape
    squared = x.new_empty(batch, rows, k, dtype=accumulation_dtype(x))
    indices = torch.empty(batch, rows, k, dtype=torch.int64, device=x.device)
    for problems, part in tiles(batch, rows, y.shape[1] + k * depth):
        u = scaled(x[problems, part], None if x_scale is None else x_scale[problems, part])
        v = scaled(y[problems], None if y_scale is None else y_scale[problems])
        chosen = _smallest(ranking(u, v, k), k)
        found = squared_differences(u.repeat_interleave(k, dim=1), v, chosen.flatten(1)).view_as(
            chosen
        )
        # the chosen are in the order of their indices, which a stable sort keeps among equals
        found, order = found.sort(dim=2, stable=True)
        squared[problems, part] = found.to(squared.dtype)
        indices[problems, part] = chosen.gather(2, order)
    return squared, indices


def _smallest(
    ranked: Tensor,  # [B, N, M]
    k: int,
) -> Tensor:
    """The places [B, N, k] of the k smallest in their order in the row; ties to the first."""
    border = ranked.topk(k, dim=2, largest=False).values[..., -1:]
    below, level = ranked < border, ranked == border
    room = k - below.sum(2, keepdim=True)
    kept = below | (level & (level.cumsum(2) <= room))
    return kept.nonzero()[:, 2].view(*ranked.shape[:2], k)
