"""centroid_update: from tensors to the pointers of csrc's centroid_update, on CPU and CUDA.

The function and its arguments are the reference's (backends/reference/centroid_update.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import batch_address, batch_of, hold_batch, on_cpu, run

__all__ = ["centroid_update"]


def centroid_update(
    x: Tensor,  # [B, N, D]
    labels: Tensor,  # [B, N]
    x_scale: Tensor | None,  # [B, N]
    weight: Tensor | None,  # [B, N]
    n_clusters: int,
) -> tuple[Tensor, Tensor]:
    """The clusters' sums and counts, each in the order of the rows.

    A label from ``n_clusters`` up raises ValueError on the CPU; on a GPU, where no label is read on
    the host, its row takes no part.
    """
    b, n, d = x.shape
    device, host = x.device, on_cpu(x)
    # Contiguous copies must outlive the call: they are held by these names.
    x = batch_of(x)
    held = hold_batch(
        {
            "labels": (labels, (b, n), torch.int64),
            "x_scale": (x_scale, (b, n), torch.float32),
            "weight": (weight, (b, n), torch.float32),
        },
        device,
    )
    # The CPU's kernel adds to them.
    make = torch.zeros if host else torch.empty
    sums = make((b, n_clusters, d), dtype=torch.float64, device=device)
    counts = make((b, n_clusters), dtype=torch.float64, device=device)
    written = {"sums": sums, "counts": counts}
    if host:
        written["largest"] = torch.full((b,), -1, dtype=torch.int64)
    run(
        _native.centroid_update(
            DTYPES[x.dtype],
            b,
            n,
            n_clusters,
            d,
            batch_address(x),
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in (*held.items(), *written.items())},
        ),
        device,
    )
    highest = int(written["largest"].max()) if host and b > 0 else -1
    if highest >= n_clusters:
        raise ValueError(f"labels must be less than n_clusters = {n_clusters}, got {highest}")
    return sums, counts
