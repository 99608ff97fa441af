"""Labels where rounded products come first: they are those of exact arithmetic all the same.

Sizes are those at which the native kernels screen centroids in bfloat16, where the CPU has such
products; every backend and instruction set is held to the same labels.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_fast.backends import dispatch

N, K, D = 300, 97, 83


def nearest(backend, x, centroids, x_scale=None, centroid_scale=None):
    call = dispatch.load(backend, "nearest").nearest
    scales = [s if s is None else s[None] for s in (x_scale, centroid_scale)]
    labels, squared = call(x[None], centroids[None], *scales, None, True)
    return labels[0], squared[0]


def exact(x, centroids, x_scale=None, centroid_scale=None):
    """Labels and squared distances from differences in float64, equal ones to the lowest index."""
    u, v = x.double(), centroids.double()
    if x_scale is not None:
        u = u * x_scale.double()[:, None]
    if centroid_scale is not None:
        v = v * centroid_scale.double()[:, None]
    squared = torch.stack([(row - v).square().sum(1) for row in u])
    best, labels = squared.min(1)
    # min gives any of equal ones.
    return (squared == best[:, None]).double().argmax(1), labels, best


def assert_exact(backend, x, centroids, *scales):
    labels, squared = nearest(backend, x, centroids, *scales)
    lowest, _, best = exact(x, centroids, *scales)
    torch.testing.assert_close(labels, lowest, rtol=0, atol=0)
    torch.testing.assert_close(squared.double(), best, rtol=1e-5, atol=1e-30)


def groups_of(size, generator, step):
    """Centroids in groups whose members lie ``step`` apart, and rows about half way."""
    base = torch.randn(-(-K // size), D, generator=generator)
    noise = torch.randn(len(base), size, D, generator=generator)
    centroids = (base[:, None] + step * noise).flatten(0, 1)[:K]
    rows = torch.randint(0, len(base), (N,), generator=generator)
    x = base[rows] + 0.3 * torch.randn(N, D, generator=generator)
    return x, centroids


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 97])
def test_groups_of_near_centroids(backend, dtype, size, step):
    """One, two and more candidates: what the screen decides, what is compared, what waits."""
    generator = torch.Generator().manual_seed(size)
    x, centroids = groups_of(size, generator, step)
    assert_exact(backend, x.to(dtype), centroids.to(dtype))


@pytest.mark.parametrize("offset", [3.0, 100.0])
def test_groups_far_from_the_origin(backend, offset):
    generator = torch.Generator().manual_seed(1)
    x, centroids = (part + offset for part in groups_of(2, generator, 1e-2))
    assert_exact(backend, x, centroids)


def test_repeated_centroids(backend, dtype):
    """The lowest of equal ones, whether two, four or more candidates are left."""
    generator = torch.Generator().manual_seed(2)
    for distinct in (49, 25, 4, 1):
        centroids = torch.randn(distinct, D, generator=generator).repeat(K, 1)[:K].to(dtype)
        x = torch.randn(N, D, generator=generator).to(dtype)
        labels, _ = nearest(backend, x, centroids)
        assert torch.equal(labels, exact(x, centroids)[0])
        assert labels.max() < distinct


def test_norms_that_differ(backend, dtype):
    """A few far centroids and long rows don't loosen the bounds of the others, or break them."""
    generator = torch.Generator().manual_seed(3)
    x, centroids = groups_of(2, generator, 1e-2)
    x[::7] *= 40.0
    centroids[::11] *= 100.0
    x[5], centroids[8] = 0.0, 0.0
    assert_exact(backend, x.to(dtype), centroids.to(dtype))


@pytest.mark.parametrize("size", [1e-18, 1e-8, 1e8, 1e15])
def test_scale_of_the_data(backend, size):
    generator = torch.Generator().manual_seed(4)
    x, centroids = groups_of(2, generator, 1e-2)
    labels, _ = nearest(backend, x * size, centroids * size)
    assert torch.equal(labels, exact(x * size, centroids * size)[0])


def test_roundings_that_add_up(backend):
    """All values round to bfloat16 the same way, by as much as there is."""
    generator = torch.Generator().manual_seed(5)
    # Between 1 and 2, just under the middle of two values of the format.
    below = 1.0 + torch.randint(0, 127, (N + K, D), generator=generator) / 128 + 0.0039
    above = below + 0.00012
    sign = torch.randn(D, generator=generator).sign()
    for x, centroids in ((below[:N], above[N:]), (above[:N], below[N:]), (below[:N], below[N:])):
        assert_exact(backend, x * sign, centroids * sign)
        near = x[:1] + 1e-3 * torch.randn(K, D, generator=generator)
        assert_exact(backend, x * sign, near * sign)


@pytest.mark.parametrize("rounded", ["row", "centroid"])
def test_a_rounding_along_the_centroid(backend, rounded):
    """The nearest loses by rounding all that Cauchy and Schwarz allow, its rival nothing."""
    d, row, centroid = 128, 1.0, 3.0
    if rounded == "row":
        row += 0.0039  # rounds down to 1
    else:
        centroid += 0.0078  # rounds down to 3
    nearest_one = torch.full((d,), centroid)
    lost = 0.0039 * 3.0 if rounded == "row" else 0.0078
    # A rival at right angles to the row, in values of the format, whose score is less by half of
    # what the nearest loses.
    wanted = 2 * (0.5 * centroid**2 - row * centroid + 0.5 * lost)
    step = 2.0**-7
    low = torch.tensor(wanted).sqrt().div(step).floor() * step
    many = round(float((wanted - low**2) / ((low + step) ** 2 - low**2)) * d / 2) * 2
    rival = low + step * (torch.arange(d) < many)
    rival[1::2] *= -1.0
    centroids = torch.full((64, d), 64.0)
    centroids[::2] *= -1.0  # their mean, which is subtracted where it is large, is not
    centroids[40], centroids[20] = nearest_one, rival
    x = torch.full((N, d), row)
    labels, _ = nearest(backend, x, centroids)
    assert torch.equal(labels, exact(x, centroids)[0])
    assert torch.all(labels == 40)


def test_scaled_rows_and_centroids(backend, dtype):
    generator = torch.Generator().manual_seed(6)
    x, centroids = (part.to(dtype) for part in groups_of(3, generator, 1e-2))
    x_scale, centroid_scale = torch.rand(N, generator=generator), torch.ones(K)
    assert_exact(backend, x, centroids, x_scale, centroid_scale)


def test_what_is_not_finite(backend):
    generator = torch.Generator().manual_seed(7)
    x, centroids = groups_of(2, generator, 1e-2)
    expected, _, _ = exact(x, centroids)
    x[3, 5], x[64, 0] = torch.nan, torch.inf
    bad = [int(expected[10]), int(expected[20])]
    centroids[bad[0], 1], centroids[bad[1], 82] = torch.nan, torch.inf
    labels, squared = nearest(backend, x, centroids)
    assert labels[3] == 0
    assert squared[3].isnan()
    usual = torch.ones(N, dtype=torch.bool)
    usual[[3, 64]] = False
    kept = torch.ones(K, dtype=torch.bool)
    kept[bad] = False
    numbers = torch.arange(K)[kept]
    assert torch.equal(labels[usual], numbers[exact(x[usual], centroids[kept])[0]])


@pytest.mark.parametrize("k", [31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("d", [47, 48, 63, 64, 96, 129])
def test_sizes_about_the_panels(backend, k, d):
    generator = torch.Generator().manual_seed(k * d)
    for n in (1, 63, 64, 129):
        x = torch.randn(n, d, generator=generator)
        assert_exact(backend, x, torch.randn(k, d, generator=generator) * 0.4)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 150), k=st.integers(32, 140),
    d=st.integers(48, 140), members=st.integers(1, 8), step=st.floats(-6, 0),
    spread=st.floats(-3, 3), offset=st.floats(-3, 3),
)  # fmt: skip
def test_any_groups(backend, seed, n, k, d, members, step, spread, offset):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(-(-k // members), d, generator=generator) * 10**spread
    centroids = base.repeat(members, 1)[:k]
    centroids = centroids + 10 ** (spread + step) * torch.randn(k, d, generator=generator)
    x = base[torch.randint(0, len(base), (n,), generator=generator)]
    x = x + 10 ** (spread + step / 2) * torch.randn(n, d, generator=generator)
    shift = 10**offset * torch.randn(d, generator=generator)
    labels, _ = nearest(backend, x + shift, centroids + shift)
    assert torch.equal(labels, exact(x + shift, centroids + shift)[0])
