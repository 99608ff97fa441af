"""kmeans_assign and kmeans_update against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES

from ssl_fast.cluster import kmeans_assign, kmeans_update

METRICS = ("euclidean", "cosine")


def compared(rows, metric):
    """The rows as the metric compares them, in float64."""
    wide = rows.double()
    return torch.nn.functional.normalize(wide, dim=-1, eps=0.0).nan_to_num() if (
        metric == "cosine"
    ) else wide  # fmt: skip


def all_distances(x, centroids, metric):
    u, v = compared(x, metric), compared(centroids, metric)
    return (u.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_assign_is_the_nearest_centroid(features, dtype, metric, lead):
    x, centroids = features(*lead, 50, 7, dtype=dtype), features(*lead, 6, 7, dtype=dtype)
    x[..., 3, :] = 0.0
    labels, distances = kmeans_assign(x, centroids, metric=metric)
    exact = all_distances(x, centroids, metric)
    assert labels.dtype is torch.int64
    assert labels.shape == x.shape[:-1] == distances.shape
    assert distances.dtype is torch.float32
    chosen = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert torch.all(chosen <= exact.amin(-1) + 1e-6)
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest():
    centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    labels, distances = kmeans_assign(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), centroids)
    assert labels.tolist() == [0, 0]
    assert distances.tolist() == [2.0, 1.0]


def test_large_fp16_rows_do_not_overflow():
    x = torch.tensor([[1e4, 1e4], [-1e4, 1e4]], dtype=torch.float16)
    for metric in METRICS:
        labels, distances = kmeans_assign(x, x.flip(0), metric=metric)
        assert labels.tolist() == [1, 0]
        assert torch.all(distances < 1e-6)
    centroids, counts = kmeans_update(x, torch.tensor([0, 0]), 1)
    assert centroids.tolist() == [[0.0, 1e4]]
    assert counts.tolist() == [2.0]


@pytest.mark.parametrize("metric", METRICS)
def test_gradients(features, metric):
    x = features(20, 4, dtype=torch.float64, requires_grad=True)
    centroids = features(3, 4, dtype=torch.float64, requires_grad=True)

    def distances(x, centroids):
        return kmeans_assign(x, centroids, metric=metric)[1]

    assert torch.autograd.gradcheck(distances, (x, centroids))
    assert torch.autograd.gradgradcheck(distances, (x, centroids))


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_in_every_dtype(features, dtype, metric):
    x = features(2, 300, 9, dtype=dtype, requires_grad=True)
    centroids = features(2, 5, 9, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 300)
    labels, distances = kmeans_assign(x, centroids, metric=metric)
    assert not labels.requires_grad
    found = torch.autograd.grad((distances * weight).sum(), (x, centroids), retain_graph=True)
    again = torch.autograd.grad((distances * weight).sum(), (x, centroids))
    wide = [t.detach().double().requires_grad_() for t in (x, centroids)]
    exact = all_distances(*wide, metric).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = torch.autograd.grad((exact * weight).sum(), wide)
    for got, same, want in zip(found, again, expected, strict=True):
        assert got.dtype is dtype
        assert torch.equal(got, same)
        error = (got.double() - want).norm() / want.norm()
        assert error < max(2 * torch.finfo(dtype).eps, TOLERANCES[torch.float32].relative)


def test_a_zero_row_has_no_gradient_under_cosine():
    x = torch.zeros(2, 3, requires_grad=True)
    kmeans_assign(x, torch.eye(3), metric="cosine")[1].sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_only_the_gradients_asked_for(features):
    x, centroids = features(8, 3), features(2, 3, requires_grad=True)
    kmeans_assign(x, centroids)[1].sum().backward()
    assert x.grad is None
    assert centroids.grad is not None
    with torch.no_grad():
        assert kmeans_assign(x, centroids)[1].grad_fn is None


@pytest.mark.parametrize("metric", METRICS)
def test_update_is_the_weighted_mean(features, dtype, metric):
    x, previous = features(2, 40, 5, dtype=dtype), features(2, 4, 5, dtype=dtype)
    labels = torch.randint(-1, 3, (2, 40))
    x[labels < 0] = torch.nan
    weight = torch.rand(2, 40)
    centroids, counts = kmeans_update(x, labels, 4, weight, previous=previous, metric=metric)
    for b in range(2):
        for k in range(3):
            chosen = labels[b] == k
            rows = compared(x[b, chosen], metric) * weight[b, chosen, None].double()
            mean = rows.sum(0)
            mean = compared(mean, metric) if metric == "cosine" else mean / weight[b, chosen].sum()
            torch.testing.assert_close(centroids[b, k], mean.to(dtype), rtol=1e-2 if (
                dtype is not torch.float32) else 1e-5, atol=1e-6)  # fmt: skip
            torch.testing.assert_close(counts[b, k], weight[b, chosen].sum())
    assert torch.equal(centroids[:, 3], previous[:, 3])
    assert counts[:, 3].tolist() == [0.0, 0.0]
    assert centroids.dtype is dtype
    assert counts.dtype is torch.float32


def test_an_empty_cluster_without_previous_is_zero():
    centroids, counts = kmeans_update(torch.ones(2, 3), torch.tensor([1, 1]), 2)
    assert centroids.tolist() == [[0.0] * 3, [1.0] * 3]
    assert counts.tolist() == [0.0, 2.0]


def test_float64(features):
    x, centroids = features(30, 3, dtype=torch.float64), features(4, 3, dtype=torch.float64)
    labels, distances = kmeans_assign(x, centroids)
    assert distances.dtype is torch.float64
    assert torch.equal(labels, all_distances(x, centroids, "euclidean").argmin(-1))
    assert kmeans_update(x, labels, 4)[1].dtype is torch.float64


def test_no_rows():
    labels, distances = kmeans_assign(torch.zeros(2, 0, 3), torch.zeros(2, 4, 3))
    assert labels.shape == distances.shape == (2, 0)
    centroids, counts = kmeans_update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2)
    assert centroids.abs().sum() == counts.sum() == 0.0


X, C = torch.ones(4, 3), torch.ones(2, 3)
L = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([[1.0]], C), {}, TypeError, "x must be a tensor"),
        ((torch.ones(3), C), {}, ValueError, r"x must have shape \[..., N, D\]"),
        ((X.long(), C), {}, TypeError, "x must be float32"),
        ((X, C.half()), {}, TypeError, "centroids must have the dtype of x"),
        ((X, torch.ones(2, 4)), {}, ValueError, "centroids must have as many columns as x, 3"),
        ((X, torch.ones(5, 2, 3)), {}, ValueError, "leading dimensions"),
        ((X, torch.ones(0, 3)), {}, ValueError, "at least one row"),
        ((X, C.to("meta")), {}, ValueError, "centroids must be on the device of x"),
        ((X, C), {"metric": "l1"}, ValueError, "metric must be one of"),
        ((X, C), {"backend": "fast"}, ValueError, "backend must be one of"),
        ((X * torch.nan, C), {}, ValueError, "x must be finite"),
        ((X, C * torch.inf), {}, ValueError, "centroids must be finite"),
    ],
)
def test_assign_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        kmeans_assign(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X, L.float(), 2), {}, TypeError, "labels must be an int64 tensor"),
        ((X, L[:3], 2), {}, ValueError, "labels must have a number per row of x"),
        ((X, L + 2, 2), {}, ValueError, "n_clusters"),
        ((X, L, 0), {}, ValueError, "n_clusters must be at least 1"),
        ((X, L, 2.0), {}, TypeError, "n_clusters must be an integer"),
        ((X, L, 2, torch.ones(3)), {}, ValueError, "sample_weight must have a number per row"),
        ((X, L, 2, -torch.ones(4)), {}, ValueError, "sample_weight must be finite and not neg"),
        ((X, L, 2, [1.0] * 4), {}, TypeError, "sample_weight must be a floating tensor"),
        ((X, L, 2), {"previous": torch.ones(3, 3)}, ValueError, "previous must have n_clusters=2"),
        ((X * torch.nan, L, 2), {}, ValueError, "x must be finite"),
    ],
)
def test_update_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        kmeans_update(*arguments, **options)
