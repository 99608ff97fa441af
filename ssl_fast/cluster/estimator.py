"""What KMeans and MiniBatchKMeans share: reading arrays and tensors, and the fitted model's use."""

from __future__ import annotations

import copy
import warnings
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.cluster import scikit_init
from ssl_fast.cluster.checks import check_backend, check_metric
from ssl_fast.cluster.init import INITS, seed
from ssl_fast.cluster.problem import Problem
from ssl_fast.cluster.rows import all_finite, inverse_norms, parts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Base", "FitIteration", "Rows"]

WIDE = (torch.float32, torch.float64)


class FitIteration(NamedTuple):
    """What the ``callback`` of an estimator is given after each iteration."""

    init: int  # which of the n_init starts, from 1
    iteration: int  # from 1
    inertia: float  # of the centers before this iteration's update (of the batch, per row)
    shift: float  # the squared way of all centers in this iteration
    cluster_centers: Any  # [K, D], after the update; NumPy or tensor as the data


class Rows(NamedTuple):
    """Data as the ops take it, and how results go back."""

    x: Tensor  # [N, D]
    numpy: bool  # whether it came as an array

    def give(self, tensor: Tensor) -> Any:
        """A result in the kind of the data."""
        return tensor.numpy() if self.numpy else tensor

    def give_labels(self, labels: Tensor) -> Any:
        """Labels: int32 for arrays, as scikit-learn's, int64 for tensors."""
        return labels.to(torch.int32).numpy() if self.numpy else labels


class _Writable:
    """A read-only array (a memory map) under a flag that torch doesn't warn of; never written."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor on the array's memory."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable and array.size:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


def is_array(value: Any) -> bool:
    """Whether it holds numbers and isn't a name or a callable."""
    return not isinstance(value, str) and (
        isinstance(value, (Tensor, list, tuple)) or hasattr(value, "__array__")
    )


class Base(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """The parameters, checks and methods of both estimators."""

    n_clusters: int
    init: Any
    n_init: Any
    max_iter: int
    tol: float
    verbose: Any
    random_state: Any
    metric: str
    callback: Callable[[FitIteration], Any] | None
    backend: str | None
    cluster_centers_: Any
    fit: Callable[..., Any]  # the estimator's own

    def _number(self, name: str, kind: Any, minimum: float) -> None:
        """A parameter of the kind Integral or Real, at least ``minimum``."""
        value = getattr(self, name)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
            what = "an int" if kind is Integral else "a float"
            raise TypeError(
                f"The {name!r} parameter of {type(self).__name__} must be {what}; got {value!r}"
            )
        if not value >= minimum:
            raise ValueError(
                f"The {name!r} parameter of {type(self).__name__} must be at least {minimum:g}; "
                f"got {value!r}"
            )

    def _check_parameters(self) -> None:
        """What scikit-learn checks of the parameters, before any work."""
        self._number("n_clusters", Integral, 1)
        self._number("max_iter", Integral, 1)
        self._number("tol", Real, 0)
        if not (isinstance(self.n_init, str) and self.n_init == "auto"):
            self._number("n_init", Integral, 1)
        known = isinstance(self.init, str) and self.init in INITS
        if not (known or callable(self.init) or is_array(self.init)):
            names = ", ".join(map(repr, INITS))
            raise ValueError(
                f"The 'init' parameter of {type(self).__name__} must be one of {names}, a "
                f"callable or an array; got {self.init!r}"
            )
        check_metric(self.metric)
        check_backend(self.backend)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable; got {self.callback!r}")

    def _read(self, X: Any, *, fresh: bool) -> tuple[Rows, dict[str, Any]]:
        """The data checked, and the attributes that a fit learns from its shape.

        Nothing is set on ``self``, so that a fit that ends early leaves no trace.
        """
        if isinstance(X, Tensor):
            return self._read_tensor(X, fresh=fresh)
        probe = copy.copy(self)
        array = validate_data(
            probe, X, dtype=[np.float64, np.float32], order="C", reset=fresh,
            accept_large_sparse=False,
        )  # fmt: skip
        names = ("n_features_in_", "feature_names_in_")
        return (
            Rows(as_tensor(array), numpy=True),
            {name: vars(probe)[name] for name in names if name in vars(probe)},
        )

    def _read_tensor(self, X: Tensor, *, fresh: bool) -> tuple[Rows, dict[str, Any]]:
        name = type(self).__name__
        if X.layout is not torch.strided or X.dtype not in {*WIDE, torch.bfloat16, torch.float16}:
            raise TypeError(
                f"{name} takes dense float32, float64, bfloat16 or float16 tensors; got {X.dtype} "
                f"with layout {X.layout}"
            )
        if X.dim() != 2:
            raise ValueError(f"Expected 2D tensor, got {X.dim()}D tensor instead.")
        if 0 in X.shape:
            what = "sample" if X.shape[0] == 0 else "feature"
            raise ValueError(
                f"Found array with 0 {what}(s) (shape={tuple(X.shape)}) while a minimum of 1 is "
                f"required by {name}."
            )
        x = X.detach().resolve_neg()
        if x.device.type == "cpu" and not all_finite(x[None]):
            if bool(x.isnan().any()):
                raise ValueError(
                    f"Input X contains NaN.\n{name} does not accept missing values encoded as NaN "
                    "natively."
                )
            raise ValueError(f"Input X contains infinity or a value too large for {x.dtype}.")
        if not fresh and x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {x.shape[1]} features, but {name} is expecting {self.n_features_in_} "
                "features as input."
            )
        return Rows(x, numpy=False), {"n_features_in_": x.shape[1]}

    def _weights(self, sample_weight: Any, rows: Rows) -> Tensor | None:
        """Weights as a wide tensor [N]; None where all are the same 1."""
        if sample_weight is None:
            return None
        x = rows.x
        wide = accumulation_dtype(x)
        if isinstance(sample_weight, Real):
            weight = torch.full((len(x),), float(sample_weight), dtype=wide, device=x.device)
        elif isinstance(sample_weight, Tensor):
            weight = sample_weight.detach().to(device=x.device, dtype=wide)
        else:
            array = np.asarray(sample_weight, dtype=np.float64)
            weight = torch.tensor(array, dtype=wide, device=x.device)
        if weight.dim() != 1:
            raise ValueError("Sample weights must be 1D array or scalar")
        if len(weight) != len(x):
            raise ValueError(f"sample_weight.shape == {tuple(weight.shape)}, expected {(len(x),)}!")
        if weight.device.type == "cpu":
            if not bool(weight.isfinite().all()):
                raise ValueError("Input sample_weight contains NaN or infinity.")
            if bool((weight < 0.0).any()):
                raise ValueError("Negative values in data passed to `sample_weight`.")
            if not bool((weight > 0.0).any()):
                raise ValueError("Sample weights must contain at least one non-zero number.")
        return weight

    def _starts(self, default: int) -> int:
        """How many starts to make."""
        if is_array(self.init):
            if self.n_init not in ("auto", 1):
                warnings.warn(
                    "Explicit initial center position passed: performing only one init in "
                    f"{type(self).__name__} instead of n_init={self.n_init}.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return 1
        if self.n_init != "auto":
            return int(self.n_init)
        return default if callable(self.init) or self.init == "random" else 1

    def _check_centers(self, shape: tuple[int, ...], depth: int) -> None:
        if len(shape) != 2 or shape[0] != self.n_clusters:
            raise ValueError(
                f"The shape of the initial centers {shape} does not match the number of clusters "
                f"{self.n_clusters}."
            )
        if shape[1] != depth:
            raise ValueError(
                f"The shape of the initial centers {shape} does not match the number of features "
                f"of the data {depth}."
            )

    def _centers_given(self, given: Any, x: Tensor) -> Tensor:
        """Centers from an array or a callable, in the dtype and on the device of x."""
        if isinstance(given, Tensor):
            centers = given.detach()
        else:
            centers = torch.from_numpy(np.array(given, dtype=np.float64))
        self._check_centers(tuple(centers.shape), x.shape[1])
        if centers.device.type == "cpu" and not bool(centers.isfinite().all()):
            raise ValueError("The initial centers contain NaN or infinity.")
        return centers.to(device=x.device, dtype=x.dtype, copy=True).contiguous()

    def _init_centers(
        self,
        rows: Rows,
        weight: Tensor | None,  # [N]
        init: Any,
        random_state: Any,
        shift: Tensor | None = None,  # [D]
    ) -> Tensor:
        """Centers [K, D] to start from, with scikit-learn's use of the random state."""
        x = rows.x
        if isinstance(init, Tensor):
            return init.clone()
        if callable(init):
            made = init(rows.give(x), self.n_clusters, random_state=random_state)
            return self._centers_given(made, x)
        host = torch.ones(len(x), dtype=accumulation_dtype(x)) if weight is None else weight.cpu()
        mass = host.numpy()
        if init == "random":
            chosen = random_state.choice(
                len(x), size=self.n_clusters, replace=False, p=mass / mass.sum()
            )
            return x[torch.from_numpy(chosen).to(x.device)]
        small = (
            scikit_init.products(len(x), x.shape[1], self.n_clusters) <= scikit_init.MOST_PRODUCTS
        )
        plain = x.device.type == "cpu" and x.dtype in WIDE and self.metric == "euclidean"
        if init == "k-means++" and plain and small:
            indices = scikit_init.plus_plus(
                x.numpy(), self.n_clusters, mass, random_state,
                None if shift is None else shift.numpy(),
            )  # fmt: skip
            return x[torch.from_numpy(indices)]
        generator = torch.Generator(x.device)
        generator.manual_seed(int(random_state.randint(2**31 - 1)))
        return seed(self._problem(x, weight), self.n_clusters, init, generator)[0]

    def _problem(self, x: Tensor, weight: Tensor | None = None) -> Problem:
        """The rows as a batch of one problem."""
        given = None if weight is None else weight[None]
        return Problem.of(x[None], self.metric, given, None, self.backend)

    def _beside_centers(self, rows: Rows) -> tuple[Rows, Tensor]:
        """The data and the fitted centers on its device, in the wider of both dtypes."""
        centers = self.cluster_centers_
        if not isinstance(centers, Tensor):
            centers = as_tensor(centers)
        dtype = torch.promote_types(rows.x.dtype, centers.dtype)
        wide = rows._replace(x=rows.x.to(dtype))
        return wide, centers.to(device=rows.x.device, dtype=dtype)

    def _fitted(self, X: Any) -> tuple[Rows, Tensor]:
        check_is_fitted(self)
        rows, _ = self._read(X, fresh=False)
        return self._beside_centers(rows)

    def predict(self, X: Any) -> Any:
        """The index of the closest center for each row, [N]; ties go to the lowest."""
        rows, centers = self._fitted(X)
        labels, _ = self._problem(rows.x).nearest(centers[None], distances=False)
        return rows.give_labels(labels[0])

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # noqa: ARG002
        """Fit and give ``labels_``."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # noqa: ARG002
        """Fit and give the distances of the same rows."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def transform(self, X: Any) -> Any:
        """The distance of each row from each center, [N, K] (what this gives is that matrix)."""
        rows, centers = self._fitted(X)
        x = rows.x
        wide = accumulation_dtype(x)
        cosine = self.metric == "cosine"
        points = centers.to(wide)
        if cosine:
            points = points * inverse_norms(centers[None])[0].unsqueeze(1)
        found = x.new_empty(len(x), len(points))
        for _, part in parts(1, len(x), max(x.shape[1], len(points))):
            chunk = x[part].to(wide)
            if cosine:
                chunk = chunk * inverse_norms(x[None, part])[0].unsqueeze(1)
            # From differences: close to a center, and far from the origin, they keep their digits.
            found[part] = torch.cdist(
                chunk, points, compute_mode="donot_use_mm_for_euclid_dist"
            ).to(x.dtype)
        return rows.give(found)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: ARG002
        """Minus the inertia of the rows."""
        rows, centers = self._fitted(X)
        problem = self._problem(rows.x, self._weights(sample_weight, rows))
        return -float(problem.total(problem.nearest(centers[None])[1]))

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def _learn(self, **learned: Any) -> None:
        """Set what a fit found, all at once, in place of what another fit had."""
        self.__dict__.pop("feature_names_in_", None)
        self.__dict__.update(learned)

    def _random(self) -> Any:
        return check_random_state(self.random_state)
