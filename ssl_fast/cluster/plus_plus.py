"""Greedy k-means++: each centroid is the best of a few rows drawn by their squared distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast.cluster.rows import parts, select
from ssl_fast.ops.registration import without_autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ssl_fast.cluster.problem import Problem

__all__ = ["draw", "plus_plus", "trials"]

# Distances kept between candidates and all rows. At N = 100 000 this is 64 candidates in fp32 and a
# copy of 8, and a product of 64 rows has 4 times the speed of one of 8. At N = 1 000 000 none are.
_STORE_BYTES = 28 << 20
_MOST = 128


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


class _Candidates:
    """Rows of each problem, and their squared distances from all rows."""

    def __init__(
        self,
        problem: Problem,
        norms: Tensor,  # [B, N]
        indices: Tensor,  # [B, T]
    ) -> None:
        self.problem, self.norms, self.indices = problem, norms, indices
        self.rows = problem.scaled_rows(indices, norms.dtype)  # [B, T, D]
        self.own_norms = norms.gather(1, indices).unsqueeze(2)  # [B, T, 1]

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Problems and rows to take at once: 16 384 rows at D = 128.

        Few of them, since torch's threads wait for each other after every operation.
        """
        batch, count, depth = self.rows.shape
        return parts(batch, self.norms.shape[1], max(1, max(count, depth) // 8))

    def distances(self, problems: slice, part: slice, out: Tensor) -> Tensor:
        """Of one chunk, [b, T, n]; rounding can leave a little less than 0."""
        x, scale = self.problem.x[problems, part], self.problem.x_scale
        rows, norms = self.rows[problems], self.norms[problems, part].unsqueeze(1)
        if scale is None:
            base = norms.expand(-1, rows.shape[1], -1)
            torch.baddbmm(base, rows, x.to(rows.dtype).mT, alpha=-2.0, out=out)
        else:
            torch.bmm(rows, x.to(rows.dtype).mT, out=out)
            out.mul_(-2.0 * scale[problems, part].unsqueeze(1)).add_(norms)
        out.add_(self.own_norms[problems])
        if self.problem.lengths is not None:
            places = torch.arange(part.start, part.stop, device=out.device)
            padding = places >= self.problem.lengths[problems, None]
            out.masked_fill_(padding.unsqueeze(1), 0.0)
        return out

    def all_distances(self) -> Tensor:
        """[B, T, N]."""
        found = self.norms.new_empty(*self.indices.shape, self.norms.shape[1])
        for problems, part in self.chunks():
            self.distances(problems, part, found[problems, :, part])
        return found

    def potentials(self, closest: Tensor, weight: Tensor | None) -> Tensor:
        """What the potential would be with each candidate, [B, T]; no distance is kept."""
        batch, count = self.indices.shape
        found = closest.new_zeros(batch, count, dtype=torch.float64)
        for problems, part in self.chunks():
            near = closest[problems, part].unsqueeze(1)
            capped = self.distances(problems, part, near.new_empty(len(near), count, near.shape[2]))
            torch.minimum(capped, near, out=capped)
            if weight is not None:
                capped *= weight[problems, part].unsqueeze(1)
            found[problems] += capped.sum(2)
        return found


class _Chosen:
    """The centroids so far, and each row's squared distance from the closest of them."""

    def __init__(self, problem: Problem, first: Tensor) -> None:
        self.problem = problem
        self.indices = [first]
        self.weight = problem.mass() if problem.weight is not None else None
        self.closest = self._distances(first)

    def _distances(self, index: Tensor) -> Tensor:
        """From one row of each problem, [B, N]."""
        return self.problem.nearest(select(self.problem.x, index))[1]

    def mass(self) -> Tensor:
        """What rows are drawn by; rounding has left no distance below 0."""
        self.closest.clamp_(min=0.0)
        return self.closest if self.weight is None else self.closest * self.weight

    def add(self, index: Tensor, distances: Tensor | None = None) -> None:
        """A row of each problem [B, 1], and its distances from all rows where they are known."""
        if distances is None:
            distances = self._distances(index)
        self.indices.append(index)
        torch.minimum(self.closest, distances, out=self.closest)
        self.closest.scatter_(1, index, 0.0)


def plus_plus(
    problem: Problem,
    n_clusters: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The rows that greedy k-means++ chooses, [B, K].

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), each time with
    the best of ``2 + log(K)`` candidates. Candidates for several centroids are drawn and compared
    with all rows at once, in one product: a row drawn by an older, larger distance is accepted with
    the ratio of the present distance to that one, which makes its probability the right one.
    """
    x = problem.x
    mass = problem.mass()
    chosen = _Chosen(problem, draw(mass, 1, generator, problem.lengths))
    del mass
    if n_clusters == 1:
        return chosen.indices[0]
    norms = problem.norms()
    each = trials(n_clusters)
    room = _STORE_BYTES // max(1, x.shape[0] * x.shape[1] * norms.element_size()) - each
    with without_autocast(x.device.type):
        while len(chosen.indices) < n_clusters:
            made = len(chosen.indices)
            # Early distances fall fast, and many of the rows drawn by them would be refused.
            wanted = each * min(n_clusters - made, 1 + made // 4)
            count = max(each, min(wanted, room // 8 * 8, _MOST))
            drawn = draw(chosen.mass(), count, generator, problem.lengths)
            candidates = _Candidates(problem, norms, drawn)
            if room < each:
                potentials = candidates.potentials(chosen.closest, chosen.weight)
                chosen.add(drawn.gather(1, potentials.argmin(1, keepdim=True)))
            else:
                _choose(chosen, candidates, each, n_clusters, generator)
    return torch.cat(chosen.indices, dim=1)


def _choose(
    chosen: _Chosen,
    candidates: _Candidates,
    each: int,
    n_clusters: int,
    generator: torch.Generator | None,
) -> None:
    """Choose from the candidates until too few are left."""
    drawn, distances = candidates.indices, candidates.all_distances()
    firsts = torch.arange(drawn.shape[0], device=drawn.device)[:, None] * drawn.shape[1]
    flat = distances.flatten(0, 1)
    coins = torch.rand(drawn.shape, generator=generator, dtype=torch.float64, device=drawn.device)
    limits = coins * chosen.closest.gather(1, drawn)
    free = torch.ones_like(drawn, dtype=torch.bool)
    while len(chosen.indices) < n_clusters:
        accepted = free & (limits <= chosen.closest.gather(1, drawn))
        # The first round finds all accepted; it goes on at least that far.
        if not bool((accepted.sum(1) >= each).all()):
            break
        tried = (~accepted).to(torch.uint8).argsort(dim=1, stable=True)[:, :each]
        free.scatter_(1, tried, value=False)
        capped = flat.index_select(0, (firsts + tried).flatten()).view(*tried.shape, flat.shape[1])
        torch.minimum(capped, chosen.closest.unsqueeze(1), out=capped)
        if chosen.weight is not None:
            capped *= chosen.weight.unsqueeze(1)
        best = tried.gather(1, capped.sum(2).argmin(1, keepdim=True))
        chosen.add(drawn.gather(1, best), flat.index_select(0, (firsts + best)[:, 0]))
