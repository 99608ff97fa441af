"""k-means beside the fused ones of other packages."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import ssl_fast
from benchmarks.gpu import peers
from benchmarks.gpu.races import EAGER, OURS, Race, Side, Step, faster_than

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.findings import Place

DTYPE = torch.float16
# Of the mean squared distance of a sample, and of the centroids: fp16 scores decide some rows
# between two centroids that are as near.
SAME = 2e-2
SAMPLE = 65536
EAGER_ROWS = 2**18


class Problem(NamedTuple):
    """Rows, centroids, and the backend of ours."""

    x: Tensor  # [B, N, D]
    centroids: Tensor  # [B, K, D]
    backend: str | None


def _problem(place: Place, batch: int, rows: int, clusters: int, dim: int) -> Problem:
    made = torch.Generator(place.device).manual_seed(0)
    shape = max(1, batch // place.scale), max(32, rows // place.scale**2)
    count, width = max(4, clusters // place.scale**2), max(8, dim // place.scale)
    centroids, x = (
        torch.randn(shape[0], n, width, generator=made, device=place.device, dtype=DTYPE)
        for n in (count, shape[1])
    )
    return Problem(x, centroids, place.served)


def _assign(problem: Problem) -> Step:
    return lambda: ssl_fast.kmeans_assign(
        problem.x, problem.centroids, backend=problem.backend
    )[:1]  # fmt: skip


def _assign_eager(problem: Problem) -> Step:
    """The nearest by the product and the norms, as many rows at a time as leave memory."""
    half = problem.centroids.float().square().sum(2) / 2

    def step() -> Sequence[Tensor]:
        parts = [
            torch.cat([(norms - (rows @ c.T).float()).argmin(1) for rows in x.split(EAGER_ROWS)])
            for x, c, norms in zip(problem.x, problem.centroids, half, strict=True)
        ]
        return (torch.stack(parts),)

    return step


def _assign_flash(problem: Problem) -> Step:
    assign = peers.flash_assign(problem.x, problem.centroids)
    return lambda: (assign(),)


def mean_distance(problem: Problem, labels: Tensor) -> float:
    """The mean squared distance of some rows of the first problem from the centroids chosen."""
    rows = problem.x[0, :SAMPLE].double()
    return float((rows - problem.centroids[0, labels[0, :SAMPLE].long()]).square().sum(1).mean())


def as_near(ours: Sequence[Tensor], other: Sequence[Tensor], problem: Problem) -> float:
    """How much the labels' mean distances differ: equally near centroids may be chosen."""
    near, there = (mean_distance(problem, found[0]) for found in (ours, other))
    return abs(there - near) / near


def _iteration(problem: Problem) -> Step:
    x, centroids, backend = problem.x, problem.centroids, problem.backend

    def step() -> Sequence[Tensor]:
        labels, _ = ssl_fast.kmeans_assign(x, centroids, backend=backend)
        means, _ = ssl_fast.kmeans_update(
            x, labels, centroids.shape[1], previous=centroids, backend=backend
        )
        return labels, means

    return step


def _iteration_eager(problem: Problem) -> Step:
    assign = _assign_eager(problem)
    x, centroids = problem.x, problem.centroids

    def step() -> Sequence[Tensor]:
        (labels,) = assign()
        sums = torch.zeros(centroids.shape, device=x.device)
        counts = torch.zeros(centroids.shape[:2], device=x.device)
        for rows, own, total, count in zip(x, labels, sums, counts, strict=True):
            total.index_add_(0, own, rows.float())
            count.index_add_(0, own, torch.ones_like(own, dtype=torch.float32))
        means = sums / counts.clamp(min=1.0).unsqueeze(2)
        return labels, torch.where((counts > 0).unsqueeze(2), means, centroids).to(x.dtype)

    return step


def _iteration_flash(problem: Problem) -> Step:
    return peers.flash_iteration(problem.x, problem.centroids)


def _iteration_fast(problem: Problem) -> Step:
    step = peers.fast_iteration(problem.x[0], problem.centroids.shape[1])

    def batched() -> Sequence[Tensor]:
        labels, centroids = step()
        return labels[None], centroids[None]

    return batched


def means_of_labels(_: Sequence[Tensor], found: Sequence[Tensor], problem: Problem) -> float:
    """How far the centroids are from the means of their labels, in float64.

    fastkmeans draws its first centroids itself: what can be held against it is its own update.
    """
    labels, means = found[0][0].long(), found[1][0].double()
    sums, counts = torch.zeros_like(means), means.new_zeros(len(means))
    for rows, own in zip(problem.x[0].split(2**20), labels.split(2**20), strict=True):
        sums.index_add_(0, own, rows.double())
        counts.index_add_(0, own, torch.ones_like(own, dtype=torch.float64))
    used = counts > 0
    exact = sums[used] / counts[used, None]
    return float((means[used] - exact).norm() / exact.norm())


RACES = (
    Race(
        "k-means assign, 32 problems of 131072x128, K=1000, fp16",
        lambda place: _problem(place, 32, 131072, 1000, 128),
        (
            Side(OURS, _assign),
            Side(EAGER, _assign_eager),
            Side(peers.FLASH, _assign_flash, peer=True),
        ),
        (faster_than(peers.FLASH, 1.0),),
        as_near,
        SAME,
    ),
    Race(
        "one Lloyd iteration, 4194304x128, K=1024, fp16",
        lambda place: _problem(place, 1, 2**22, 1024, 128),
        (
            Side(OURS, _iteration),
            Side(EAGER, _iteration_eager),
            Side(peers.FLASH, _iteration_flash, peer=True),
            Side(peers.FAST, _iteration_fast, peer=True),
        ),
        (faster_than(peers.FLASH, 1.0), faster_than(peers.FAST, 1.0)),
        means_of_labels,
        SAME,
        bytes=24 * 2**30,
    ),
)
