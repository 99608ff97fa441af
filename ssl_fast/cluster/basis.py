"""The directions in which centroids differ most, by which a later pass rules most of them out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["basis_for", "leading_basis"]

# What the products of the basis cost, as a part of a product of all features. Of 8 sizes of D from
# 128 to 4096 and K from 128 to 1024 and 7 bases each, with a variance that falls as 1 / j, a sixth
# came within 10% of the best. [AMD EPYC, Zen 3, 2026-11-27]
_SHARE = 1 / 6
_LEAST, _MOST = 16, 96
# Rows for each column, from which on making the basis takes less than 2% of a pass.
_ROWS = 512


def leading_basis(
    centroids: Tensor,  # [B, K, D]
    columns: int,
) -> Tensor:
    """``torch.linalg.svd(centroids - centroids.mean(1, keepdim=True))[2][:, :columns]``, nearly.

    Orthonormal rows [B, P, D]; two steps of subspace iteration come near enough.
    """
    away = centroids - centroids.mean(1, keepdim=True)
    rows = away[:, :: away.shape[1] // columns][:, :columns]
    for _ in range(2):
        rows = torch.linalg.qr(rows.mT).Q.mT
        rows = rows @ away.mT @ away
    basis: Tensor = torch.linalg.qr(rows.mT).Q.mT.contiguous()
    return basis


def basis_for(
    rows: int,
    centroids: Tensor,  # [B, K, D]
) -> Tensor | None:
    """A basis [B, P, D] with which ``lloyd`` of so many rows may be faster, None where it can't."""
    _, clusters, depth = centroids.shape
    columns = min(_MOST, 8 * round(_SHARE / 8 * clusters * depth / (clusters + depth)))
    served = centroids.device.type == "cpu" and centroids.dtype == torch.float32
    if not served or columns < _LEAST or rows < _ROWS * columns:
        return None
    basis = leading_basis(centroids, columns)
    return basis if bool(basis.isfinite().all()) else None
