"""Greedy k-means++: each centroid is the best of a few rows drawn by their squared distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.cluster.rows import select
from ssl_fast.ops import plus_plus as plus_plus_op

if TYPE_CHECKING:
    from ssl_fast.cluster.problem import Problem

__all__ = ["draw", "plus_plus", "trials"]

# Candidates drawn at a time: with so many the rows' own share of a sweep no longer matters.
_MOST = 512


def trials(n_clusters: int) -> int:
    """Candidates for each centroid: scikit-learn's number."""
    return 2 + int(math.log(n_clusters))


def draw(
    mass: Tensor,  # [B, N]
    count: int,
    generator: torch.Generator | None,
    lengths: Tensor | None,  # [B]
) -> Tensor:
    """Rows with a probability proportional to their mass, with replacement, [B, count]."""
    cumulated = mass.cumsum(1, dtype=torch.float64)
    at = torch.rand(
        mass.shape[0], count, generator=generator, dtype=torch.float64, device=mass.device
    )
    found = torch.searchsorted(cumulated, at * cumulated[:, -1:], right=True)
    # No mass at all, where every row stands on a centroid, ends behind the last row.
    last = mass.shape[1] - 1 if lengths is None else lengths[:, None] - 1
    return torch.minimum(found, torch.as_tensor(last, device=found.device))


def _count(made: int, n_clusters: int, rows: int, room: int, share: float) -> int:
    """How many candidates to draw at once.

    Early distances fall fast, and many of the rows drawn by them would be refused. A candidate is
    closer to about one row of ``made`` + 1 than all that is chosen.
    """
    each = trials(n_clusters)
    wanted = each * min(n_clusters - made, 1 + made // 2)
    fitting = int(share * room * (made + 1) / max(1, rows))
    return max(each, min(wanted, fitting // each * each, _MOST // each * each))


def plus_plus(
    problem: Problem,
    n_clusters: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The rows that greedy k-means++ chooses, [B, K].

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), each time with
    the best of ``2 + log(K)`` candidates. Candidates for several centroids are drawn at once: a row
    drawn by an older, larger distance is accepted with the ratio of the present distance to that
    one, which makes its probability the right one.
    """
    x = problem.x
    batch, rows = x.shape[:2]
    first = draw(problem.mass(), 1, generator, problem.lengths)
    if n_clusters == 1:
        return first
    closest = problem.nearest(select(x, first))[1].scatter_(1, first, 0.0)
    weight = problem.mass() if problem.weight is not None else None
    # What a problem has too many of goes to a last column.
    indices = first.new_zeros(batch, n_clusters + 1)
    indices[:, :1] = first
    made = torch.ones_like(first[:, 0])
    room = min(plus_plus_op.ROOM, max(1 << 16, plus_plus_op.ROOM // max(1, batch)))
    share = 0.7
    while (least := int(made.min()) if batch > 0 else n_clusters) < n_clusters:
        count = _count(least, n_clusters, rows, room, share)
        mass = closest if weight is None else closest * weight
        drawn = draw(mass, count, generator, problem.lengths)
        coins = torch.rand(drawn.shape, generator=generator, dtype=torch.float64, device=x.device)
        chosen = plus_plus_op.plus_plus(
            x, drawn, coins * closest.gather(1, drawn), closest, trials(n_clusters),
            wanted=n_clusters - made, x_scale=problem.x_scale, weight=weight,
            lengths=problem.lengths, room=min(room, rows * count), backend=problem.backend,
        )  # fmt: skip
        found = chosen >= 0
        places = made[:, None] + torch.arange(chosen.shape[1], device=x.device)
        indices.scatter_(1, torch.where(found, places, n_clusters), chosen)
        made += found.sum(1)
        # One choice of many candidates: they had no room.
        alone = chosen.shape[1] > 1 and int(made.min()) == least + 1
        share = max(0.05, share / 2) if alone else min(0.7, share * 1.25)
    return indices[:, :n_clusters]
