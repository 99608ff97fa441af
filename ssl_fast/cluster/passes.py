"""Lloyd's iterations for one problem whose rows aren't in one place: batches, or processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ssl_fast.cluster.empty import Farthest, relocate, split
from ssl_fast.cluster.lloyd import shift_of
from ssl_fast.cluster.problem import means

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PassIteration", "Passes", "Sums", "iterate"]


class Sums(NamedTuple):
    """Of all rows, by the clusters that they are nearest to."""

    sums: Tensor  # [K, D] float64
    counts: Tensor  # [K] float64
    inertia: Tensor  # [] float64


class Passes(Protocol):
    """Rows that can be gone over as often as needed."""

    cosine: bool

    def sums(self, centroids: Tensor) -> Sums:
        """Assign all rows to the centroids [K, D]."""
        ...

    def farthest(self, centroids: Tensor, count: int) -> Farthest:
        """The rows farthest from their centroids, of all."""
        ...


class PassIteration(NamedTuple):
    """What a callback is given after each iteration."""

    iteration: int  # from 1
    inertia: float  # of the centroids before this iteration's update
    shift: float  # the squared way of all centroids in this iteration
    centroids: Tensor  # [K, D], after the update


class Outcome(NamedTuple):
    """Where the iterations ended, and what belongs to those centroids."""

    centroids: Tensor  # [K, D]
    counts: Tensor  # [K] float64
    inertia: float
    n_iter: int


def iterate(
    passes: Passes,
    centroids: Tensor,  # [K, D]
    *,
    max_iter: int,
    threshold: float,
    spread: float,
    empty: str,
    callback: Callable[[PassIteration], Any] | None,
) -> Outcome:
    """As ``lloyd.run`` for one problem; the last pass is always of the centroids returned."""
    moved, n_iter = True, 0
    found = None
    for n_iter in range(1, max_iter + 1):
        found = passes.sums(centroids)
        filled = _fill(passes, centroids, found, spread, empty)
        new = means(found.sums[None], filled[None], centroids[None], passes.cosine)[0]
        ways, changed = shift_of(new[None], centroids[None])
        shift, moved = float(ways), bool(changed)
        centroids = new
        if callback is not None:
            callback(PassIteration(n_iter, float(found.inertia), shift, centroids.clone()))
        if not shift > threshold:
            break
    if moved or found is None:
        found = passes.sums(centroids)
    return Outcome(centroids, found.counts, float(found.inertia), n_iter)


def _fill(passes: Passes, centroids: Tensor, found: Sums, spread: float, empty: str) -> Tensor:
    """Apply the policy for empty clusters to the sums; give the counts to divide them by."""
    number = int((found.counts == 0.0).sum())
    if number == 0 or empty == "keep":
        return found.counts
    filled = found.counts.clone()
    if empty == "split":
        of_data = torch.tensor(spread, dtype=torch.float64, device=filled.device)
        split(found.sums, filled, of_data, centroids.dtype, cosine=passes.cosine)
    else:
        relocate(found.sums, filled, passes.farthest(centroids, number))
    return filled
