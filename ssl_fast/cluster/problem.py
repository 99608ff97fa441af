"""A batch of clustering problems: the rows, what scales and weighs them, and the ops on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.backends.reference.sums import ordered_sum, row_squares
from ssl_fast.cluster.projection import projection_columns
from ssl_fast.cluster.rows import (
    inverse_norms,
    parts,
    select,
    squared_differences,
)
from ssl_fast.ops import centroid_update as update_op
from ssl_fast.ops import nearest as nearest_op

__all__ = ["Problem", "means", "unit"]


class Moments(NamedTuple):
    """Of the rows of each problem, not weighted, in float64."""

    rows: Tensor  # [B]
    mean: Tensor  # [B, D]
    variance: Tensor  # [B]: the mean over the features of their variances


class Problem(NamedTuple):
    """B problems of N rows each; euclidean where ``x_scale`` is None, else cosine."""

    x: Tensor  # [B, N, D]
    x_scale: Tensor | None  # [B, N]
    weight: Tensor | None  # [B, N]
    lengths: Tensor | None  # [B]
    backend: str | None

    @classmethod
    def of(
        cls,
        x: Tensor,  # [B, N, D]
        metric: str,
        weight: Tensor | None = None,  # [B, N]
        lengths: Tensor | None = None,  # [B]
        backend: str | None = None,
    ) -> Problem:
        """The problems with the scales that their metric asks for."""
        return cls(x, inverse_norms(x) if metric == "cosine" else None, weight, lengths, backend)

    @property
    def cosine(self) -> bool:
        """Whether rows and centroids are compared by their directions."""
        return self.x_scale is not None

    def centroid_scale(self, centroids: Tensor) -> Tensor | None:
        """What makes unit vectors of the centroids [B, K, D], where the metric wants them."""
        return inverse_norms(centroids) if self.cosine else None

    def nearest(
        self,
        centroids: Tensor,  # [B, K, D]
        distances: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Labels and squared distances [B, N]."""
        return nearest_op.nearest(
            self.x, centroids, x_scale=self.x_scale, lengths=self.lengths, distances=distances,
            centroid_scale=self.centroid_scale(centroids), backend=self.backend,
        )  # fmt: skip

    def lloyd(
        self,
        centroids: Tensor,  # [B, K, D]
        lengths: Tensor | None,  # [B]
        distances: bool,
        previous: Tensor | None = None,  # [B, N]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels, squared distances, and the sums and counts of the clusters.

        ``previous`` is what ``hint`` gives.
        """
        return nearest_op.lloyd(
            self.x, centroids, x_scale=self.x_scale, weight=self.weight, lengths=lengths,
            centroid_scale=self.centroid_scale(centroids), distances=distances,
            previous=previous, columns=projection_columns(self.x, centroids.shape[1]),
            backend=self.backend,
        )  # fmt: skip

    def hint(
        self,
        labels: Tensor | None,  # [..., N]
        centroids: Tensor,  # [B, K, D]
    ) -> Tensor | None:
        """The labels of a pass before where they may make the next one faster, else None."""
        return labels if projection_columns(self.x, centroids.shape[1]) > 0 else None

    def distances_to(
        self,
        centroids: Tensor,  # [B, K, D]
        labels: Tensor,  # [B, N]
    ) -> Tensor:
        """The squared distances [B, N] of rows whose labels are known."""
        scale = self.centroid_scale(centroids)
        return squared_differences(self.x, centroids, labels, self.x_scale, scale)

    def scaled_rows(
        self,
        indices: Tensor,  # [B, M]
        dtype: torch.dtype,
    ) -> Tensor:
        """Some of the rows of each problem, as the metric compares them, [B, M, D]."""
        rows = select(self.x, indices).to(dtype)
        if self.x_scale is None:
            return rows
        return rows * self.x_scale.gather(1, indices).to(dtype).unsqueeze(2)

    def total(
        self,
        values: Tensor,  # [B, N]
    ) -> Tensor:
        """The weighted sum over the rows in float64, [B]; values of padding are 0."""
        if self.weight is None:
            return ordered_sum(values)
        # The weight of padding may be NaN.
        return ordered_sum(torch.where(values != 0.0, values * self.weight, 0.0))

    def mass(self) -> Tensor:
        """The weights [B, N], 0 for padding."""
        x = self.x
        weight = self.weight
        if weight is None:
            weight = x.new_ones(1, 1, dtype=accumulation_dtype(x)).expand(x.shape[:2])
        if self.lengths is None:
            return weight
        return torch.where(self.padding(), 0.0, weight)

    def padding(self) -> Tensor:
        """Which rows are none, bool [B, N]."""
        places = torch.arange(self.x.shape[1], device=self.x.device)
        if self.lengths is None:
            return torch.zeros_like(places, dtype=torch.bool).expand(self.x.shape[:2])
        return places >= self.lengths[:, None]

    def one(self, index: int) -> Problem:
        """One of the problems, as a batch of one."""
        x_scale, weight, lengths = (
            None if part is None else part[index : index + 1]
            for part in (self.x_scale, self.weight, self.lengths)
        )
        return Problem(self.x[index : index + 1], x_scale, weight, lengths, self.backend)

    def mean(self) -> tuple[Tensor, Tensor]:
        """How many rows there are [B] and their mean [B, D] in float64, finite if the rows are."""
        x = self.x
        one = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        if self.lengths is not None:
            one.masked_fill_(self.padding(), -1)
        sums, counts = update_op.centroid_update(
            x, one, 1, x_scale=self.x_scale, backend=self.backend
        )
        rows = counts[:, 0]
        return rows, sums[:, 0] / rows.clamp_min(1.0)[:, None]

    def moments(self) -> Moments:
        """Mean and variance by two passes of the ops, with one cluster."""
        x = self.x
        rows, mean = self.mean()
        rounded = mean.to(x.dtype)
        squares = nearest_op.nearest(
            x, rounded[:, None], x_scale=self.x_scale, lengths=self.lengths, backend=self.backend
        )[1]
        off = row_squares(mean - rounded.double())
        variance = (ordered_sum(squares) / rows.clamp_min(1.0) - off) / x.shape[2]
        if x.device.type == "cpu" and not bool(((variance > 0.0) & variance.isfinite()).all()):
            variance = self._wide_variance(rows, mean)
        return Moments(rows, mean, variance.clamp_min(0.0))

    def _wide_variance(
        self,
        rows: Tensor,  # [B]
        mean: Tensor,  # [B, D] float64
    ) -> Tensor:
        """The variance [B] of rows whose squares may leave fp32's range, from float64 copies."""
        squares = self.x.new_zeros(self.x.shape[:2], dtype=torch.float64)
        for problems, part in parts(*self.x.shape):
            some = self.x[problems, part].double()
            if self.x_scale is not None:
                some *= self.x_scale[problems, part].unsqueeze(2)
            squares[problems, part] = row_squares(some.sub_(mean[problems, None]))
        if self.lengths is not None:
            squares.masked_fill_(self.padding(), 0.0)
        return ordered_sum(squares) / rows.clamp_min(1.0) / self.x.shape[2]


def unit(
    vectors: Tensor,  # [..., D] float64
) -> Tensor:
    """The vectors divided by their norms; zeros stay zeros."""
    norms = row_squares(vectors).sqrt_().unsqueeze(-1)
    return torch.where(norms > 0.0, vectors / norms, 0.0)


def means(
    sums: Tensor,  # [B, K, D] float64
    counts: Tensor,  # [B, K] float64
    previous: Tensor,  # [B, K, D]
    cosine: bool,
) -> Tensor:
    """The new centroids in the dtype of ``previous``, which clusters without rows keep.

    The sums are overwritten.
    """
    new = torch.empty_like(previous)
    filled = counts > 0.0
    for problems, part in parts(*previous.shape):
        some = sums[problems, part]
        new[problems, part] = unit(some) if cosine else some.div_(counts[problems, part, None])
    # A pass over the centroids, which few iterations need.
    return new if bool(filled.all()) else torch.where(filled.unsqueeze(2), new, previous, out=new)
