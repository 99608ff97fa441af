"""Numbers per row, made in chunks so that no copy of the rows exists."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.backends.reference.sums import row_squares

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "all_finite",
    "flattened",
    "inverse_norms",
    "parts",
    "select",
    "squared_differences",
]

# Elements of a chunk: 1 MiB of fp32, which stays in a core's cache with what is made of it.
_CHUNK = 1 << 18


def parts(problems: int, rows: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of problems and of rows that make up a chunk; they depend on the sizes alone."""
    step = max(1, _CHUNK // max(1, width))
    together = max(1, step // max(1, rows))
    for first in range(0, problems, together):
        for start in range(0, rows, step):
            yield slice(first, first + together), slice(start, min(start + step, rows))


def flattened(
    x: Tensor,  # [..., N, D], or [..., N] with kept=1
    kept: int = 2,
) -> Tensor:
    """The leading dimensions made one; unlike with -1, any of them and N may be 0."""
    lead, last = x.shape[: x.dim() - kept], x.shape[x.dim() - kept :]
    return x.reshape(math.prod(lead), *last)


def all_finite(
    x: Tensor,  # [B, N, D]
    lengths: Tensor | None = None,  # [B]
) -> bool:
    """Whether no row that counts has NaN or infinity."""
    for problems, part in parts(*x.shape):
        bad = ~x[problems, part].isfinite().all(2)
        if lengths is not None:
            places = torch.arange(part.start, part.stop, device=x.device)
            bad &= places < lengths[problems, None]
        if bool(bad.any()):
            return False
    return True


def inverse_norms(
    x: Tensor,  # [B, N, D]
) -> Tensor:
    """1 / |x_i| in the wide dtype, [B, N]; 0 for a row of zeros.

    The squares are summed in float64: neither 1e-30 nor 1e30 leaves its range.
    """
    found = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))
    largest = torch.finfo(found.dtype).max
    for problems, part in parts(*x.shape):
        norms = row_squares(x[problems, part]).sqrt_()
        inverse = torch.where(norms > 0.0, 1.0 / norms, 0.0).clamp_(max=largest)
        found[problems, part] = inverse.to(found.dtype)
    return found


def select(
    x: Tensor,  # [B, N, D]
    indices: Tensor,  # [B, M]
) -> Tensor:
    """``x[b, indices[b]]`` for each problem, [B, M, D]."""
    problems = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[problems, indices]


def squared_differences(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    labels: Tensor,  # [B, N]
    x_scale: Tensor | None = None,  # [B, N]
    centroid_scale: Tensor | None = None,  # [B, K]
) -> Tensor:
    """The squared distance of each row from the centroid of its label, [B, N]; 0 for label -1."""
    wide = accumulation_dtype(x)
    found = x.new_empty(x.shape[:2], dtype=wide)
    points = centroids.to(wide)
    if centroid_scale is not None:
        points = points * centroid_scale.unsqueeze(2)
    for problems, part in parts(*x.shape):
        chosen = labels[problems, part]
        rows = x[problems, part].to(wide)
        if x_scale is not None:
            rows = rows * x_scale[problems, part].unsqueeze(2)
        difference = select(points[problems], chosen.clamp_min(0)).sub_(rows)
        found[problems, part] = torch.where(chosen < 0, 0.0, row_squares(difference))
    return found
