"""top_k on Triton: one sweep that keeps each row's best, then their distances from differences."""

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import top_k_kernels as kernels
from ssl_fast.backends.triton.device import launching_on
from ssl_fast.backends.triton.nearest import problems_of, squared_distances

__all__ = ["top_k"]


def top_k(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    x_scale: Tensor | None,  # [B, N]
    y_scale: Tensor | None,  # [B, M]
    k: int,
) -> tuple[Tensor, Tensor]:
    """Squared distances and indices of the k nearest, k up to the backend's MOST_NEIGHBOURS."""
    batch, rows, _ = x.shape
    indices = torch.empty(batch, rows, k, dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return x.new_empty(batch, rows, k, dtype=torch.float32), indices
    with launching_on(x):
        problems = problems_of(x, y, x_scale, y_scale)
        kept = triton.next_power_of_2(k)
        tile = problems.tile("top_k")
        tile["BLOCK_COLUMNS"] = max(tile["BLOCK_COLUMNS"], kept)
        kernels.top_k_kernel[problems.grid(tile["BLOCK_ROWS"])](
            indices=indices, k=k, KEPT=kept, **problems.rows(), **tile
        )
        # the order of the scores is not quite that of the distances, whose ties go by index
        indices = indices.sort(dim=2).values
        squared, order = squared_distances(problems, indices).sort(dim=2, stable=True)
    return squared, indices.gather(2, order)
