"""k-means at the ends of its range: equal, huge, tiny and wide rows, and hostile arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ssl_fast
from ssl_fast import batched_kmeans, kmeans_assign, kmeans_update

NAN = float("nan")


@pytest.fixture
def x():
    return torch.randn(120, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [3, 1000])
def test_equal_float64_rows_are_not_exchanged_for_ever(count):
    """The mean of equal rows is off by a rounding, which is no distance to relocate a row for."""
    values = torch.tensor([[0.1], [0.7]], dtype=torch.float64).repeat_interleave(count, 0)
    found = batched_kmeans(values, 4, init=values[[0, -1, -1, -1]])
    assert int(found.n_iter) <= 3
    assert float(found.inertia) < 1e-24 * count


@pytest.mark.parametrize("scale", [1e19, 1e-25])
def test_squares_beyond_fp32_do_not_end_the_iterations(x, scale):
    start = x[:5].clone()
    expected = batched_kmeans(x, 5, init=start)
    found = batched_kmeans(x * scale, 5, init=start * scale)
    assert int(expected.n_iter) > 2
    assert int(found.n_iter) > 2


def test_wide_rows_have_the_same_bits_on_any_number_of_threads(dtype):
    x = torch.randn(16, 150528, generator=torch.Generator().manual_seed(0)).to(dtype)
    results, shifts = [], []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found = batched_kmeans(
            x, 2, init=x[:2], max_iter=2, callback=lambda step: shifts.append(step.shift)
        )
        cosine = batched_kmeans(x, 1, init=x[:1], max_iter=2, metric="cosine")
        results.append((found, cosine, kmeans_assign(x[:1], x[:1] * 0.5, metric="cosine")))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    each = len(shifts) // len(results)
    assert all(torch.equal(shifts[i], shifts[i % each]) for i in range(len(shifts)))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (torch.full((3, 4), NAN), ValueError, "what init returns must be finite"),
        ("a", TypeError, "init must return centroids of real numbers; got 'a'"),
        (None, TypeError, "init must return centroids of real numbers; got None"),
        (torch.zeros(3, 4, dtype=torch.complex64), TypeError, "init must return centroids of real"),
    ],
)
def test_what_a_callable_init_returns_is_checked(x, made, error, message):
    with pytest.raises(error, match=message):
        batched_kmeans(x, 3, init=lambda *_, **__: made)


def test_other_arguments_are_checked(x):
    with pytest.raises(TypeError, match="init must be one of"):
        batched_kmeans(x, 3, init=x[:3].to(torch.complex64))
    labels = torch.zeros(len(x), dtype=torch.int64)
    with pytest.raises(ValueError, match="previous must be finite"):
        kmeans_update(x, labels, 2, previous=torch.full((2, 4), NAN))


def test_weights_of_padding_are_never_read(x):
    lengths = torch.tensor([100])
    weight = torch.ones(1, 120)
    weight[0, 100:] = NAN
    options = {"init": x[:3].clone(), "lengths": lengths}
    found = batched_kmeans(x[None], 3, sample_weight=weight, **options)
    expected = batched_kmeans(x[None], 3, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_callback_sees_the_inertia_of_problems_that_have_stopped(x):
    problems = torch.stack([x, x[:1].expand_as(x)])
    steps = []
    found = batched_kmeans(
        problems, 3, init=problems[:, :3].clone(), empty="keep", tol=0.0, callback=steps.append
    )
    assert int(found.n_iter[0]) > int(found.n_iter[1]) + 1
    turned = batched_kmeans(problems.flip(0), 3, init=problems.flip(0)[:, :3].clone(), tol=0.0)
    assert turned.inertia[1] == found.inertia[0]
    steps = []
    blobs = torch.stack([x, x + 50 * (torch.arange(120) % 3)[:, None]])
    batched_kmeans(blobs, 3, init=blobs[:, :3].clone(), tol=0.0, callback=steps.append)
    assert all(float(step.inertia[1]) > 1.0 for step in steps)


def test_a_callback_cannot_change_the_result(x):
    def spoil(step):
        step.centroids.zero_()
        step.shift.zero_()
        step.inertia.zero_()

    found = batched_kmeans(x, 3, init=x[:3], callback=spoil)
    expected = batched_kmeans(x, 3, init=x[:3])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class _Counted:
    def __init__(self, batches):
        self.batches, self.read = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.read += 1
            yield batch


class TestEstimators:
    @pytest.fixture(autouse=True)
    def _estimators(self):
        pytest.importorskip("sklearn")

    def test_fitted_centers_keep_their_digits_beside_narrower_rows(self, x):
        model = ssl_fast.KMeans(3, random_state=0).fit(1000.0 + 0.01 * x)
        rows = (1000.0 + 0.01 * x).bfloat16()
        expected = torch.cdist(rows.double(), model.cluster_centers_.double()).argmin(1)
        assert torch.equal(model.predict(rows), expected)
        wide = ssl_fast.KMeans(3, random_state=0).fit(1e5 * x)
        assert len(wide.predict((1e5 * x).clamp(-6e4, 6e4).half()).unique()) == 3
        stream = ssl_fast.MiniBatchKMeans(3, random_state=0).partial_fit(x)
        assert stream.partial_fit(x.half()).cluster_centers_.dtype is torch.float32

    def test_negative_views_are_rows_like_others(self, x):
        found = ssl_fast.KMeans(3, random_state=0).fit(torch._neg_view(x))
        assert torch.equal(found.labels_, ssl_fast.KMeans(3, random_state=0).fit(-x).labels_)

    @pytest.mark.parametrize(
        "init",
        [torch.zeros(2, 4), torch.zeros(3, 5), torch.full((3, 4), NAN)],
        ids=lambda init: str(tuple(init.shape)),
    )
    def test_fit_batches_checks_centers_before_it_reads_on(self, x, init):
        batches = _Counted(x.split(20))
        with pytest.raises(ValueError, match="initial centers"):
            ssl_fast.KMeans(3, init=init).fit_batches(batches)
        assert batches.read == 1

    def test_fit_batches_warns_of_clusters_without_rows(self):
        from sklearn.exceptions import ConvergenceWarning

        rows = np.repeat([[0.0], [1.0]], 20, axis=0)
        with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\)"):
            ssl_fast.KMeans(4, random_state=0).fit_batches([rows[:15], rows[15:]])

    def test_a_reassignment_ratio_above_1(self, x):
        model = ssl_fast.MiniBatchKMeans(
            3, reassignment_ratio=2.0, batch_size=50, random_state=0
        ).fit(x)
        assert model.cluster_centers_.isfinite().all()
