"""MiniBatchKMeans: scikit-learn's estimator on the ops of ssl_fast."""

from __future__ import annotations

import copy
import math
import warnings
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.cluster.estimator import Base, FitIteration, Rows, as_tensor, is_array
from ssl_fast.cluster.lloyd import shift_of
from ssl_fast.cluster.progress import Progress
from ssl_fast.cluster.scikit_init import draws

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MiniBatchKMeans"]


class _Sizes(NamedTuple):
    """Rows of a batch, and of the samples that inits are made from and judged by."""

    batch: int
    init: int


class _Convergence:
    """scikit-learn's rules for an early end, on a moving average of the batches' inertia."""

    def __init__(self, rows: int, batch: int, threshold: float, patience: int | None) -> None:
        self.weight = min(2.0 * batch / (rows + 1), 1.0)
        self.threshold, self.patience = threshold, patience
        self.average: float | None = None
        self.lowest: float | None = None
        self.waited = 0

    def reached(self, step: int, inertia: float, shift: float) -> bool:
        """Whether to stop after ``step``, from 1; the first only shows what the init was worth."""
        if step == 1:
            return False
        if self.average is None:
            self.average = inertia
        else:
            self.average = self.average * (1.0 - self.weight) + inertia * self.weight
        if self.threshold > 0.0 and shift <= self.threshold:
            return True
        if self.lowest is None or self.average < self.lowest:
            self.lowest, self.waited = self.average, 0
        else:
            self.waited += 1
        return self.patience is not None and self.waited >= self.patience


class _State:
    """Centers between two batches, and what their next update needs."""

    def __init__(self, model: MiniBatchKMeans, centers: Tensor, counts: Tensor, since: int) -> None:
        self.model, self.centers, self.counts, self.since = model, centers, counts, since

    def step(self, x: Tensor, weight: Tensor | None, batch: int, random_state: Any) -> float:
        """Take in the rows of one batch; give their inertia for the centers before."""
        model = self.model
        self.since += batch
        reassign = bool((self.counts == 0.0).any()) or self.since >= 10 * model.n_clusters
        if reassign:
            self.since = 0
        problem = model._problem(x, weight)
        _, distances, sums, counts = problem.lloyd(self.centers[None], None, distances=True)
        total = self.counts + counts[0]
        joined = self.centers.double() * self.counts[:, None] + sums[0]
        touched = (counts[0] > 0.0)[:, None]
        if model.metric == "cosine":
            joined = torch.nn.functional.normalize(joined, dim=1)
        else:
            joined = joined / total[:, None]
        self.centers = torch.where(touched, joined.to(self.centers.dtype), self.centers)
        self.counts = total
        if reassign and model.reassignment_ratio > 0:
            self._reassign(x, random_state)
        return float(problem.total(distances))

    def _reassign(self, x: Tensor, random_state: Any) -> None:
        """Put centers that few rows have come to on rows of the batch."""
        counts = self.counts
        chosen = counts < self.model.reassignment_ratio * counts.max()
        # At most half of the batch become centers.
        most = int(0.5 * len(x))
        if int(chosen.sum()) > most:
            chosen[counts.argsort(stable=True)[most:]] = False
        if bool(chosen.all()):
            chosen[counts.argmax()] = False  # a ratio above 1 spares none
        number = int(chosen.sum())
        if number == 0:
            return
        rows = random_state.choice(len(x), replace=False, size=number)
        centers = self.centers.clone()
        centers[chosen] = x[torch.from_numpy(rows).to(x.device)]
        # Not so small that they would be put elsewhere at once.
        self.counts = torch.where(chosen, counts[~chosen].min(), counts)
        self.centers = centers


class MiniBatchKMeans(Base):
    """``sklearn.cluster.MiniBatchKMeans`` on the kernels of ssl_fast, for arrays and for tensors.

    Sculley, "Web-scale k-means clustering" (2010). Parameters, attributes and methods are
    scikit-learn's, and so are its draws from ``random_state``; see ``KMeans`` for what ``init``,
    ``metric``, ``callback``, ``verbose`` and ``backend`` take, and for arrays and tensors.

    Args:
        n_clusters: K.
        init: as for ``KMeans``; X less its mean plays no part here.
        max_iter: the most passes over the data, in number of rows.
        batch_size: rows in a batch of ``fit``.
        verbose: show a progress bar on stderr.
        compute_labels: whether a fit ends with labels and inertia of all rows.
        random_state: None, an int, or a RandomState.
        tol: stop when the squared way of the centers in a batch is at most this times the mean
            variance of the features; 0 never does.
        max_no_improvement: stop after so many batches in a row without a lower average inertia;
            None never does.
        init_size: rows that an init is made from; None is three batches.
        n_init: inits to choose from; "auto" is 1, and 3 for "random" and a callable.
        reassignment_ratio: a center with less than this part of the largest count is put elsewhere.
        metric: "euclidean" or "cosine".
        callback: called with a ``FitIteration`` after each batch of ``fit``.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Attributes:
        cluster_centers_: [K, D].
        labels_: [N], where labels are computed.
        inertia_: the weighted sum of squared distances from the closest centers; an estimate where
            labels aren't computed.
        n_iter_: passes over the data, begun ones included.
        n_steps_: batches taken in.
        n_features_in_: D.
        feature_names_in_: the columns' names, where X had them.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        max_iter: int = 100,
        batch_size: int = 1024,
        verbose: Any = 0,
        compute_labels: bool = True,
        random_state: Any = None,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        init_size: int | None = None,
        n_init: Any = "auto",
        reassignment_ratio: float = 0.01,
        metric: str = "euclidean",
        callback: Callable[[FitIteration], Any] | None = None,
        backend: str | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.verbose = verbose
        self.compute_labels = compute_labels
        self.random_state = random_state
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.init_size = init_size
        self.n_init = n_init
        self.reassignment_ratio = reassignment_ratio
        self.metric = metric
        self.callback = callback
        self.backend = backend

    def _check_parameters(self) -> None:
        super()._check_parameters()
        self._number("batch_size", Integral, 1)
        self._number("reassignment_ratio", Real, 0)
        if self.max_no_improvement is not None:
            self._number("max_no_improvement", Integral, 0)
        if self.init_size is not None:
            self._number("init_size", Integral, 1)

    def _sizes(self, rows: int) -> _Sizes:
        batch = min(self.batch_size, rows)
        size = self.init_size
        if size is None:
            size = 3 * batch
            if size < self.n_clusters:
                size = 3 * self.n_clusters
        elif size < self.n_clusters:
            warnings.warn(
                f"init_size={size} should be larger than n_clusters={self.n_clusters}. Setting it "
                "to min(3*n_clusters, n_samples)",
                RuntimeWarning,
                stacklevel=3,
            )
            size = 3 * self.n_clusters
        return _Sizes(batch, min(size, rows))

    def _begin(self, X: Any, sample_weight: Any, *, fresh: bool) -> Any:
        """Rows, what is learned from their shape, weights and the init, all checked."""
        self._check_parameters()
        rows, learned = self._read(X, fresh=fresh)
        if fresh and len(rows.x) < self.n_clusters:
            raise ValueError(f"n_samples={len(rows.x)} should be >= n_clusters={self.n_clusters}.")
        weight = self._weights(sample_weight, rows)
        init = self.init
        if fresh and is_array(init):
            init = self._centers_given(init, rows.x)
        return rows, learned, weight, init

    def _sampled(
        self, rows: Rows, weight: Tensor | None, init: Any, size: int, random_state: Any
    ) -> Tensor:
        """Centers made from ``size`` of the rows."""
        if size < len(rows.x):
            index = torch.from_numpy(random_state.randint(0, len(rows.x), size))
            index = index.to(rows.x.device)
            rows = rows._replace(x=rows.x[index])
            weight = None if weight is None else weight[index]
        return self._init_centers(rows, weight, init, random_state)

    def _best_init(
        self, rows: Rows, weight: Tensor | None, init: Any, size: int, random_state: Any
    ) -> Tensor:
        """Of ``n_init`` inits the one with the least inertia on some rows."""
        starts = self._starts(3)
        index = torch.from_numpy(random_state.randint(0, len(rows.x), size)).to(rows.x.device)
        judged = self._problem(rows.x[index], None if weight is None else weight[index])
        best: tuple[float, Tensor] | None = None
        for _ in range(starts):
            centers = self._sampled(rows, weight, init, size, random_state)
            inertia = float(judged.total(judged.nearest(centers[None])[1]))
            if best is None or inertia < best[0]:
                best = inertia, centers
        if best is None:
            raise ValueError(f"n_init must be at least 1; got {starts}")
        return best[1]

    def _assigned(self, rows: Rows, weight: Tensor | None, centers: Tensor) -> dict[str, Any]:
        problem = self._problem(rows.x, weight)
        labels, distances = problem.nearest(centers[None])
        return {
            "labels_": rows.give_labels(labels[0]),
            "inertia_": float(problem.total(distances)),
        }

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> MiniBatchKMeans:  # noqa: ARG002
        """Cluster the rows of X [N, D] by batches drawn from them by ``sample_weight`` [N]."""
        rows, learned, weight, init = self._begin(X, sample_weight, fresh=True)
        x, total = rows.x, len(rows.x)
        sizes = self._sizes(total)
        random_state = self._random()
        threshold = 0.0
        if self.tol > 0:
            threshold = self.tol * float(self._problem(x).moments().variance)
        centers = self._best_init(rows, weight, init, sizes.init, random_state)
        state = _State(
            self, centers, torch.zeros(len(centers), dtype=torch.float64, device=x.device), 0
        )
        mass = torch.ones(total, dtype=x.dtype) if weight is None else weight.cpu()
        if mass.dtype not in (torch.float32, torch.float64):
            mass = mass.float()
        cumulated = (mass / mass.sum()).double().numpy().cumsum()
        cumulated /= cumulated[-1]
        convergence = _Convergence(total, sizes.batch, threshold, self.max_no_improvement)
        steps = self.max_iter * total // sizes.batch
        step, inertia = 0, 0.0
        with Progress(type(self).__name__, steps, shown=bool(self.verbose)) as progress:
            for step in range(1, steps + 1):
                index = torch.from_numpy(draws(random_state, cumulated, sizes.batch))
                before = state.centers
                # Batches are drawn by the weights, which so have had their part.
                inertia = state.step(x[index.to(x.device)], None, sizes.batch, random_state)
                inertia /= sizes.batch
                shift = float(shift_of(state.centers[None], before[None])[0])
                progress.step(step, inertia=inertia, shift=shift)
                if self.callback is not None:
                    given = rows.give(state.centers.clone())
                    self.callback(FitIteration(1, step, inertia, shift, given))
                if convergence.reached(step, inertia, shift):
                    break
        found = {
            **learned,
            "cluster_centers_": rows.give(state.centers),
            "n_steps_": step,
            "n_iter_": math.ceil(step * sizes.batch / total),
            "_counts": rows.give(state.counts),
            "_n_since_last_reassign": state.since,
            "_batch_size": sizes.batch,
        }
        if self.compute_labels:
            found |= self._assigned(rows, weight, state.centers)
        else:
            average = convergence.average if convergence.average is not None else inertia
            found["inertia_"] = average * (total if weight is None else float(weight.sum()))
        for stale in ("labels_", "_random_state"):
            self.__dict__.pop(stale, None)
        self._learn(**found)
        return self

    def partial_fit(
        self,
        X: Any,
        y: Any = None,  # noqa: ARG002
        sample_weight: Any = None,
    ) -> MiniBatchKMeans:
        """Take in the rows of X [n, D] as one batch; the first call also makes the centers."""
        fresh = not hasattr(self, "cluster_centers_")
        rows, learned, weight, init = self._begin(X, sample_weight, fresh=fresh)
        device = rows.x.device
        known = vars(self).get("_random_state")
        # A copy: an interrupted call leaves the state where it was.
        random_state = self._random() if known is None else copy.deepcopy(known)
        if fresh:
            self._starts(3)
            batch, size = self._sizes(len(rows.x))
            centers = self._sampled(rows, weight, init, size, random_state)
            counts = torch.zeros(len(centers), dtype=torch.float64, device=device)
            state = _State(self, centers, counts, 0)
        else:
            kept, batch = self._counts, self._batch_size
            kept = kept if isinstance(kept, Tensor) else as_tensor(kept)
            rows, centers = self._beside_centers(rows)
            state = _State(self, centers, kept.to(device), self._n_since_last_reassign)
        state.step(rows.x, weight, batch, random_state)
        found = {
            **learned,
            "cluster_centers_": rows.give(state.centers),
            "_counts": rows.give(state.counts),
            "_n_since_last_reassign": state.since,
            "_batch_size": batch,
            "_random_state": random_state,
            "n_steps_": vars(self).get("n_steps_", 0) + 1,
        }
        if self.compute_labels:
            found |= self._assigned(rows, weight, state.centers)
        self._learn(**found)
        return self
