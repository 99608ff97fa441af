"""What becomes of a cluster that no row is nearest to, for one problem.

The functions change the sums and counts that the new centroids are made of. Until then an empty
cluster has the count 0; what still has it afterwards keeps its old centroid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_fast.cluster.problem import Problem, unit

__all__ = ["POLICIES", "Farthest", "farthest", "relocate", "split"]

POLICIES = ("relocate", "keep", "split")


class Farthest(NamedTuple):
    """The rows farthest from their centroids, the farthest first."""

    distances: Tensor  # [n]
    rows: Tensor  # [n, D] float64, scaled as the metric wants
    labels: Tensor  # [n]
    weights: Tensor  # [n] float64

    def best(self, count: int) -> Farthest:
        """The first ``count`` in the order of distance; equal ones stay in the order they have."""
        order = self.distances.argsort(descending=True, stable=True)[:count]
        return Farthest(*(part[order] for part in self))


def farthest(
    problem: Problem,
    centroids: Tensor,  # [1, K, D]
    labels: Tensor,  # [1, N]
    count: int,
    *,
    as_scikit_learn: bool = False,
) -> Farthest:
    """Of one problem; at most ``count`` rows, ties to the lowest index.

    ``as_scikit_learn`` takes them in the order in which numpy.argpartition leaves them there.
    """
    distances = problem.distances_to(centroids, labels)[0]
    weights = problem.mass()[0]
    # A row without weight would leave the cluster that it is given to as empty as before.
    distances = torch.where(weights > 0.0, distances, 0.0)
    count = min(count, distances.shape[0])
    if as_scikit_learn and distances.device.type == "cpu":
        import numpy as np

        order = np.argpartition(distances.numpy(), -count)[: -count - 1 : -1]
        indices = torch.from_numpy(order.copy())
    else:
        indices = distances.argsort(descending=True, stable=True)[:count]
    return Farthest(
        distances[indices],
        problem.scaled_rows(indices[None], torch.float64)[0],
        labels[0, indices],
        weights[indices].double(),
    )


def _rounding(far: Farthest, index: int, rows: Tensor) -> float:
    """The squared distance that the mean of so many equal rows can have from them.

    Of float64 alone: the sums are float64, and the mean of narrower rows is rounded to the row.
    """
    if far.distances.dtype is not torch.float64:
        return 0.0
    relative = torch.finfo(torch.float64).eps * max(float(rows), 8.0)
    return relative**2 * float(far.rows[index].square().sum())


def relocate(
    sums: Tensor,  # [K, D]
    counts: Tensor,  # [K]
    far: Farthest,
) -> None:
    """Give each empty cluster one of the farthest rows, taken out of the cluster it was in.

    As scikit-learn does, and what has no row to get is put where the largest cluster is.
    """
    empty = (counts == 0.0).nonzero()[:, 0]
    number = min(len(empty), len(far.distances))
    for index in range(number):
        old, new, weight = far.labels[index], empty[index], far.weights[index]
        # Rows that stand on their centroid would only exchange clusters.
        if not float(far.distances[index]) > _rounding(far, index, counts[old] / weight):
            break
        moved = far.rows[index] * weight
        sums[old] -= moved
        sums[new] = moved
        left = counts[old] - weight
        # Weights leave rounding behind, which is no row.
        counts[old] = torch.where(left > 1e-12 * weight, left, 0.0)
        counts[new] = weight
    still = counts == 0.0
    largest = counts.argmax()
    sums[still] = sums[largest].clone()
    counts[still] = counts[largest].clone()


def split(
    sums: Tensor,  # [K, D]
    counts: Tensor,  # [K]
    spread: Tensor,  # []
    dtype: torch.dtype,
    *,
    cosine: bool,
) -> None:
    """Give each empty cluster half of the largest one, both moved a little from its centroid.

    The components move to alternate sides, as in FAISS, by a part of their size and of the data's
    standard deviation ``spread``: two roundings of the dtype at least.
    """
    part = max(1.0 / 1024.0, 2.0 * torch.finfo(dtype).eps)
    sides = torch.ones_like(sums[0])
    sides[1::2] = -1.0
    for new in (counts == 0.0).nonzero()[:, 0]:
        old = counts.argmax()
        half = 0.5 * counts[old]
        center = unit(sums[old]) if cosine else sums[old] / counts[old]
        move = sides * part * (center.abs() + spread)
        sums[new] = (center + move) * half
        sums[old] = (center - move) * half
        counts[new] = counts[old] = half
