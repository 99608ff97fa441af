"""Lloyd's iterations for a batch of problems, each of which stops when it has converged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.backends.reference.sums import row_squares
from ssl_fast.cluster.empty import farthest, relocate, split
from ssl_fast.cluster.problem import Problem, means
from ssl_fast.cluster.rows import parts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Iteration", "KMeansResult", "Rules", "better", "fill_empty", "run", "shift_of"]


class KMeansResult(NamedTuple):
    """Clusterings; labels, inertia and counts are those of the centroids returned."""

    labels: Tensor  # [..., N] int64, -1 for padding
    centroids: Tensor  # [..., K, D]
    inertia: Tensor  # [...] float64
    counts: Tensor  # [..., K]: the weight of the rows of each cluster
    n_iter: Tensor  # [...] int64


class Iteration(NamedTuple):
    """What a callback is given after each iteration."""

    iteration: int  # from 1
    inertia: Tensor  # [B] float64, of the centroids before this iteration's update
    shift: Tensor  # [B] float64: the squared way of all centroids in this iteration
    centroids: Tensor  # [B, K, D], after the update


class Rules(NamedTuple):
    """How a run of iterations goes."""

    max_iter: int
    threshold: Tensor  # [B] float64: a problem whose shift is no larger has converged
    spread: Tensor  # [B] float64: the standard deviation of the data
    empty: str = "relocate"
    callback: Callable[[Iteration], Any] | None = None
    as_scikit_learn: bool = False


def fill_empty(
    problem: Problem,
    centroids: Tensor,  # [B, K, D]
    labels: Tensor,  # [B, N]
    sums: Tensor,  # [B, K, D]
    counts: Tensor,  # [B, K]
    active: Tensor,  # [B]
    rules: Rules,
) -> Tensor:
    """Apply the policy for empty clusters to the sums; give the counts to divide them by."""
    if rules.empty == "keep":
        return counts
    emptied = active & (counts == 0.0).any(1)
    if not bool(emptied.any()):
        return counts
    filled = counts.clone()
    for index in emptied.nonzero()[:, 0].tolist():
        if rules.empty == "split":
            split(
                sums[index], filled[index], rules.spread[index], problem.x.dtype,
                cosine=problem.cosine,
            )  # fmt: skip
            continue
        number = int((counts[index] == 0.0).sum())
        far = farthest(
            problem.one(index), centroids[index : index + 1], labels[index : index + 1], number,
            as_scikit_learn=rules.as_scikit_learn,
        )  # fmt: skip
        relocate(sums[index], filled[index], far)
    return filled


def shift_of(
    new: Tensor,  # [B, K, D]
    old: Tensor,  # [B, K, D]
) -> tuple[Tensor, Tensor]:
    """The squared way of all centroids of a problem, float64 [B], and whether any moved at all."""
    wide = accumulation_dtype(new)
    ways = new.new_empty(new.shape[:2], dtype=torch.float64)
    largest = new.new_empty(new.shape[:2], dtype=wide)
    for problems, part in parts(*new.shape):
        moved = new[problems, part].to(wide) - old[problems, part].to(wide)
        ways[problems, part] = row_squares(moved)
        largest[problems, part] = moved.abs_().amax(2)
    return ways.sum(1), (largest != 0.0).any(1)


def _keep(active: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """``new`` where a problem is active; ``old`` is None where all are."""
    if old is None:
        return new
    chosen = active.view(-1, *[1] * (new.dim() - 1))
    return torch.where(chosen, new, old, out=new)


def run(
    problem: Problem,
    centroids: Tensor,  # [B, K, D]
    rules: Rules,
) -> KMeansResult:
    """Iterate from the centroids given.

    A problem that has stopped is given no rows any more, and keeps what it has. Labels that stay
    the same make the same sums and so the same centroids: a shift of 0, which is always within the
    threshold, stands for them.
    """
    x = problem.x
    full = problem.lengths
    if full is None:
        full = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    active = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    moved, n_iter = torch.zeros_like(active), torch.zeros_like(full)
    labels: Tensor | None = None
    counts: Tensor | None = None
    inertia: Tensor | None = None
    everywhere = True
    watched = rules.callback is not None
    for iteration in range(1, rules.max_iter + 1):
        previous = problem.hint(labels, centroids)
        if everywhere:
            labels = counts = None  # frees the labels before the new ones are made
        lengths = problem.lengths if everywhere else torch.where(active, full, 0)
        found, distances, sums, weights = problem.lloyd(centroids, lengths, watched, previous)
        del previous
        filled = fill_empty(problem, centroids, found, sums, weights, active, rules)
        new = means(sums, filled, centroids, problem.cosine)
        del sums  # as large as all that is made until the next ones
        labels, counts = _keep(active, found, labels), _keep(active, weights, counts)
        del found
        shift, changed = shift_of(new, centroids)
        moved = torch.where(active, changed, moved)
        centroids = new if everywhere else torch.where(active[:, None, None], new, centroids)
        n_iter = n_iter + active
        if rules.callback is not None:
            inertia = _keep(active, problem.total(distances), inertia)
            rules.callback(Iteration(iteration, inertia.clone(), shift.clone(), centroids.clone()))
        # Else they would still be there when the next ones are made.
        del distances, weights, filled, new
        active = active & (shift > rules.threshold)
        remaining = int(active.sum())
        if remaining == 0:
            break
        everywhere = everywhere and remaining == len(active)
    known = [labels, counts]
    del labels, counts  # _finish frees them before it makes new ones
    return _finish(problem, centroids, full, moved, known, n_iter)


def _finish(
    problem: Problem,
    centroids: Tensor,  # [B, K, D]
    full: Tensor,  # [B]
    moved: Tensor,  # [B]
    known: list[Tensor | None],  # labels [B, N] and counts [B, K], taken out
    n_iter: Tensor,  # [B]
) -> KMeansResult:
    """Assign the rows of problems whose centroids moved after their labels were made."""
    counts, labels = known.pop(), known.pop()
    number = int(moved.sum())
    distances = None
    if number or labels is None or counts is None:
        everywhere = number == len(moved)
        previous = problem.hint(labels, centroids)
        if everywhere:
            labels = counts = None
        lengths = problem.lengths if everywhere else torch.where(moved, full, 0)
        found, distances, _, weights = problem.lloyd(centroids, lengths, everywhere, previous)
        labels, counts = _keep(moved, found, labels), _keep(moved, weights, counts)
        if not everywhere:
            distances = None
    if distances is None:
        distances = problem.distances_to(centroids, labels)
    return KMeansResult(labels, centroids, problem.total(distances), counts, n_iter)


def better(new: KMeansResult, old: KMeansResult | None) -> KMeansResult:
    """For each problem the clustering with the smaller inertia, of equal ones the old."""
    if old is None:
        return new
    wins = new.inertia < old.inertia
    return KMeansResult(
        *(
            torch.where(wins.view(-1, *[1] * (a.dim() - 1)), a, b)
            for a, b in zip(new, old, strict=True)
        )
    )
