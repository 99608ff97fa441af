"""Triton's pair_sigmoid in Triton's interpreter, against a formula in float64.

Run as interpreted_pair_softmax.py is.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from triton_checks import check_sigmoid, sigmoid_loss_of, wide

from ssl_fast.backends.triton import launch, strips
from ssl_fast.backends.triton import pair_sigmoid as triton_backend

# numpy warns where a GPU says nothing: inf - inf and 0 * inf are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(5, 7, 3), (1, 1, 1), (33, 50, 17), (50, 20, 40), (16, 64, 16), (2, 1, 70)]
HALVES = [torch.float16, torch.bfloat16]


def arguments(features, shape, dtype, *, bias=-1.5, weighted=True, positive=0):
    n, m, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + m)
    scales = [torch.rand(size, generator=generator) * 4 for size in (n, m)]
    for scale in scales:
        scale[1::7] = 0.0
    weight = torch.randn(n, generator=generator) if weighted else None
    query, key = features(n, d, dtype=dtype), features(m, d, dtype=dtype)
    return [query, key, *scales, torch.tensor(bias), weight, positive]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("positive", [None, 0, 3, -2, 100, -100], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(features, shape, positive, weighted, poisoned_memory):
    check_sigmoid(
        arguments(features, shape, torch.float32, weighted=weighted, positive=positive),
        torch.float32,
    )


@pytest.mark.parametrize("positive", [None, 0, 3], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_in_sixteen_bits(features, shape, positive, dtype, poisoned_memory):
    check_sigmoid(arguments(features, shape, dtype, positive=positive), dtype)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["query", "key"])
def test_only_what_is_needed(features, need, dtype):
    given = arguments(features, (20, 33, 5), dtype)
    full = triton_backend.pair_sigmoid(*given, True, True)
    part = check_sigmoid(given, dtype, need)
    for asked, whole, some in zip((True, *need, True, True, True), full, part, strict=True):
        assert not asked or torch.equal(some, whole)


def test_cutting_changes_nothing(features, monkeypatch):
    """One split and one strip, or many: the same sums in another order."""
    given = arguments(features, (40, 140, 5), torch.float32, positive=7)
    whole = check_sigmoid(given, torch.float32)
    alone = triton_backend.pair_sigmoid(*given, False, False)[0]
    monkeypatch.setattr(launch, "TILES_PER_SPLIT", 1)
    monkeypatch.setattr(launch, "processor_count", lambda _: 16)
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 128 * 33)
    monkeypatch.setattr(strips, "STRIP_ROWS", 33)
    cut = check_sigmoid(given, torch.float32)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)
    cut_alone = triton_backend.pair_sigmoid(*given, False, False)[0]
    torch.testing.assert_close(alone, cut_alone, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3)], ids=str)
def test_empty(features, shape, dtype):
    n, m, d = shape
    out = triton_backend.pair_sigmoid(*arguments(features, shape, dtype), True, True)
    for x, size in zip(out, [(n,), (n, d), (m, d), (n,), (m,), (n,)], strict=True):
        assert torch.equal(x, torch.zeros(size, dtype=x.dtype))
    assert torch.equal(
        triton_backend.pair_sigmoid(*arguments(features, shape, dtype), False, False)[0],
        torch.zeros(n),
    )


@pytest.mark.parametrize("bias", [-60.0, -17.0, -5.0, 5.0, 30.0])
def test_relative_accuracy(bias):
    """Losses from 1e-26 up, a positive's among them, are right relative to themselves."""
    query, key = torch.eye(24), torch.zeros(24, 24)
    key.diagonal().copy_(torch.linspace(0.0, 1.0, 24) * -bias * 2)
    given = [query, key, torch.ones(24), torch.ones(24), torch.tensor(bias), None, 0]
    exact = sigmoid_loss_of(*wide(*given[:4]), given[4].double().expand(24), 0)
    for need in (True, False):
        loss = triton_backend.pair_sigmoid(*given, need, need)[0]
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_small_loss_keeps_its_gradient(dtype):
    """Positives of logit 8 among negatives of -16: no weight is lost beside 1."""
    query = torch.eye(12).to(dtype)
    given = [query, query.clone(), *[torch.ones(12)] * 2, torch.tensor(-16.0), None, 0]
    given[2] = given[2] * 24.0
    q, k, qs, ks = wide(*given[:4])
    loss = sigmoid_loss_of(q, k, qs, ks, given[4].double().expand(12), 0)
    out = triton_backend.pair_sigmoid(*given, True, True)
    torch.testing.assert_close(out[0].double(), loss, rtol=1e-5, atol=0.0)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for x, e in zip(out[1:5], torch.autograd.grad(loss.sum(), [q, k, qs, ks]), strict=True):
        assert (x.double() - e).norm() / e.norm() < bound


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e6])
def test_range_of_incoming_gradients(features, dtype, factor):
    """fp32 shows the vectors' gradients that 16 bits could not, and fp16 rounds no weight to 0."""
    given = arguments(features, (20, 30, 8), dtype, weighted=False)
    plain = triton_backend.pair_sigmoid(*given, True, True)
    given[5] = torch.full((20,), factor)
    scaled = triton_backend.pair_sigmoid(*given, True, True)
    for x, one in zip(scaled[3:], plain[3:], strict=True):
        torch.testing.assert_close(x / factor, one, rtol=1e-5, atol=1e-6)


def test_nan_and_infinity_propagate(features):
    given = arguments(features, (20, 33, 8), torch.float32, weighted=False)
    given[2] = torch.ones(20)
    given[3] = torch.ones(33)
    given[0][2, 3] = torch.nan
    given[0][4, 1] = torch.inf
    loss, grad_query, *_ = triton_backend.pair_sigmoid(*given, True, True)
    alone = triton_backend.pair_sigmoid(*given, False, False)[0]
    for x in (loss, alone):
        assert x[2].isnan()
        assert x[4] == torch.inf
        assert x[[0, 1, 3, *range(5, 20)]].isfinite().all()
    assert grad_query[2].isnan().all()
    assert grad_query[:2].isfinite().all()


def test_nothing_outside_is_read_or_changed(features):
    """The neighbours of the inputs in memory are NaN: they would show in any sum."""
    around = torch.full((80, 40), torch.nan)
    around[7:40, 5:24] = features(33, 19)
    around[41:70, 5:24] = features(29, 19)
    before = around.clone()
    given = [around[7:40, 5:24], around[41:70, 5:24], torch.ones(33), torch.ones(29)]
    rest = torch.tensor(-2.0), None, 0
    out = triton_backend.pair_sigmoid(*given, *rest, True, True)
    assert all(x.isfinite().all() for x in out)
    assert torch.equal(around.nan_to_num(9e9), before.nan_to_num(9e9))
    copies = [x.contiguous() for x in given]
    for a, b in zip(out, triton_backend.pair_sigmoid(*copies, *rest, True, True), strict=True):
        assert torch.equal(a, b)


def test_same_bits_again(features):
    given = arguments(features, (60, 70, 20), torch.bfloat16)
    first, second = (triton_backend.pair_sigmoid(*given, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
