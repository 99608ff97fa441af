"""distributed_kmeans: one clustering of the rows of all processes of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.cluster.batched import check_callback, check_generator
from ssl_fast.cluster.checks import (
    accept_rows,
    accept_weight,
    check_backend,
    check_choice,
    check_count,
    check_finite,
    check_metric,
    check_real,
)
from ssl_fast.cluster.empty import POLICIES, Farthest, farthest
from ssl_fast.cluster.init import accept_init, seed
from ssl_fast.cluster.lloyd import KMeansResult
from ssl_fast.cluster.passes import PassIteration, Sums, iterate
from ssl_fast.cluster.problem import Problem
from ssl_fast.cluster.rows import all_finite

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["distributed_kmeans"]

# Rows for each cluster that rank 0 chooses the first centroids from.
_SAMPLE = 64


class _Shards:
    """Each process has some of the rows; what is asked for is that of all."""

    def __init__(self, problem: Problem, group: Any) -> None:
        self.problem, self.group = problem, group
        self.cosine = problem.cosine
        self.labels = torch.empty(0)
        self.size = dist.get_world_size(group)

    def add(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, of the same shape on each, one below the other."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts)

    def sums(self, centroids: Tensor) -> Sums:
        known = self.labels if self.labels.dim() == 2 else None
        previous = self.problem.hint(known, centroids[None])
        labels, distances, sums, counts = self.problem.lloyd(
            centroids[None], None, distances=True, previous=previous
        )
        self.labels = labels
        inertia = self.problem.total(distances)
        packed = self.add(torch.cat([sums.flatten(), counts.flatten(), inertia]))
        size, number = sums.numel(), counts.numel()
        total, weights = packed[:size], packed[size : size + number]
        return Sums(total.view_as(sums[0]), weights, packed[-1])

    def farthest(self, centroids: Tensor, count: int) -> Farthest:
        own = farthest(self.problem, centroids[None], self.labels, count)
        missing = count - len(own.distances)
        padded = (torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1) + [0, missing]) for x in own)
        return Farthest(*(self.gather(part) for part in padded)).best(count)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The number of all rows, and the mean over the features of their variances."""
        own = self.problem.moments()
        depth = own.mean.shape[1]
        packed = self.add(torch.cat([own.rows, (own.rows[:, None] * own.mean)[0]]))
        rows = packed[0]
        off = (own.mean[0] - packed[1:] / rows).square().sum() / depth
        squares = self.add(own.rows * (own.variance + off))
        return rows, squares[0] / rows

    def sample(self, count: int, generator: torch.Generator | None) -> Problem:
        """About ``count`` rows of all processes, from each as many as its share of the rows."""
        x = self.problem.x
        own = torch.tensor([x.shape[1]], device=x.device)
        sizes = self.gather(own)
        total = int(sizes.sum())
        shares = (sizes * count + total - 1) // total
        shares = torch.minimum(shares, sizes)
        order = torch.randperm(x.shape[1], generator=generator, device=x.device)
        index = order[: int(shares[dist.get_rank(self.group)])]
        width = int(shares.max())
        mass = self.problem.mass()[0, index]
        rows = torch.nn.functional.pad(x[0, index], [0, 0, 0, width - len(index)])
        mass = torch.nn.functional.pad(mass, [0, width - len(index)])
        kept = (torch.arange(width, device=x.device) < shares[:, None]).flatten()
        rows, mass = self.gather(rows)[kept], self.gather(mass)[kept]
        metric = "cosine" if self.cosine else "euclidean"
        return Problem.of(rows[None], metric, mass[None], None, self.problem.backend)


def distributed_kmeans(
    x: Tensor,  # [N, D]
    n_clusters: int,
    *,
    init: str | Tensor | Callable[..., Any] = "k-means++",
    max_iter: int = 300,
    tol: float = 1e-4,
    sample_weight: Tensor | None = None,  # [N]
    metric: str = "euclidean",
    empty: str = "relocate",
    generator: torch.Generator | None = None,
    callback: Callable[[PassIteration], Any] | None = None,
    group: Any = None,
    backend: str | None = None,
) -> KMeansResult:
    """``batched_kmeans`` of the rows of all processes of ``group``, each bringing its share.

    An iteration exchanges one sum of K (D + 1) + 1 float64 numbers. With the same first centroids
    the result is that of one process with all rows, to rounding. All processes make the call with
    the same options.

    Args:
        x: [N, D], this process's rows; every process has the same D, and any N from 0.
        n_clusters: K, at most the number of all rows.
        init: centroids [K, D], of which those of the group's first process are taken; or a name or
            a callable as for ``batched_kmeans``, which that process applies to a sample of all
            rows, 64 for each cluster.
        max_iter: as for ``batched_kmeans``.
        tol: as for ``batched_kmeans``.
        sample_weight: [N], not negative.
        metric: as for ``batched_kmeans``.
        empty: as for ``batched_kmeans``.
        generator: where the sample and ``init`` take their random numbers from.
        callback: called on every process with a ``PassIteration`` (iteration, inertia, shift,
            centroids) after each.
        group: a process group that this process is a member of; None is the default group.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Returns:
        KMeansResult: labels int64 [N] of this process's rows; centroids [K, D], inertia, counts [K]
        and n_iter of all rows, the same on every process.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that don't fit, an option out of range; on a CPU, NaN or infinity in x,
            also in that of another process.
        RuntimeError: torch.distributed isn't initialised, or ``backend`` can't serve this call.
    """
    accept_rows("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, D]; got {tuple(x.shape)}")
    n_clusters = check_count("n_clusters", n_clusters)
    max_iter, tol = check_count("max_iter", max_iter), check_real("tol", tol)
    check_metric(metric)
    check_choice("empty", empty, POLICIES)
    check_backend(backend)
    check_generator(generator, x)
    check_callback(callback)
    weight = accept_weight("sample_weight", sample_weight, x)
    start = accept_init(init, (), (n_clusters, x.shape[1]), x)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("distributed_kmeans needs torch.distributed.init_process_group first")
    with torch.no_grad():
        _check_all_finite(x, group)
        shards = _Shards(Problem.of(x.detach()[None], metric, weight, None, backend), group)
        rows, variance = shards.moments()
        if int(rows) < n_clusters:
            raise ValueError(
                f"n_clusters must be at most the number of all rows, {int(rows)}; got {n_clusters}"
            )
        if isinstance(start, Tensor):
            # the broadcast writes into it
            centroids = start[0].clone(memory_format=torch.contiguous_format)
        else:
            sample = shards.sample(_SAMPLE * n_clusters, generator)
            centroids = x.new_empty(n_clusters, x.shape[1])
            if dist.get_rank(group) == 0:
                centroids = seed(sample, n_clusters, start, generator)[0].contiguous()
        dist.broadcast(centroids, group=group, group_src=0)
        found = iterate(
            shards, centroids, max_iter=max_iter, threshold=tol * float(variance),
            spread=float(variance) ** 0.5, empty=empty, callback=callback,
        )  # fmt: skip
    return KMeansResult(
        shards.labels[0],
        found.centroids,
        torch.tensor(found.inertia, dtype=torch.float64, device=x.device),
        found.counts.to(accumulation_dtype(x)),
        torch.tensor(found.n_iter, device=x.device),
    )


def _check_all_finite(x: Tensor, group: Any) -> None:
    """``check_finite`` that raises on every process where one has to: none waits for another."""
    if x.device.type != "cpu":
        return
    bad = torch.tensor([float(not all_finite(x[None]))])
    dist.all_reduce(bad, group=group)
    if bool(bad):
        check_finite("x", x[None])
        raise ValueError("x must be finite; that of another process contains NaN or infinity")
