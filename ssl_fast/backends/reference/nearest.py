"""nearest in plain torch: the centroid closest to each row, and the Lloyd step made of it.

Everything is computed in float64, whatever the dtype of the rows: labels are those of the given
values and not of a rounding of them. Rows go in chunks with ``pairs.CHUNK_BYTES`` of scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.backends.reference.centroid_update import centroid_update
from ssl_fast.backends.reference.pairs import accumulation_dtype, chunks
from ssl_fast.backends.reference.sums import row_squares

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["lloyd", "nearest", "ranking", "scaled", "squared_differences", "tiles"]


def tiles(problems: int, rows: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of problems and of rows whose ``width`` float64 numbers each fit CHUNK_BYTES."""
    for first, last in chunks(problems, rows * width, 8):
        for start, stop in chunks(rows, (last - first) * width, 8):
            yield slice(first, last), slice(start, stop)


def scaled(
    rows: Tensor,  # [B, N, D]
    scale: Tensor | None,  # [B, N]
) -> Tensor:
    """The rows times their factors in float64."""
    wide = rows.double()
    return wide if scale is None else wide * scale.double().unsqueeze(2)


def ranking(
    u: Tensor,  # [B, N, D] float64
    v: Tensor,  # [B, M, D] float64
    k: int,
) -> Tensor:
    """Numbers [B, N, M] whose k smallest in a row are those of |u_i - v_j|, with its ties.

    1/2|v|^2 - u.v where rounding can't matter. Where it can, at a border between the k-th and the
    next that is within the error of the product, that row's distances, computed from differences:
    exact ties stay ties, and data far from the origin keep their digits. NaN counts as infinite.
    """
    norms = v.square().sum(2)
    found = torch.baddbmm(0.5 * norms.unsqueeze(1), u, v.mT, alpha=-1.0)
    found = torch.where(found.isnan(), torch.inf, found)
    largest = torch.where(norms.isfinite(), norms, 0.0).amax(1)[:, None]
    size = (u.square().sum(2) * largest).sqrt() + largest  # [B, N]
    margin = (v.shape[2] + 8) * torch.finfo(torch.float64).eps * size
    border = found.topk(k, dim=2, largest=False).values[..., -1] + margin
    unsure = (found <= border.unsqueeze(2)).sum(2) > k
    for problem in unsure.any(1).nonzero().flatten().tolist():
        rows = unsure[problem].nonzero().flatten()
        # torch's other ways to compute distances go by the product again
        distances = torch.cdist(
            u[problem, rows], v[problem], compute_mode="donot_use_mm_for_euclid_dist"
        )
        found[problem, rows] = torch.where(distances.isnan(), torch.inf, distances)
    return found


def squared_differences(
    u: Tensor,  # [B, N, D]
    v: Tensor,  # [B, M, D]
    indices: Tensor,  # [B, N]
) -> Tensor:
    """|u_i - v_j|^2 at j = indices_i, [B, N]."""
    chosen = v.gather(1, indices.unsqueeze(2).expand(*indices.shape, v.shape[2]))
    return row_squares(u - chosen)


def nearest(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    lengths: Tensor | None,  # [B]
    distances: bool,
) -> tuple[Tensor, Tensor]:
    """The labels [B, N], argmin over k of |x_scale_i x_i - centroid_scale_k c_k|^2, and distances.

    Ties go to the lowest k. squared_distances is [B, 0] unless ``distances``. A row at or beyond
    its problem's length has label -1 and distance 0; a row of NaN label 0 and distance NaN; a
    centroid of NaN is nobody's nearest unless all are.
    """
    batch, rows, _ = x.shape
    labels = torch.empty(batch, rows, dtype=torch.int64, device=x.device)
    squared = x.new_empty(batch, rows if distances else 0, dtype=accumulation_dtype(x))
    for problems, part in tiles(batch, rows, centroids.shape[1] + x.shape[2]):
        u = scaled(x[problems, part], None if x_scale is None else x_scale[problems, part])
        v = scaled(
            centroids[problems], None if centroid_scale is None else centroid_scale[problems]
        )
        padding = None
        if lengths is not None:
            places = torch.arange(part.start, part.stop, device=x.device)
            padding = places >= lengths[problems, None]
            u = torch.where(padding.unsqueeze(2), 0.0, u)
        label = ranking(u, v, 1).argmin(2)
        if distances:
            found = squared_differences(u, v, label)
            squared[problems, part] = (
                found if padding is None else torch.where(padding, 0.0, found)
            ).to(squared.dtype)
        labels[problems, part] = label if padding is None else torch.where(padding, -1, label)
    return labels, squared


def lloyd(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    weight: Tensor | None,  # [B, N]
    lengths: Tensor | None,  # [B]
    distances: bool,
    *_hints: Tensor | int | None,  # previous [B, N] and columns, of no use here
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``nearest`` and then ``centroid_update`` of its labels: labels, distances, sums, counts."""
    labels, squared = nearest(x, centroids, x_scale, centroid_scale, lengths, distances)
    sums, counts = centroid_update(x, labels, x_scale, weight, centroids.shape[1])
    return labels, squared, sums, counts
