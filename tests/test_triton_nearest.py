"""What Triton refuses of nearest, centroid_update and top_k, and their kernels compiled for cards.

The interpreter's checks are in interpreted_nearest.py, which test_triton_pair_softmax.py runs.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from compile_triton_searches import SMALL, cases
from compiled_reports import assert_within_limits, compiled_reports
from plain_clusters import all_distances, assert_near_distances, assert_near_labels
from tolerances import assert_near

from ssl_fast.backends import dispatch, triton
from ssl_fast.ops.top_k import top_k

CASES = cases()


@pytest.fixture(scope="module")
def compiled():
    """Every case's report, compiled once."""
    with compiled_reports("compile_triton_searches") as reports:
        yield reports


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compiles_clean(compiled, case):
    report = compiled[case.name]
    if case.op in SMALL:
        assert report["spilled"] == 0, report
        assert report["registers"] <= 128, report
    else:
        assert_within_limits(report, case)


def test_refuses_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in ("nearest", "centroid_update", "top_k"):
        assert "not float64" in triton.refuses(op, "cuda", torch.float64, (8, 8, 8))
        assert "32 bits" in triton.refuses(op, "cuda", torch.float32, (8, 2**31, 8))
    most = triton.MOST_NEIGHBOURS
    reason = triton.refuses("top_k", "cuda", torch.float32, (most + 1, 8, 100, 8))
    assert f"{most} neighbours at most, not {most + 1}" in reason


def test_more_neighbours_than_triton_keeps(monkeypatch):
    """The number reaches the backend's answer, and the reference serves with one warning."""
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setitem(dispatch.PRIORITY, "cpu", ("triton", "reference"))
    monkeypatch.delenv("SSL_FAST_BACKEND", raising=False)
    x = torch.randn(1, 3, 4)
    y = torch.randn(1, 200, 4)
    with pytest.warns(RuntimeWarning, match="64 neighbours at most, not 65"):
        _, indices = top_k(x, y, 65)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(top_k(x, y, 65)[1], indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "shape", [(3, 33, 50, 20), (2, 300, 700, 128), (1, 5000, 1000, 768)], ids=str
)
def test_on_a_card(features, shape, dtype):
    """The compiled kernels against distances written out, at the table's own tile sizes."""
    batch, n, k, d = shape
    if triton.refuses("nearest", "cuda", dtype, shape[1:]):
        pytest.skip("this GPU is refused")
    x, y = (features(batch, m, d, dtype=dtype).cuda() for m in (n, k))
    weight = torch.rand(batch, n, device="cuda")
    for scales in ((None, None), (weight + 0.5, torch.rand(batch, k, device="cuda") + 0.5)):
        exact = all_distances(x, y, *scales)
        lloyd = dispatch.load("triton", "nearest").lloyd
        labels, squared, sums, counts = lloyd(x, y, *scales, weight, None, True)
        assert_near_labels(labels, exact)
        if dtype is not torch.float32:
            assert torch.equal(labels, exact.argmin(2))
        assert_near_distances(squared, labels, x, y, *scales)
        update = dispatch.load("reference", "centroid_update").centroid_update
        for out, e in zip((sums, counts), update(x, labels, scales[0], weight, k), strict=True):
            assert_near(out, e, torch.float32)
        for neighbours in (1, 7, 50):
            squared, indices = dispatch.load("triton", "top_k").top_k(x, y, *scales, neighbours)
            expected = exact.sort(dim=2).values[..., :neighbours]
            torch.testing.assert_close(exact.gather(2, indices), expected, rtol=1e-5, atol=1e-5)
            assert_near_distances(squared, indices, x, y, *scales)
            assert_near_labels(indices[..., 0].contiguous(), exact)
