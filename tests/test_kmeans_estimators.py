"""KMeans and MiniBatchKMeans: scikit-learn's checks, and scikit-learn's results."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import sklearn.cluster
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ssl_fast.cluster import KMeans, MiniBatchKMeans, kmeans_assign

ESTIMATORS = {"KMeans": KMeans, "MiniBatchKMeans": MiniBatchKMeans}
# scikit-learn expects the same of its own: its draws go by the number of rows.
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": (
        "sample_weight is not equivalent to removing/repeating samples."
    )
}


@parametrize_with_checks(
    [
        KMeans(n_clusters=2, n_init=2, max_iter=5),
        MiniBatchKMeans(n_clusters=2, n_init=2, max_iter=5, batch_size=10),
    ],
    expected_failed_checks=lambda _: EXPECTED,
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(params=[np.float32, np.float64])
def data(request):
    x, _ = make_blobs(600, 6, centers=7, cluster_std=3.0, random_state=0)
    return x.astype(request.param) + 20


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("seed", [0, 1])
def test_kmeans_is_scikit_learns(data, init, seed, weighted):
    weight = np.random.RandomState(3).rand(len(data)) if weighted else None
    options = {"init": init, "n_init": 3, "random_state": seed}
    ours = KMeans(9, **options).fit(data, sample_weight=weight)
    theirs = sklearn.cluster.KMeans(9, **options).fit(data, sample_weight=weight)
    assert (ours.labels_ == theirs.labels_).all()
    assert ours.labels_.dtype == theirs.labels_.dtype
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.cluster_centers_.dtype == data.dtype
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4)
    np.testing.assert_allclose(ours.transform(data), theirs.transform(data), rtol=1e-3, atol=1e-3)
    assert (ours.predict(data) == theirs.predict(data)).all()
    assert ours.score(data, sample_weight=weight) == pytest.approx(
        theirs.score(data, sample_weight=weight), rel=1e-4
    )
    names = ours.get_feature_names_out()
    assert names.tolist() == [f"kmeans{k}" for k in range(9)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("options", [{}, {"tol": 1e-3}, {"init_size": 50, "batch_size": 32}])
def test_mini_batches_are_scikit_learns(data, init, options, weighted):
    weight = np.random.RandomState(3).rand(len(data)) if weighted else None
    options = {"init": init, "random_state": 0, "batch_size": 100, **options}
    ours = MiniBatchKMeans(9, **options).fit(data, sample_weight=weight)
    theirs = sklearn.cluster.MiniBatchKMeans(9, **options).fit(data, sample_weight=weight)
    assert (ours.labels_ == theirs.labels_).all()
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert (ours.n_iter_, ours.n_steps_) == (theirs.n_iter_, theirs.n_steps_)


def test_partial_fit_is_scikit_learns(data):
    ours = MiniBatchKMeans(9, random_state=0, reassignment_ratio=0.1)
    theirs = sklearn.cluster.MiniBatchKMeans(9, random_state=0, reassignment_ratio=0.1)
    for start in range(0, len(data), 60):
        ours.partial_fit(data[start : start + 60])
        theirs.partial_fit(data[start : start + 60])
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4)
    assert ours.n_steps_ == theirs.n_steps_ == 10
    assert (ours.labels_ == theirs.labels_).all()
    again = pickle.loads(pickle.dumps(ours))
    assert (again.partial_fit(data).labels_ == ours.partial_fit(data).labels_).all()


def test_arrays_and_callables_as_init(data):
    start = data[:9].copy()
    theirs = sklearn.cluster.KMeans(9, init=start, n_init=1).fit(data)
    given = []

    def chosen(X, n_clusters, random_state):
        given.append((X.mean(), n_clusters, random_state))
        return X[:n_clusters]

    for init in (start, start.tolist(), chosen):
        ours = KMeans(9, init=init, n_init=1, algorithm="elkan").fit(data)
        assert (ours.labels_ == theirs.labels_).all()
        assert ours.n_iter_ == theirs.n_iter_
    # As scikit-learn's callable, ours is given rows less their mean.
    assert abs(given[0][0]) < 1e-3
    with pytest.warns(RuntimeWarning, match="performing only one init in KMeans"):
        KMeans(9, init=start, n_init=5).fit(data)
    for wrong, words in ((start[:5], "number of clusters 9"), (start[:, :3], "features of the")):
        with pytest.raises(ValueError, match=words):
            KMeans(9, init=wrong, n_init=1).fit(data)
    assert MiniBatchKMeans(9, init=chosen, random_state=0).fit(data).inertia_ > 0.0


def test_labels_belong_to_the_centers():
    """Data far from the origin, and an end by max_iter."""
    x = np.random.RandomState(0).randn(5000, 4).astype(np.float32) + 100
    for max_iter in (1, 2, 300):
        model = KMeans(20, max_iter=max_iter, random_state=0).fit(x)
        exact = ((x[:, None].astype(np.float64) - model.cluster_centers_[None]) ** 2).sum(2)
        chosen = exact[np.arange(5000), model.labels_]
        assert (chosen <= exact.min(1) + 1e-5).all()
        assert model.inertia_ == pytest.approx(chosen.sum(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_tensors_in_tensors_out(name, dtype):
    x = torch.randn(200, 5, dtype=dtype)
    model = ESTIMATORS[name](4, random_state=0).fit(x, sample_weight=torch.rand(200))
    for given, kind in (
        (model.cluster_centers_, dtype),
        (model.labels_, torch.int64),
        (model.predict(x), torch.int64),
        (model.transform(x), dtype),
    ):
        assert isinstance(given, torch.Tensor)
        assert given.dtype is kind
    assert torch.equal(model.labels_, kmeans_assign(x, model.cluster_centers_)[0])
    if dtype in (torch.float32, torch.float64):
        arrays = ESTIMATORS[name](4, random_state=0)
        torch.manual_seed(0)
        assert (arrays.fit(x.numpy()).labels_ == clone(arrays).fit(x).labels_.numpy()).all()
        assert (model.predict(x.numpy()) == model.predict(x).numpy()).all()
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored.predict(x), model.predict(x))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_cosine_goes_by_directions(name):
    x = np.random.RandomState(0).randn(300, 4)
    scaled = x * np.random.RandomState(1).uniform(0.1, 10, (300, 1))
    options = {"n_clusters": 5, "metric": "cosine", "random_state": 0, "init": "k-means||"}
    model = ESTIMATORS[name](**options).fit(x)
    assert (model.predict(scaled) == model.labels_).all()
    np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1.0)
    distances = model.transform(scaled)
    assert (distances.argmin(1) == model.labels_).all()
    assert (distances.min(1) ** 2).sum() == pytest.approx(model.inertia_)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_composes(name, data):
    model = ESTIMATORS[name](3, n_init=1, random_state=0)
    pipeline = make_pipeline(StandardScaler(), model)
    assert pipeline.fit_transform(data).shape == (600, 3)
    assert clone(model).get_params() == model.get_params()
    assert (clone(model).fit_predict(data) == clone(model).fit(data).labels_).all()
    with pytest.raises(NotFittedError):
        clone(model).predict(data)


def test_verbose_and_callback(data, capsys):
    seen = []
    model = KMeans(4, n_init=2, random_state=0, verbose=1, callback=seen.append).fit(data)
    assert "KMeans 2/2" in capsys.readouterr().err
    assert {step.init for step in seen} == {1, 2}
    assert all(isinstance(step.cluster_centers, np.ndarray) for step in seen)
    assert any(np.allclose(step.cluster_centers, model.cluster_centers_) for step in seen)
    steps = []
    mini = MiniBatchKMeans(4, random_state=0, callback=steps.append).fit(data)
    assert len(steps) == mini.n_steps_


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_interrupted_fit_leaves_what_was(name, data):
    def stop(_):
        raise KeyboardInterrupt

    model = ESTIMATORS[name](3, random_state=0, callback=stop)
    with pytest.raises(KeyboardInterrupt):
        model.fit(data)
    assert set(vars(model)) == set(model.get_params())
    model.set_params(callback=None).fit(data)
    before = {key: pickle.dumps(value) for key, value in vars(model).items()}
    model.set_params(callback=stop)
    with pytest.raises(KeyboardInterrupt):
        model.fit(data[:, :4] * 2)
    model.set_params(callback=None)
    assert {key: pickle.dumps(value) for key, value in vars(model).items()} == before


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_clusters": 0}, ValueError, "n_clusters"),
        ({"n_clusters": 2.5}, TypeError, "n_clusters"),
        ({"n_clusters": 601}, ValueError, "n_samples=600 should be >= n_clusters=601"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"n_init": 0}, ValueError, "n_init"),
        ({"init": "best"}, ValueError, "init"),
        ({"metric": "l1"}, ValueError, "metric"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"callback": 3}, TypeError, "callback"),
    ],
)
def test_bad_parameters(name, change, error, words, data):
    with pytest.raises(error, match=words):
        ESTIMATORS[name](**change).fit(data)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_bad_data(name, kind):
    make = np.array if kind == "numpy" else torch.tensor
    model = ESTIMATORS[name](2, n_init=1)
    good = [[0.0, 1.0], [2.0, 3.0], [4.0, 6.0]]
    for bad, words in (
        ([1.0, 2.0, 3.0], "Expected 2D"),
        ([[float("nan"), 1.0], *good], "Input X contains NaN"),
        ([[float("inf"), 1.0], *good], "Input X contains infinity"),
        ([[], []], "0 feature"),
    ):
        with pytest.raises(ValueError, match=words):
            model.fit(make(bad))
    for weight, words in (([1.0, -1.0, 1.0], "Negative values"), ([1.0, 1.0], "expected"),
                          ([0.0] * 3, "non-zero"), ([float("nan")] * 3, "NaN")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.fit(make(good), sample_weight=make(weight))
    model.fit(make(good))
    with pytest.raises(ValueError, match="X has 3 features, but"):
        model.predict(make([[1.0, 2.0, 3.0]]))
    if kind == "tensor":
        with pytest.raises(TypeError, match="takes dense float32"):
            model.fit(torch.ones(3, 2, dtype=torch.int64))


def test_duplicates_warn():
    with pytest.warns(ConvergenceWarning, match=r"Number of distinct clusters \(2\)"):
        model = KMeans(3, random_state=0).fit(np.repeat([[0.0], [1.0]], 5, axis=0))
    assert np.isfinite(model.cluster_centers_).all()


def test_data_is_never_written():
    x = np.random.RandomState(0).randn(100, 3).astype(np.float32) + 50
    before = x.copy()
    x.flags.writeable = False
    for copy_x in (True, False):
        KMeans(3, copy_x=copy_x, random_state=0).fit(x)
    assert (x == before).all()


def test_ssl_fast_imports_no_scikit_learn():
    code = (
        "import sys, ssl_fast.cluster as c; assert 'sklearn' not in sys.modules\n"
        "sys.modules['sklearn'] = sys.modules['sklearn.base'] = None\n"
        "try: c.KMeans\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs scikit-learn: pip install ssl_fast[sklearn]" in done.stdout
