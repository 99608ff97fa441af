"""KMeans: scikit-learn's estimator on the ops of ssl_fast."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ssl_fast.cluster.centering import Centered, center
from ssl_fast.cluster.estimator import WIDE, Base, FitIteration, Rows, is_array
from ssl_fast.cluster.lloyd import Iteration, KMeansResult, Rules, run
from ssl_fast.cluster.progress import Progress
from ssl_fast.cluster.streaming import fit_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ssl_fast.cluster.problem import Problem

__all__ = ["KMeans"]


def same_clustering(a: Tensor, b: Tensor, n_clusters: int) -> bool:
    """Whether the labels of one clustering are those of the other by other numbers."""
    name = torch.zeros(n_clusters, dtype=torch.int64, device=a.device)
    name[a] = b
    return bool((name[a] == b).all())


class KMeans(Base):
    """``sklearn.cluster.KMeans`` on the kernels of ssl_fast, for NumPy arrays and for tensors.

    Parameters, attributes and methods are scikit-learn's, and with the same data, ``init`` and
    ``random_state`` so are labels and inertia, to rounding. Arrays give arrays; a tensor gives
    tensors of its dtype on its device (labels int64). float64 data runs on the reference; float32,
    bfloat16 and float16 on the kernels.

    Args:
        n_clusters: K.
        init: "k-means++" (greedy), "k-means||", "random", centers [K, D], or a callable
            ``init(X, n_clusters, random_state=...)``, which as in scikit-learn is given rows less
            their mean (float32 and float64).
        n_init: starts to make, of which the one with the least inertia is kept; "auto" is 1, and 10
            for "random" and a callable.
        max_iter: the most iterations of a start.
        tol: a start has converged when the squared way of its centers in an iteration is at most
            this times the mean variance of the features.
        verbose: show a progress bar (of tqdm where installed, else lines) on stderr.
        random_state: None, an int, or a RandomState. k-means++ makes scikit-learn's draws for up to
            2**34 multiplications (N D K log K), for more of them draws of its own.
        copy_x: False forgoes the copy of X less its mean, which is made of data up to 16 MiB, and
            of larger data whose mean is more than twice as long as its deviation. X is never
            modified.
        algorithm: "lloyd" or "elkan", whose results are the same; both run Lloyd's iterations.
        metric: "euclidean", or "cosine" (see ``batched_kmeans``).
        callback: called with a ``FitIteration`` (init, iteration, inertia, shift, cluster_centers)
            after each iteration.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Attributes:
        cluster_centers_: [K, D].
        labels_: [N], of the centers returned.
        inertia_: the weighted sum of squared distances from the closest centers.
        n_iter_: iterations of the start kept.
        n_features_in_: D.
        feature_names_in_: the columns' names, where X had them.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: Any = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: Any = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
        metric: str = "euclidean",
        callback: Callable[[FitIteration], Any] | None = None,
        backend: str | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.metric = metric
        self.callback = callback
        self.backend = backend

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.algorithm not in ("lloyd", "elkan"):
            raise ValueError(
                "The 'algorithm' parameter of KMeans must be 'lloyd' or 'elkan'; "
                f"got {self.algorithm!r}"
            )
        if self.algorithm == "elkan" and self.n_clusters == 1:
            warnings.warn(
                "algorithm='elkan' doesn't make sense for a single cluster. Using 'lloyd' instead.",
                RuntimeWarning,
                stacklevel=3,
            )

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:  # noqa: ARG002
        """Cluster the rows of X [N, D], which ``sample_weight`` [N] weighs."""
        self._check_parameters()
        rows, learned = self._read(X, fresh=True)
        if len(rows.x) < self.n_clusters:
            raise ValueError(f"n_samples={len(rows.x)} should be >= n_clusters={self.n_clusters}.")
        starts = self._starts(10)
        random_state = self._random()
        weight = self._weights(sample_weight, rows)
        init = self._centers_given(self.init, rows.x) if is_array(self.init) else self.init
        variance = self._problem(rows.x).moments().variance
        centered = center(
            rows.x, float(variance), asked=callable(init),
            allowed=self.copy_x and self.metric == "euclidean" and rows.x.dtype in WIDE,
        )  # fmt: skip
        if isinstance(init, Tensor) and centered.mean is not None:
            init -= centered.mean
        best = self._best(rows, centered, weight, init, (starts, random_state, variance))
        result = _given_back(self._problem(centered.x, weight), best, centered.mean)
        labels = result.labels[0]
        self._warn_of_few(labels)
        self._learn(
            **learned,
            cluster_centers_=rows.give(result.centroids[0]),
            labels_=rows.give_labels(labels),
            inertia_=float(result.inertia),
            n_iter_=int(result.n_iter),
        )
        return self

    def _warn_of_few(self, labels: Tensor) -> None:
        """As scikit-learn warns where clusters are without rows."""
        distinct = int((torch.bincount(labels, minlength=self.n_clusters) > 0).sum())
        if distinct < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters "
                f"({self.n_clusters}). Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _best(
        self,
        rows: Rows,
        centered: Centered,
        weight: Tensor | None,  # [N]
        init: Any,
        plan: tuple[int, Any, Tensor],
    ) -> KMeansResult:
        """The best of the starts, as scikit-learn chooses it."""
        starts, random_state, variance = plan
        problem = self._problem(centered.x, weight)
        best: KMeansResult | None = None
        for start in range(1, starts + 1):
            centers = self._init_centers(
                Rows(centered.x, rows.numpy), weight, init, random_state, centered.shift
            )
            title = f"{type(self).__name__} {start}/{starts}"
            with Progress(title, self.max_iter, shown=bool(self.verbose)) as progress:
                rules = Rules(
                    self.max_iter, self.tol * variance, variance.sqrt(),
                    callback=self._reporter(rows, centered.mean, start, progress),
                    as_scikit_learn=True,
                )  # fmt: skip
                found = run(problem, centers[None], rules)
            # Rounding can make the same clusters a little better.
            if best is None or (
                float(found.inertia) < float(best.inertia)
                and not same_clustering(found.labels[0], best.labels[0], self.n_clusters)
            ):
                best = found
        if best is None:
            raise ValueError(f"n_init must be at least 1; got {starts}")
        return best

    def _reporter(
        self, rows: Rows, mean: Tensor | None, start: int, progress: Progress
    ) -> Callable[[Iteration], None] | None:
        """What is called after each iteration; None where nobody looks."""
        if self.callback is None and not self.verbose:
            return None

        def report(step: Iteration) -> None:
            inertia, shift = float(step.inertia), float(step.shift)
            progress.step(step.iteration, inertia=inertia, shift=shift)
            if self.callback is not None:
                centers = step.centroids[0] if mean is None else step.centroids[0] + mean
                given = rows.give(centers.clone())
                self.callback(FitIteration(start, step.iteration, inertia, shift, given))

        return report

    def fit_batches(self, batches: Iterable[Any]) -> KMeans:
        """``fit`` on the rows of all batches, of which one at a time is in memory.

        Exact: every iteration goes over all batches once, adding sums and counts, and with the same
        first centers the result is that of ``fit`` on their concatenation. ``init`` by name or
        callable starts from a uniform sample of 64 rows for each cluster. ``labels_`` are in the
        order of the batches.

        Args:
            batches: what can be iterated over again and again (a DataLoader that doesn't shuffle, a
                list of arrays, an object that reads files), giving [n, D] arrays or tensors, or
                tuples and lists whose first item is one.
        """
        self._check_parameters()
        self._learn(**fit_batches(self, batches, self._starts(1)))
        return self


def _given_back(problem: Problem, found: KMeansResult, mean: Tensor | None) -> KMeansResult:
    """The clustering with the mean added to its centers again.

    That rounds the centers, so that the rows are assigned again to what they have become.
    """
    if mean is None:
        return found
    centers = found.centroids + mean
    rounded = centers - mean
    if torch.equal(rounded, found.centroids):
        return found._replace(centroids=centers)
    labels, distances = problem.nearest(rounded)
    return found._replace(labels=labels, centroids=centers, inertia=problem.total(distances))
