"""centroid_update on Triton: rows sorted by cluster, then each cluster summed in that order.

The sort is stable, so every sum has one writer and a fixed order, without atomics. It costs a few
passes over 8 bytes a row beside one gather of x, whose rows are read whole, and float64 additions.
Work grows with N D and K, never with N K. A cluster's rows are shared by several programs where
there are too few clusters to fill the card; one giant among many clusters is a single program's.
"""

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import centroid_update_kernels as kernels
from ssl_fast.backends.triton.device import launching_on, processor_count

__all__ = ["centroid_update"]

ROW_BLOCK = 16
DEPTH_BLOCK = 128
# More parts of a cluster would be shorter than a block of rows, or their sum as long as they are.
MOST_PARTS = 64


def centroid_update(
    x: Tensor,  # [B, N, D]
    labels: Tensor,  # [B, N]
    x_scale: Tensor | None,  # [B, N]
    weight: Tensor | None,  # [B, N]
    n_clusters: int,
) -> tuple[Tensor, Tensor]:
    """The clusters' sums [B, K, D] and counts [B, K] in float64; no label is read on the host."""
    batch, rows, depth = x.shape
    segments = batch * n_clusters
    if batch * rows == 0:
        sums = torch.zeros(batch, n_clusters, depth, dtype=torch.float64, device=x.device)
        return sums, sums.new_zeros(batch, n_clusters)
    with launching_on(x):
        x = x if x.stride(2) == 1 else x.contiguous()
        taken = (labels >= 0) & (labels < n_clusters)
        if weight is not None:
            weight = weight.contiguous()
            taken &= weight != 0.0
        firsts = torch.arange(batch, device=x.device)[:, None] * n_clusters
        # half the bytes are half the passes of the radix sort
        kind = torch.int32 if segments < 2**31 else torch.int64
        keys = torch.where(taken, labels + firsts, segments).to(kind).flatten()
        keys, order = keys.sort(stable=True)
        bounds = torch.searchsorted(keys, torch.arange(segments + 1, dtype=kind, device=x.device))
        depth_block = min(DEPTH_BLOCK, max(16, triton.next_power_of_2(depth)))
        programs = segments * triton.cdiv(depth, depth_block)
        wanted = min(4 * processor_count(x.device) // programs, rows // ROW_BLOCK, MOST_PARTS)
        parts = max(1, wanted)
        sums = torch.empty(parts, segments, depth, dtype=torch.float64, device=x.device)
        counts = sums.new_empty(parts, segments)
        kernels.segment_sums_kernel[(programs, parts)](
            x, order, bounds,
            counts if x_scale is None else x_scale.contiguous(),
            counts if weight is None else weight,
            sums, counts, rows, segments, depth, x.stride(0), x.stride(1),
            HAS_SCALE=x_scale is not None, HAS_WEIGHT=weight is not None,
            BLOCK_ROWS=ROW_BLOCK, BLOCK_DEPTH=depth_block,
        )  # fmt: skip
        if parts > 1:
            sums, counts = sums.sum(0), counts.sum(0)
    return sums.view(batch, n_clusters, depth), counts.view(batch, n_clusters)
