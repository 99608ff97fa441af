"""Triton's pair_softmax in Triton's interpreter: cuts, empty sets, layouts, ranges, tiny losses.

Run as interpreted_pair_softmax.py is.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from tolerances import assert_near
from triton_checks import (
    IGNORED_ID,
    arguments,
    check_loss,
    check_sweep,
    check_symmetric,
    exact_loss,
    wide,
)

from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.backends.triton import device, launch, pair_softmax_sweep, strips
from ssl_fast.backends.triton import pair_softmax as triton_backend

# numpy warns where a GPU says nothing: log(0) and inf - inf are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = [torch.float16, torch.bfloat16]


def test_cutting_changes_nothing(features, monkeypatch):
    """One split, one strip and one table of columns, or many: the same sums in another order."""
    given = arguments(features, (40, 140, 5), "both", torch.float32)
    rows = features(70, 5)
    symmetric = rows, torch.tensor(4.0), torch.rand(70), torch.arange(70) % 9, 35
    whole = check_sweep(given, torch.float32)
    whole_loss = triton_backend.pair_softmax_symmetric_loss(rows, torch.tensor(4.0), True, True)
    whole_symmetric = check_symmetric(*symmetric, torch.float32)
    monkeypatch.setattr(launch, "TILES_PER_SPLIT", 1)
    monkeypatch.setattr(launch, "processor_count", lambda _: 16)
    monkeypatch.setattr(pair_softmax_sweep, "COLUMN_TABLE_BYTES", 2 * 8 * 140)
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 128 * 33)
    monkeypatch.setattr(strips, "STRIP_ROWS", 33)
    cut = check_sweep(given, torch.float32)
    cut_loss = triton_backend.pair_softmax_symmetric_loss(rows, torch.tensor(4.0), True, True)
    cut_symmetric = check_symmetric(*symmetric, torch.float32)
    before, after = (*whole, *whole_loss, *whole_symmetric), (*cut, *cut_loss, *cut_symmetric)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def test_strips_keep_to_their_bound():
    for n, m, size in [(100, 100, 4), (10**6, 10**6, 2), (10**5, 10**7, 2), (5, 10**9, 4)]:
        tall, wide_ = strips._strip_shape(n, m, size)
        assert tall * min(m, wide_) * size <= max(strips.STRIP_BYTES * 1.13, 128 * 128 * size)
        assert 0 < tall <= n
        assert wide_ == m or wide_ % 128 == 0


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3)], ids=str)
def test_empty(features, shape):
    n, m, d = shape
    query, key = features(n, d), features(m, d)
    given = (query, key, torch.ones(n), torch.ones(m), None, None, [0])
    row_lse, row_max, column_lse, diagonal_logit = triton_backend.pair_softmax(*given, True)
    assert torch.equal(diagonal_logit, torch.zeros(n))
    assert torch.equal(row_lse, torch.full((n,), -torch.inf))
    assert torch.equal(row_max, row_lse)
    assert torch.equal(column_lse, torch.full((m,), -torch.inf))
    gradients = triton_backend.pair_softmax_backward(
        *given, row_lse, column_lse, torch.ones(n), torch.ones(m), torch.ones(n), True, True
    )
    for x, size in zip(gradients, [(n, d), (m, d), (n,), (m,)], strict=True):
        assert torch.equal(x, torch.zeros(size))
    row_lse, _, _, expectation = triton_backend.pair_softmax_expectation(*given)
    assert torch.equal(row_lse, torch.full((n,), -torch.inf))
    assert torch.equal(expectation, torch.zeros(n, d))
    positive = features(n, d)
    out = triton_backend.pair_softmax_loss(
        query, positive, key, torch.tensor(3.0), None, None, [], True, True, True, True
    )
    for x in (out[0], *out[4:]):
        assert torch.equal(x, torch.zeros_like(x))
    assert [x.shape for x in out[4:7]] == [(n, d), (n, d), (m, d)]
    out = triton_backend.pair_softmax_symmetric_loss(features(0, d), torch.tensor(3.0), True, True)
    assert [x.numel() for x in out] == [0] * 6
    symmetric = features(0, d), torch.tensor(3.0), torch.ones(0), None, 0
    lse, _ = triton_backend.pair_softmax_symmetric(*symmetric)
    out = triton_backend.pair_softmax_symmetric_backward(*symmetric, lse, lse)
    assert [x.shape for x in out] == [(0, d), (0,)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_row_ignored(features, dtype):
    """No row has a softmax: -inf, and no gradient."""
    rows, ids = features(20, 6, dtype=dtype), torch.full((20,), IGNORED_ID)
    given = (rows, rows, torch.ones(20), torch.ones(20), ids, torch.arange(20), [])
    row_lse, row_max, column_lse, _ = triton_backend.pair_softmax(*given, True)
    for x in (row_lse, row_max, column_lse):
        assert torch.equal(x, torch.full((20,), -torch.inf))
    ones = torch.ones(20)
    out = triton_backend.pair_softmax_backward(
        *given, row_lse, column_lse, ones, ones, None, True, True
    )
    assert not any(x.any() for x in out)
    assert not triton_backend.pair_softmax_expectation(*given)[3].any()
    check_symmetric(rows, torch.tensor(2.0), ones, ids, 10, dtype)


def test_rows_without_negatives(features):
    """Loss 0 and gradient 0, for them alone."""
    ids = torch.tensor([1, 1, 2, 3, 1])
    query, positive, key = features(5, 6), features(5, 6), features(3, 6)
    given = [query, positive, key, torch.tensor(5.0), ids, torch.ones(3).long(), [], True]
    out = check_loss(given, torch.float32)
    alone = ids == 1
    assert torch.equal(out[0] == 0, alone)
    assert torch.equal((out[4] == 0).all(1), alone)


def test_layouts(features):
    """Strided, expanded and offset rows give what their contiguous copies give."""
    base = features(60, 26)
    for query in (
        base[:20, 3:14],
        base[1:41:2, :11],
        base.T[:20, :11],
        base[:1, :11].expand(20, 11),
    ):
        given = (query, base[40:, :11], torch.ones(20), torch.ones(20), None, None, [0])
        copies = (given[0].contiguous(), given[1].contiguous(), *given[2:])
        for a, b in zip(
            triton_backend.pair_softmax(*given, True),
            triton_backend.pair_softmax(*copies, True),
            strict=True,
        ):
            assert torch.equal(a, b)
        losses = [
            triton_backend.pair_softmax_loss(
                x[0], x[1], x[1], torch.tensor(4.0), None, None, [0], True, True, True, True
            )
            for x in (given, copies)
        ]
        for a, b in zip(*losses, strict=True):
            assert torch.equal(a, b)


def test_nothing_outside_is_read_or_changed(features):
    """The neighbours of the inputs in memory are NaN: they would show in any sum."""
    around = torch.full((80, 40), torch.nan)
    around[7:40, 5:24] = features(33, 19)
    around[41:70, 5:24] = features(29, 19)
    before = around.clone()
    query, key = around[7:40, 5:24], around[41:70, 5:24]
    out = triton_backend.pair_softmax_loss(
        query, query.roll(1, 0), key, torch.tensor(4.0), None, None, [], True, True, True, True
    )
    out += triton_backend.pair_softmax(
        query, key, torch.ones(33), torch.ones(29), None, None, [1], True
    )
    assert all(x.isfinite().all() for x in out)
    assert torch.equal(around.nan_to_num(9e9), before.nan_to_num(9e9))


def test_zero_rows_stay_zero(features, dtype):
    query, key = features(20, 8, dtype=dtype), features(20, 8, dtype=dtype)
    query[3] = 0
    key[5] = 0
    out = check_loss([query, None, key, torch.tensor(8.0), None, None, [0], True], dtype)
    assert not out[4][3].any()
    assert not out[6][5].any()


def test_zero_scale_has_a_gradient(features):
    """Its own is not zero, though every feature's is."""
    query, key = features(20, 8), features(20, 8)
    out = triton_backend.pair_softmax_loss(
        query, None, key, torch.tensor(0.0), None, None, [0], True, True, False, True
    )
    assert not out[4].any()
    assert not out[6].any()
    check_loss([query, None, key, torch.tensor(0.0), None, None, [0], True], torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_scale(features, dtype):
    """A scale of 100, where logits pass what fp16 weights could hold."""
    query = features(40, 16, dtype=dtype)
    key = (query.float() + 0.1 * features(40, 16)).to(dtype)
    check_loss([query, None, key, torch.tensor(100.0), None, None, [0], True], dtype)


def test_half_has_the_range_for_any_norm(features):
    """Rows of norm 1e-3 to 1e3 in fp16: each row's gradient is right relative to itself."""
    norms = torch.logspace(-3, 3, 30)[:, None]
    query = (features(30, 12) * norms).half()
    key = (features(30, 12) * norms.flip(0)).half()
    given = [query, None, key, torch.tensor(10.0), None, None, [0], True]
    out = triton_backend.pair_softmax_loss(*given, True, False, True)
    q, _, k = wide(query, None, key)
    per_row = torch.full((30,), 10.0).double()
    loss = exact_loss(q, None, k, per_row, None, None, [0], True)[0].sum()
    # a gradient of 1e3 norms is below fp16's smallest number: compare what fp16 can show
    for x, e in zip((out[4], out[6]), torch.autograd.grad(loss, [q, k]), strict=True):
        error = (x.double() - e).norm(dim=1) / e.norm(dim=1)
        assert error[e.abs().amax(1) > 1e-3].max() < 5e-3


@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e6])
def test_half_has_the_range_for_any_incoming_gradient(features, factor):
    """A loss scaled up or down arrives in row_grad; fp32 shows the gradient that fp16 could not."""
    given = arguments(features, (20, 30, 8), "none", torch.float16)
    row_lse, *_ = triton_backend.pair_softmax(*given, False)
    gradients = triton_backend.pair_softmax_backward(
        *given, row_lse, None, torch.full((20,), factor), None, None, True, True
    )
    plain = triton_backend.pair_softmax_backward(
        *given, row_lse, None, torch.ones(20), None, None, True, True
    )
    for x, one in zip(gradients[2:], plain[2:], strict=True):
        torch.testing.assert_close(x / factor, one, rtol=1e-5, atol=1e-6)
    if factor == 1.0:
        assert torch.equal(gradients[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_loss_keeps_its_gradient(features, dtype):
    """Losses of 1e-6: right in relative terms, and a gradient that the rounding left alone."""
    query = torch.eye(12)[:, :12].to(dtype)
    given = [query, None, query.clone(), torch.tensor(16.0), None, None, [0], True]
    out = triton_backend.pair_softmax_loss(*given, True, False, True)
    q, _, k = wide(query, None, query)
    loss = exact_loss(q, None, k, torch.full((12,), 16.0).double(), None, None, [0], True)[0]
    assert 1e-7 < loss.max() < 1e-5
    torch.testing.assert_close(out[0].double(), loss, rtol=1e-5, atol=0.0)
    expected = torch.autograd.grad(loss.sum(), [q, k])
    for x, e in zip((out[4], out[6]), expected, strict=True):
        assert (x.double() - e).norm() / e.norm() < (1e-4 if dtype is torch.float32 else 8e-3)


def test_nan_and_infinity_propagate(features):
    query, key = features(20, 8), features(33, 8)
    query[2, 3] = torch.nan
    query[4, 1] = torch.inf
    given = (query, key, torch.ones(20), torch.ones(33), None, None, [])
    row_lse, row_max, column_lse, _ = triton_backend.pair_softmax(*given, True)
    expected = (query @ key.T).logsumexp(1)
    assert torch.equal(row_lse.isfinite(), expected.isfinite())
    assert row_lse[2].isnan()
    assert row_max[2].isnan()
    assert row_lse[4] == torch.inf
    assert column_lse.isnan().all()
    loss, *_, grad_query, _, _, _ = triton_backend.pair_softmax_loss(
        query, features(20, 8), key, torch.tensor(3.0), None, None, [], True, True, True, True
    )
    assert loss[2].isnan()
    assert grad_query[2].isnan().all()
    assert grad_query[:2].isfinite().all()


def test_same_bits_again(features):
    rows = features(60, 20, dtype=torch.bfloat16)
    first, second = (
        triton_backend.pair_softmax_symmetric_loss(rows, torch.tensor(7.0), True, True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_autocast(features):
    """The library's products inside keep their own precision."""
    query, key = features(20, 8), features(20, 8)
    given = [query, None, key, torch.tensor(8.0), None, None, [0], True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_loss(given, torch.float32)


def test_too_many_diagonals(features):
    given = (features(9, 2), features(9, 2), torch.ones(9), torch.ones(9), None, None)
    with pytest.raises(ValueError, match="diagonals: 3 may cross"):
        triton_backend.pair_softmax(*given, [0, 1, 2, 3], False)


def test_serves_cpu_tensors_here():
    from ssl_fast.backends import dispatch

    for op in ("pair_softmax", "pair_sigmoid"):
        choice = dispatch.resolve(op, "cpu", torch.float32, (4, 4, 4), "triton")
        assert choice.name == "triton"
    assert device.config_for("sweep", torch.zeros(4, 4)).block_rows == 16


@pytest.mark.parametrize(("matching", "each"), [(False, 2), (True, 1), (True, 2)])
def test_ids(features, matching, each, poisoned_memory):
    """Two ids in a row, and pairs that stay because they match."""
    query, key = features(33, 20), features(50, 20)
    scales = torch.rand(33) * 3, torch.rand(50) * 3
    ids = [torch.randint(0, 4, (size, 2)) for size in (33, 50)]
    for x in ids:
        x[2::7, 0] = x[4::9, -1] = IGNORED_ID
    ids = ids if each == 2 else [x[:, 0].clone() for x in ids]
    rules, rule = (*ids, [1]), {"matching": matching}
    given, exact_given = (query, key, *scales), wide(query, key, *scales)
    exact = reference.pair_softmax(*exact_given, *rules, True, **rule)
    found = triton_backend.pair_softmax(*given, *rules, True, **rule)
    for x, e in zip(found, exact, strict=True):
        assert_near(x, e, torch.float32)
    grads = [torch.randn_like(x) for x in (found[0], found[2], found[3])]
    gradients = triton_backend.pair_softmax_backward(
        *given, *rules, found[0], found[2], *grads, True, True, **rule
    )
    doubled = [x.double() for x in (exact[0], exact[2], *grads)]
    expected = reference.pair_softmax_backward(*exact_given, *rules, *doubled, True, True, **rule)
    for x, e in zip(gradients, expected, strict=True):
        assert_near(x, e, torch.float32)
    found = triton_backend.pair_softmax_expectation(*given, *rules, **rule)
    expected = reference.pair_softmax_expectation(*exact_given, *rules, **rule)
    for x, e in zip(found, expected, strict=True):
        assert_near(x, e, torch.float32)
    given, rules = (query, torch.tensor(2.0), scales[0]), (ids[0], 0)
    exact_given = [x.double() for x in given]
    exact = reference.pair_softmax_symmetric(*exact_given, *rules, **rule)
    found = triton_backend.pair_softmax_symmetric(*given, *rules, **rule)
    for x, e in zip(found, exact, strict=True):
        assert_near(x, e, torch.float32)
    back = (found[0], torch.randn(33))
    found = triton_backend.pair_softmax_symmetric_backward(*given, *rules, *back, **rule)
    back = [x.double() for x in (exact[0], back[1])]
    expected = reference.pair_softmax_symmetric_backward(*exact_given, *rules, *back, **rule)
    for x, e in zip(found, expected, strict=True):
        assert_near(x, e, torch.float32)
