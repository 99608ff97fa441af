"""Labels where leading directions rule most centroids out: those of exact arithmetic.

Rows have a spectrum that falls, so that little is ruled out by mistake only if the bounds hold.
"""

from __future__ import annotations

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_clusters import all_distances, strided_views

from ssl_fast import batched_kmeans
from ssl_fast.backends import dispatch
from ssl_fast.cluster import problem
from ssl_fast.cluster.projection import projection_columns
from ssl_fast.ops import nearest as ops

N, K, D = 333, 131, 150


def spectrum(n, d, seed, power=1.0, batch=1):
    """Rows [B, N, D] whose variance falls along directions that are no axes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, d, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    falling = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    return ((x * falling) @ turn).float()


def clusters(n=N, k=K, d=D, seed=0, power=1.0, batch=1):
    """Rows, means of some of them, and labels that are right for most."""
    x = spectrum(n, d, seed, power, batch)
    generator = torch.Generator().manual_seed(seed)
    centroids = x[:, torch.randint(n, (k, 8), generator=generator)].mean(2)
    labels = torch.cdist(x, centroids).argmin(2)
    wrong = torch.rand(labels.shape, generator=generator) < 0.2
    return x, centroids, torch.where(wrong, (labels + 7) % k, labels)


def exact_labels(x, centroids, *scales):
    """From differences in float64, equal ones to the lowest index."""
    squared = all_distances(x, centroids, *scales)
    return (squared == squared.amin(2, keepdim=True)).double().argmax(2)


def lloyd(backend, *arguments):
    return dispatch.load(backend, "nearest").lloyd(*arguments)


def assert_the_same(
    backend, x, centroids, previous, scales=(None, None), rest=(None, None), columns=24
):
    """As without labels to start from, to the last bit, and the labels of exact arithmetic."""
    plain = lloyd(backend, x, centroids, *scales, *rest, True)
    found = lloyd(backend, x, centroids, *scales, *rest, True, previous, columns)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if rest[1] is None:
        assert torch.equal(found[0], exact_labels(x, centroids, *scales))


@pytest.mark.parametrize("power", [0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize(
    "shape",
    [(1, 333, 131, 150), (3, 70, 57, 33), (9, 200, 30, 20), (1, 1500, 300, 65), (2, 40, 2, 3)],
    ids=str,
)
def test_shapes(backend, shape, power):
    batch, n, k, d = shape
    x, centroids, previous = clusters(n, k, d, n, power, batch)
    for columns in {1, min(k, d) // 3 + 1, min(k, d) - 1}:
        assert_the_same(backend, x, centroids, previous, columns=columns)


def test_previous_labels_are_only_a_hint(backend):
    x, centroids, right = clusters()
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**62), 2**62, (1, N), generator=generator)
    for previous in (right, (right + 1) % K, torch.full_like(right, -1), anything):
        assert_the_same(backend, x, centroids, previous)


@pytest.mark.parametrize("rank", [0, 1, 5, 23])
@pytest.mark.parametrize("columns", [1, 24, K])
def test_centroids_that_span_less_than_the_columns(backend, rank, columns):
    x, centroids, previous = clusters()
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(rank, D, generator=generator)
    centroids = torch.randn(1, K, rank, generator=generator) @ inside + 0.01
    for rows in (x, torch.randn(1, N, rank, generator=generator) @ inside):
        assert_the_same(backend, rows, centroids, previous, columns=columns)


def test_scales_and_weights(backend):
    x, centroids, previous = clusters(batch=2)
    generator = torch.Generator().manual_seed(1)
    scales = 1.0 / x.norm(dim=2), torch.rand(2, K, generator=generator) + 0.5
    weight = torch.rand(2, N, generator=generator)
    lengths = torch.tensor([N - 40, 70])
    for some in (scales, (scales[0], None), (None, scales[1])):
        assert_the_same(backend, x, centroids, previous, some)
    x = x.masked_fill((torch.arange(N) >= lengths[:, None]).unsqueeze(2), torch.nan)
    assert_the_same(backend, x, centroids, previous, scales, (weight, lengths))


@pytest.mark.parametrize("offset", [0.3, 10.0, 1e4])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_far_from_the_origin(backend, offset, scaled):
    x, centroids, previous = clusters()
    scales = (1.0 / (x + offset).norm(dim=2), 1.0 / (centroids + offset).norm(dim=2))
    some = scales if scaled else (None, None)
    assert_the_same(backend, x + offset, centroids + offset, previous, some)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-18, 1e-10, 1e10, 1e16, 1e18])
def test_magnitudes(backend, scale):
    x, centroids, previous = clusters()
    assert_the_same(backend, x * scale, centroids * scale, previous)


def test_magnitudes_side_by_side(backend):
    """Rows and centroids of all sizes at once, and zeros, whose bounds must not vanish."""
    x, centroids, previous = clusters()
    generator = torch.Generator().manual_seed(3)
    x = x * 10.0 ** torch.randint(-25, 15, (1, N, 1), generator=generator)
    centroids = centroids * 10.0 ** torch.randint(-25, 15, (1, K, 1), generator=generator)
    x[:, ::9] = 0.0
    centroids[:, 40::50] = 0.0
    assert_the_same(backend, x, centroids, previous)


def test_rows_within_the_leading_directions(backend):
    """Nothing is left out, so that the bounds consist of roundings alone."""
    generator = torch.Generator().manual_seed(4)
    inside = torch.linalg.qr(torch.randn(D, 12, generator=generator)).Q.T
    x, centroids = (torch.randn(1, n, 12, generator=generator) @ inside for n in (N, K))
    previous = torch.zeros(1, N, dtype=torch.int64)
    assert_the_same(backend, x, centroids, previous, columns=16)


@pytest.mark.parametrize("step", [0.0, 1e-7, 1e-5, 1e-3])
def test_near_ties(backend, step):
    """Groups of near or equal centroids; equal ones go to the lowest."""
    x, centroids, previous = clusters(power=1.5)
    previous = (3 * previous).clamp_max(K - 1)
    generator = torch.Generator().manual_seed(5)
    apart = torch.randn(1, K, D, generator=generator) * step
    centroids = centroids[:, torch.arange(K) // 3] + apart
    assert_the_same(backend, x, centroids, previous)


def test_rows_half_way(backend):
    """Between two centroids, which float64 alone tells apart."""
    x, centroids, previous = clusters()
    x = (centroids[:, previous[0]] + centroids[:, (previous[0] + 1) % K]) / 2
    assert_the_same(backend, x, centroids, previous)


def test_bounds_without_room(backend):
    """One direction is left out, where the product is all that its bound allows for.

    Rows lie between the centroid that they had and one that is nearer by a part of a million.
    """
    x, centroids, _ = clusters(n=2000, d=20, power=0.6)
    previous = torch.cdist(x, centroids).argmin(2)
    others = torch.cdist(centroids, centroids).masked_fill_(torch.eye(K).bool(), 9e9).argmin(2)
    had, nearer = (centroids[0][i[0]] for i in (previous, others[0][previous]))
    x = ((had + nearer) / 2 + 1e-6 * (nearer - had))[None]
    generator = torch.Generator().manual_seed(6)
    turn = torch.linalg.qr(torch.randn(D, 20, generator=generator)).Q.T
    x, centroids = x @ turn, centroids @ turn
    assert_the_same(backend, x, centroids, previous, columns=19)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e19, 3e38])
def test_not_finite(backend, value):
    x, centroids, previous = clusters()
    hurt = centroids.clone()
    for place in (0, 7, K - 1):
        hurt[:, place, 3] = value
    plain = lloyd(backend, x, hurt, *[None] * 4, True)
    found = lloyd(backend, x, hurt, *[None] * 4, True, torch.full_like(previous, 7), 24)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    x = x.clone()
    x[:, ::50, 5] = value
    plain = lloyd(backend, x, centroids, *[None] * 4, True)
    found = lloyd(backend, x, centroids, *[None] * 4, True, previous, 24)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 150), k=st.integers(2, 200), d=st.integers(2, 150), power=st.floats(0.5, 3.0),
    columns=st.integers(1, 30), seed=st.integers(0, 2**31), far=st.sampled_from([0.0, 1.0, 100.0]),
)  # fmt: skip
def test_any_problem(backend, n, k, d, power, columns, seed, far):
    x, centroids, previous = clusters(n, k, d, seed, power)
    assert_the_same(backend, x + far, centroids + far, previous, columns=min(columns, k))


def test_threads_and_layouts(backend):
    x, centroids, previous = clusters(n=1200, batch=2)
    expected = lloyd(backend, x, centroids, *[None] * 4, True)
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        found = lloyd(backend, x, centroids, *[None] * 4, True, previous, 24)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    spread = previous.repeat_interleave(2, dim=1)[:, ::2]
    for other_x, other_c in zip(strided_views(x), strided_views(centroids), strict=True):
        found = lloyd(backend, other_x, other_c, *[None] * 4, True, spread, 24)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(backend):
    x, centroids, previous = clusters(batch=5)
    assert_the_same(backend, x, centroids, previous)


def test_16_bit_rows(backend):
    x, centroids, previous = clusters()
    for dtype in (torch.bfloat16, torch.float16):
        assert_the_same(backend, x.to(dtype), centroids.to(dtype), previous)


def test_columns():
    """About a sixth of the work, and none where that is not worth it."""
    x = torch.zeros(1, 1, 1)
    assert projection_columns(x.expand(1, 50000, 768), 1000) == 72
    assert projection_columns(x.expand(3, 50000, 768), 100) == 16
    assert projection_columns(x.expand(1, 50000, 4096), 8192) == 96
    assert projection_columns(x.expand(1, 10000, 768), 1000) == 0
    assert projection_columns(x.expand(1, 50000, 768), 60) == 0
    assert projection_columns(x.expand(1, 50000, 64), 256) == 0
    assert projection_columns(x.double().expand(1, 50000, 768), 1000) == 0
    assert projection_columns(x.to("meta").expand(1, 50000, 768), 1000) == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_is_the_same_with_and_without(backend, metric, monkeypatch):
    x = spectrum(900, 64, 0, batch=2) + 0.2
    options = {"init": x[:, :60].clone(), "max_iter": 12, "metric": metric, "tol": 1e-3}
    options["backend"] = backend
    plain = batched_kmeans(x, 60, **options)
    monkeypatch.setattr(problem, "projection_columns", lambda *_: 12)
    found = batched_kmeans(x, 60, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_errors():
    x, centroids, previous = clusters()
    call = {"x": x, "centroids": centroids, "previous": previous, "columns": 8}
    for change, message in (
        ({"previous": previous[:, 1:]}, "previous must"),
        ({"previous": previous.int()}, "previous must"),
        ({"columns": 0}, f"columns must be between 1 and the number of centroids, {K}; got 0"),
        ({"columns": K + 1}, "columns must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.lloyd(**{**call, **change})
