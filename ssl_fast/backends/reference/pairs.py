"""What the references over pairs of rows share: chunks of rows, the pairs left out, norms."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "IGNORED_ID",
    "accumulation_dtype",
    "chunks",
    "diagonal_range",
    "excluded_pairs",
    "inverse_norms",
    "log_sum_exp",
    "on_diagonal",
    "pad_rows",
    "pair_diagonal",
    "through_norm",
    "unit_rows",
]

CHUNK_BYTES = 64 * 2**20
IGNORED_ID = -(2**63)  # a row or key with this id takes part in no pair
SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's eps


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype is torch.float64 else torch.float32


def inverse_norms(features: Tensor) -> Tensor:
    """1 / |row| of features [N, D] in the accumulation dtype, [N]; 0 for a zero row."""
    wide = features.to(accumulation_dtype(features))
    squares = (wide * wide).sum(dim=1)
    zero = squares <= SMALLEST_NORM**2
    # The inner where keeps 1/0 out of the derivatives, at every order.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).rsqrt())


def unit_rows(features: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows [N, D] in the accumulation dtype, divided by their norms on request; inverse norms."""
    wide = features.to(accumulation_dtype(features))
    if not normalize:
        return wide, None
    inverse = inverse_norms(wide)[:, None]
    return wide * inverse, inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """The gradient for rows [N, D] from the gradient for the same rows divided by their norms."""
    if inverse is None:
        return grad
    return inverse * (grad - unit * (unit * grad).sum(dim=1, keepdim=True))


def chunks(rows: int, columns: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose logits fit CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, columns * itemsize))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def on_diagonal(start: int, stop: int, key: Tensor, diagonal: int) -> Tensor:
    """Whether j = i + diagonal, bool [stop - start, M]."""
    columns = torch.arange(key.shape[0], device=key.device)
    rows = torch.arange(start, stop, device=key.device)
    return columns == (rows + diagonal)[:, None]


def _separate(ids: Tensor) -> tuple[Tensor, ...]:
    """The ids [N] or [N, 2] of rows, those in each place [N] by themselves."""
    return ids.unbind(1) if ids.dim() == 2 else (ids,)


def excluded_pairs(
    start: int,
    stop: int,
    key: Tensor,  # [M, D]
    query_ids: Tensor | None,  # [N] or [N, 2]
    key_ids: Tensor | None,  # [M] or [M, 2]
    diagonals: Sequence[int],
    matching: bool = False,
) -> Tensor | None:
    """The pairs that leave the softmax, bool [stop - start, M], or None when no rule is given."""
    excluded = None
    if query_ids is not None and key_ids is not None:
        rows, columns = _separate(query_ids[start:stop]), _separate(key_ids)
        common = [row[:, None] == column for row, column in zip(rows, columns, strict=True)]
        excluded = reduce(or_, common)
        excluded = ~excluded if matching else excluded
        for row, column in zip(rows, columns, strict=True):
            excluded = excluded | (row == IGNORED_ID)[:, None] | (column == IGNORED_ID)
    for diagonal in diagonals:
        on = on_diagonal(start, stop, key, diagonal)
        excluded = on if excluded is None else excluded | on
    return excluded


def diagonal_range(rows: int, columns: int, diagonal: int) -> tuple[int, int, int]:
    """The first row and the first column of a diagonal, and how many pairs lie on it."""
    row = max(0, -diagonal)
    count = min(rows, columns - diagonal) - row
    return (row, row + diagonal, count) if count > 0 else (0, 0, 0)


def pad_rows(values: Tensor, start: int, rows: int) -> Tensor:
    """``values`` [n, ...] as rows ``start`` to ``start + n`` of ``rows``, zeros around them."""
    return F.pad(values, (*(0, 0) * (values.dim() - 1), start, rows - start - values.shape[0]))


def pair_diagonal(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    diagonal: int,
) -> Tensor:
    """<q_i, k_j> at j = i + diagonal, [N]; 0 where that column doesn't exist."""
    rows = query.shape[0]
    row, column, count = diagonal_range(rows, key.shape[0], diagonal)
    products = (query[row : row + count] * key[column : column + count]).sum(dim=1)
    return pad_rows(products, row, rows)


def log_sum_exp(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum along dim.

    torch.logsumexp, but its gradient is 0 and not NaN where everything is -inf.
    """
    maximum = logits.detach().amax(dim=dim)
    shift = torch.where(torch.isfinite(maximum), maximum, 0.0)
    total = (logits - shift.unsqueeze(dim)).exp().sum(dim=dim)
    empty = total == 0.0
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + shift), maximum
