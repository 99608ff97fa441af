"""The k nearest rows: every backend against all distances, sorted."""

from __future__ import annotations

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_clusters import all_distances, assert_near_distances, strided_views
from tolerances import TOLERANCES

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import pairs
from ssl_fast.backends.reference import top_k as reference
from ssl_fast.ops.top_k import top_k

# (B, N, M, D), k
SHAPES = [
    ((0, 5, 3, 4), 2), ((2, 0, 3, 4), 3), ((1, 1, 1, 1), 1), ((2, 1, 3, 5), 3), ((3, 13, 33, 1), 7),
    ((2, 33, 13, 31), 13), ((1, 97, 130, 64), 10), ((2, 130, 257, 96), 1), ((1, 3, 700, 130), 64),
    ((5, 7, 9, 17), 2), ((1, 40, 300, 8), 100), ((1, 9, 300, 8), 300),
]  # fmt: skip


def module(name):
    return dispatch.load(name, "top_k")


def search_arguments(features, shape, dtype=torch.float32, scales=False):
    """x, y, x_scale, y_scale."""
    batch, n, m, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + m)
    x, y = features(batch, n, d, dtype=dtype), features(batch, m, d, dtype=dtype)
    if not scales:
        return [x, y, None, None]
    x_scale = torch.rand(batch, n, generator=generator) * 2
    x_scale[:, 1::7] = 0.0
    return [x, y, x_scale, torch.rand(batch, m, generator=generator) + 0.5]


def assert_right(found, arguments, k):
    """In order, each its pair's distance, none further than fp32 can mistake it for the j-th."""
    squared, indices = found
    assert squared.shape == indices.shape == (*arguments[0].shape[:2], k)
    assert indices.dtype is torch.int64
    exact = all_distances(*arguments)
    assert indices.numel() == 0 or (indices.min() >= 0 and indices.max() < exact.shape[2])
    ordered = indices.sort(dim=2).values
    assert torch.all(ordered[..., 1:] != ordered[..., :-1]), "an index twice"
    step, tied = squared.diff(dim=2), squared[..., 1:] == squared[..., :-1]
    assert torch.all(step >= 0), "not ascending"
    assert torch.all(indices.diff(dim=2)[tied] > 0), "equal distances not in order of the index"
    assert_near_distances(squared, indices, *arguments)
    excess = exact.gather(2, indices) - exact.sort(dim=2).values[..., :k]
    allowed = TOLERANCES[torch.float32].relative * exact.amax(2, keepdim=True)
    assert torch.all(excess.abs() <= allowed), f"{(excess.abs() - allowed).max():.3e} too far"


@pytest.mark.parametrize("scales", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_neighbours(backend, features, shape, k, scales, dtype):
    arguments = search_arguments(features, shape, dtype, scales)
    found = module(backend).top_k(*arguments, k)
    assert found[0].dtype is torch.float32
    assert_right(found, arguments, k)


@pytest.mark.parametrize("k", [1, 2, 5, 31, 32, 33, 64, 120])
def test_exact_ties_go_to_the_lowest(backend, dtype, k):
    """Small integers, whose distances every dtype computes exactly, and rows that repeat."""
    for depth in (1, 3, 20):
        generator = torch.Generator().manual_seed(depth)
        x = torch.randint(-2, 3, (2, 40, depth), generator=generator).to(dtype)
        some = torch.randint(-2, 3, (2, 60, depth), generator=generator).to(dtype)
        y = torch.cat([some, some[:, torch.randperm(60, generator=generator)]], dim=1)
        squared, indices = module(backend).top_k(x, y, None, None, k)
        expected, order = all_distances(x, y).sort(dim=2, stable=True)
        assert torch.equal(indices, order[..., :k])
        assert torch.equal(squared.double(), expected[..., :k])


def test_all_rows_alike(backend, features, dtype):
    y = features(1, 1, 33, dtype=dtype).expand(2, 200, 33)
    x = features(2, 9, 33, dtype=dtype)
    _, indices = module(backend).top_k(x, y, None, None, 40)
    assert torch.equal(indices, torch.arange(40).expand(2, 9, 40))


def test_a_row_is_its_own_nearest(backend, features, dtype):
    x = features(2, 97, 20, dtype=dtype)
    squared, indices = module(backend).top_k(x, x, None, None, 3)
    assert torch.equal(indices[..., 0], torch.arange(97).expand(2, 97))
    assert torch.all(squared[..., 0] == 0.0)
    assert torch.all(squared[..., 1] > 0.0)


def test_data_far_from_the_origin(backend, features):
    arguments = search_arguments(features, (2, 60, 131, 24))
    offset = torch.randn(1, 1, 24) * 1e4
    arguments[:2] = [x * 4 + offset for x in arguments[:2]]
    assert_right(module(backend).top_k(*arguments, 9), arguments, 9)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_large_and_small_norms(backend, features, dtype, size):
    arguments = search_arguments(features, (2, 60, 65, 40), dtype)
    arguments[:2] = [(x.double() * size).clamp(-3e4, 3e4).to(dtype) for x in arguments[:2]]
    assert_right(module(backend).top_k(*arguments, 5), arguments, 5)


def test_not_finite_rows(backend, features, dtype):
    arguments = search_arguments(features, (2, 40, 21, 8), dtype)
    clean = module(backend).top_k(*arguments, 4)
    arguments[0] = arguments[0].clone()
    arguments[0][0, 3, 2] = torch.nan
    arguments[0][1, 5, 7] = torch.inf
    squared, indices = module(backend).top_k(*arguments, 4)
    assert torch.equal(indices[0, 3], torch.arange(4))
    assert squared[0, 3].isnan().all()
    assert torch.all(squared[1, 5] == torch.inf)
    assert torch.all((indices >= 0) & (indices < 21))
    others = torch.ones(2, 40, dtype=torch.bool)
    others[0, 3] = others[1, 5] = False
    assert torch.equal(indices[others], clean[1][others])
    assert torch.equal(squared[others], clean[0][others])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_others_come_last(backend, features, dtype, value):
    arguments = search_arguments(features, (2, 10, 21, 8), dtype)
    kept = arguments[1].clone()
    for place in (0, 7, 20):
        arguments[1][:, place, 3] = value
    finite = torch.tensor([i for i in range(21) if i not in (0, 7, 20)])
    squared, indices = module(backend).top_k(*arguments, 21)
    expected, order = module(backend).top_k(arguments[0], kept[:, finite], None, None, 18)
    assert torch.equal(indices[..., :18], finite[order])
    torch.testing.assert_close(squared[..., :18], expected)
    assert torch.equal(indices[..., 18:], torch.tensor([0, 7, 20]).expand(2, 10, 3))
    assert not squared[..., 18:].isfinite().any()


@pytest.mark.parametrize(("shape", "k"), [((3, 13, 33, 31), 5), ((2, 97, 40, 64), 10)], ids=str)
def test_layouts(backend, features, shape, k, dtype):
    x, y, *scales = search_arguments(features, shape, dtype, scales=True)
    expected = module(backend).top_k(x, y, *scales, k)
    spread = [value.repeat_interleave(2, dim=1)[:, ::2] for value in scales]
    for other_x, other_y in zip(strided_views(x), strided_views(y), strict=True):
        out = module(backend).top_k(other_x, other_y, *spread, k)
        torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, k, dtype):
    arguments = search_arguments(features, shape, dtype, scales=True)
    assert_right(module(backend).top_k(*arguments, k), arguments, k)


@pytest.mark.parametrize("shape", [(1, 300, 1513, 40), (7, 30, 65, 8)], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(backend, features, dtype, shape):
    arguments = search_arguments(features, shape, dtype, scales=True)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        results.append(module(backend).top_k(*arguments, 17))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_does_not_depend_on_its_chunks(features, monkeypatch):
    arguments = search_arguments(features, (3, 31, 97, 33), scales=True)
    whole = reference.top_k(*arguments, 6)
    for size in (5 * 300, 40 * 300):
        monkeypatch.setattr(pairs, "CHUNK_BYTES", size * 8)
        torch.testing.assert_close(reference.top_k(*arguments, 6), whole, rtol=1e-6, atol=1e-12)


def test_reference_in_float64(features):
    x, y = features(2, 60, 9, dtype=torch.float64), features(2, 31, 9, dtype=torch.float64)
    for offset in (0.0, 1e8):
        squared, indices = reference.top_k(x + offset, y + offset, None, None, 31)
        expected, order = all_distances(x + offset, y + offset).sort(dim=2, stable=True)
        assert torch.equal(indices, order)
        torch.testing.assert_close(squared, expected)


def test_opcheck(backend, features, dtype):
    for scales in (False, True):
        arguments = search_arguments(features, (2, 7, 5, 3), dtype, scales)
        operator = torch.ops.ssl_fast.top_k.default
        torch.library.opcheck(operator, (*arguments, 2), {"backend": backend})


def test_the_op_in_torch(backend, features):
    x, y, *_ = search_arguments(features, (2, 7, 5, 3))
    x.requires_grad_()
    expected = top_k(x, y, 3, backend=backend)
    assert not any(value.requires_grad for value in expected)
    torch._dynamo.reset()
    compiled = torch.compile(top_k, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x, y, 3, backend=backend), expected))


WRONG = {
    "x must be a floating tensor": {"x": torch.zeros(7, 3)},
    "y must be three-dimensional": {"y": torch.zeros(5, 3)},
    "y must be a torch.float32": {"y": torch.zeros(2, 5, 3).half()},
    "y_scale must be": {"y_scale": torch.ones(2, 7)},
    "k must be from 1 to the number of rows of y, 5; got 6": {"k": 6},
    "k must be from 1 to the number of rows of y, 5; got 0": {"k": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(backend, message):
    arguments = {"x": torch.zeros(2, 7, 3), "y": torch.zeros(2, 5, 3), "k": 2}
    with pytest.raises(ValueError, match=message):
        top_k(**arguments | WRONG[message], backend=backend)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 3),
    n=st.integers(0, 50),
    m=st.integers(1, 140),
    d=st.integers(1, 70),
    share=st.floats(0, 1),
    scales=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_top_k(backend, features, batch, n, m, d, share, scales, kind):
    k = max(1, int(share * m))
    arguments = search_arguments(features, (batch, n, m, d), kind, scales)
    assert_right(module(backend).top_k(*arguments, k), arguments, k)
