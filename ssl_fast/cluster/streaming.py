"""Exact k-means of rows that don't fit into memory: passes over batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssl_fast.cluster.centering import worth_centering
from ssl_fast.cluster.empty import Farthest, farthest
from ssl_fast.cluster.estimator import WIDE, FitIteration, Rows, is_array
from ssl_fast.cluster.passes import PassIteration, Sums, iterate
from ssl_fast.cluster.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ssl_fast.cluster.kmeans import KMeans

__all__ = ["fit_batches"]

# Rows for each cluster in the sample that the first centers are chosen from.
_SAMPLE = 64


class _Batches:
    """The batches, checked as they come."""

    def __init__(self, model: KMeans, batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator) or not hasattr(batches, "__iter__"):
            raise TypeError(
                "batches must be iterable again and again, like a list or a DataLoader; got "
                f"{type(batches).__name__}"
            )
        self.model, self.batches = model, batches
        self.cosine = model.metric == "cosine"
        self.first: Rows | None = None
        self.learned: dict[str, Any] = {}
        self.mean: Tensor | None = None  # what is taken from all rows
        self.total = 0
        self.labels: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        """Each batch's rows [n, D] less the mean."""
        total = 0
        for batch in self.batches:
            given = batch[0] if isinstance(batch, (tuple, list)) and is_array(batch[0]) else batch
            rows, learned = self.model._read(given, fresh=True)
            if self.first is None:
                self.first, self.learned = Rows(rows.x[:0].clone(), rows.numpy), learned
                if is_array(self.model.init):
                    self.model._centers_given(self.model.init, rows.x)  # before a pass over all
            expected, x = self.first.x, rows.x
            same = x.dtype is expected.dtype and x.device == expected.device
            if not same or x.shape[1] != expected.shape[1] or rows.numpy != self.first.numpy:
                raise ValueError(
                    f"batches must all be like the first, {expected.dtype} with "
                    f"{expected.shape[1]} columns on {expected.device}; got {x.dtype} "
                    f"{tuple(x.shape)} on {x.device}"
                )
            total += len(x)
            yield x if self.mean is None else x - self.mean
        if self.total and total != self.total:
            raise RuntimeError(
                f"batches gave {self.total} rows in the first pass and {total} in a later one"
            )
        self.total = total

    def sums(self, centroids: Tensor) -> Sums:
        """A pass that assigns the rows and adds them up."""
        # Each batch's are let go once they have been used.
        known, self.labels = self.labels[::-1], []
        sums = torch.zeros_like(centroids, dtype=torch.float64)
        counts = sums.new_zeros(len(sums))
        inertia = sums.new_zeros(())
        for x in self:
            problem = self.model._problem(x)
            previous = problem.hint(known.pop() if known else None, centroids[None])
            if previous is not None:
                # Of batches in another order they are a poor hint, no more.
                previous = previous[None].long() if len(previous) == len(x) else None
            labels, distances, more, rows = problem.lloyd(
                centroids[None], None, distances=True, previous=previous
            )
            self.labels.append(labels[0].to(torch.int32))
            sums += more[0]
            counts += rows[0]
            inertia += problem.total(distances)[0]
        return Sums(sums, counts, inertia)

    def farthest(self, centroids: Tensor, count: int) -> Farthest:
        """A pass that finds the rows farthest from their centroids."""
        best: Farthest | None = None
        for x, labels in zip(self, self.labels, strict=True):
            found = farthest(
                self.model._problem(x), centroids[None], labels[None].to(torch.int64), count
            )
            if best is not None:
                found = Farthest(*(torch.cat(pair) for pair in zip(best, found, strict=True)))
            best = found.best(count)
        if best is None:
            raise ValueError("batches must hold at least one batch; got none")
        return best

    def survey(self, count: int, random_state: Any) -> tuple[Tensor, float, Tensor]:
        """The first pass: the mean [D], the mean variance, and a uniform sample of the rows.

        The sample is Vitter's reservoir (1985): row i replaces one of those kept with the
        probability count / i.
        """
        mean: Tensor | None = None
        squares, seen = 0.0, 0
        kept: Tensor | None = None
        for x in self:
            moments = self.model._problem(x).moments()
            squares += len(x) * float(moments.variance) * x.shape[1]
            if mean is None:
                mean = torch.zeros_like(moments.mean[0])
                kept = x.new_empty(count, x.shape[1])
            if kept is None:
                break
            off = moments.mean[0] - mean
            squares += float(off.square().sum()) * seen * len(x) / (seen + len(x))
            mean = mean + off * (len(x) / (seen + len(x)))
            _refill(kept, x, seen, random_state)
            seen += len(x)
        if mean is None or kept is None:
            raise ValueError("batches must hold at least one batch; got none")
        return mean, squares / (seen * len(mean)), kept[: min(count, seen)]


def _refill(kept: Tensor, x: Tensor, seen: int, random_state: Any) -> None:
    """Let the rows x, which come after ``seen`` others, into the reservoir."""
    straight = min(max(len(kept) - seen, 0), len(x))
    kept[seen : seen + straight] = x[:straight]
    after = np.arange(seen + straight, seen + len(x))
    if len(after) == 0:
        return
    places = (random_state.random_sample(len(after)) * (after + 1)).astype(np.int64)
    winners = np.flatnonzero(places < len(kept))
    # Of several rows for one place the last has it.
    last = dict(zip(places[winners].tolist(), winners.tolist(), strict=True))
    if last:
        to = torch.tensor(list(last.keys()), device=kept.device)
        source = torch.tensor(list(last.values()), device=kept.device) + straight
        kept[to] = x[source]


def _first_centers(model: KMeans, batches: _Batches, sample: Tensor, random_state: Any) -> Tensor:
    """The centers [K, D] to start from, less the mean."""
    if is_array(model.init):
        centers = model._centers_given(model.init, sample)
        return centers if batches.mean is None else centers - batches.mean
    rows = sample if batches.mean is None else sample - batches.mean
    numpy = batches.first is not None and batches.first.numpy
    return model._init_centers(Rows(rows, numpy), None, model.init, random_state)


def fit_batches(model: KMeans, given: Iterable[Any], starts: int) -> dict[str, Any]:
    """What ``KMeans.fit_batches`` learns."""
    batches = _Batches(model, given)
    random_state = model._random()
    count = 1 if is_array(model.init) else _SAMPLE * model.n_clusters
    mean, variance, sample = batches.survey(count, random_state)
    if batches.total < model.n_clusters:
        raise ValueError(f"n_samples={batches.total} should be >= n_clusters={model.n_clusters}.")
    first = batches.first
    if first is None:
        raise ValueError("batches must hold at least one batch; got none")
    bytes_ = batches.total * sample.shape[1] * sample.element_size()
    if (
        model.metric == "euclidean"
        and sample.dtype in WIDE
        and (callable(model.init) or worth_centering(bytes_, mean, variance))
    ):
        batches.mean = mean.to(sample.dtype)
    best: Any = None
    for start in range(1, starts + 1):
        centers = _first_centers(model, batches, sample, random_state)
        title = f"{type(model).__name__} {start}/{starts}"
        with Progress(title, model.max_iter, shown=bool(model.verbose)) as progress:

            def report(
                step: PassIteration, start: int = start, progress: Progress = progress
            ) -> None:
                progress.step(step.iteration, inertia=step.inertia, shift=step.shift)
                if model.callback is not None:
                    at = step.centroids if batches.mean is None else step.centroids + batches.mean
                    now = first.give(at.clone())
                    model.callback(
                        FitIteration(start, step.iteration, step.inertia, step.shift, now)
                    )

            found = iterate(
                batches, centers, max_iter=model.max_iter, threshold=model.tol * variance,
                spread=variance**0.5, empty="relocate", callback=report,
            )  # fmt: skip
        if best is None or found.inertia < best[0].inertia:
            best = found, torch.cat(batches.labels)
    outcome, labels = best
    centers, inertia = outcome.centroids, outcome.inertia
    if batches.mean is not None:
        centers = centers + batches.mean
        rounded = centers - batches.mean
        if not torch.equal(rounded, outcome.centroids):
            inertia = float(batches.sums(rounded).inertia)
            labels = torch.cat(batches.labels)
    model._warn_of_few(labels)
    return {
        **batches.learned,
        "cluster_centers_": first.give(centers),
        "labels_": first.give_labels(labels if first.numpy else labels.to(torch.int64)),
        "inertia_": inertia,
        "n_iter_": outcome.n_iter,
    }
