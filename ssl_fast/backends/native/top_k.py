"""top_k on the CPU: from tensors to the pointers of csrc/cpu/top_k.cpp.

The function and its arguments are the reference's (backends/reference/top_k.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import batch_address, batch_of, check, hold_batch, run

__all__ = ["top_k"]


def top_k(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    x_scale: Tensor | None,  # [B, N]
    y_scale: Tensor | None,  # [B, M]
    k: int,
) -> tuple[Tensor, Tensor]:
    """Squared distances and indices of the k nearest, in one product."""
    (b, n, d), m = x.shape, y.shape[1]
    check("x", x, (b, n, d), x.dtype)
    check("y", y, (b, m, d), x.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    x, y = batch_of(x), batch_of(y)
    held = hold_batch(
        {
            "x_scale": (x_scale, (b, n), torch.float32),
            "y_scale": (y_scale, (b, m), torch.float32),
        }
    )
    distances = torch.empty((b, n, k), dtype=torch.float32)
    indices = torch.empty((b, n, k), dtype=torch.int64)
    written = {"distances": distances, "indices": indices}
    run(
        _native.top_k(
            DTYPES[x.dtype],
            b,
            n,
            m,
            d,
            k,
            batch_address(x),
            batch_address(y),
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in (*held.items(), *written.items())},
        )
    )
    return distances, indices
