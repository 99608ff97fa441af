"""The softmax losses with options at the edges: layouts, NaN, autocast, small and large numbers."""

from __future__ import annotations

import copy
import itertools
import pickle

import plain_losses as plainly
import pytest
import torch
from plain_losses import assert_equals_float64, value_and_gradients
from tolerances import assert_near

import ssl_fast

N = 11
IGNORE = torch.arange(N) % 4 == 1
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
CLASSES = torch.arange(N) // 3
REDUCTIONS = ["mean", "sum", "none"]

# As functions of two sets of rows and a temperature.
OURS = {
    "info_nce": lambda q, k, t, **o: ssl_fast.info_nce(q, k, None, t, **o),
    "nt_xent": ssl_fast.nt_xent,
    "clip": lambda q, k, t, **o: ssl_fast.clip_loss(q, k, 1.0 / t, normalize=True, **o),
}
PLAIN = {
    "info_nce": lambda q, k, t, **o: plainly.info_nce(q, k, None, t, **o),
    "nt_xent": plainly.nt_xent,
    "clip": lambda q, k, t, **o: plainly.clip(q, k, 1.0 / t, normalize=True, **o),
}
NUMBERS = [
    {"label_smoothing": 0.2},
    {"margin": 0.2},
    {"decoupled": True},
    {"hard_negative_beta": 0.5},
    {"label_smoothing": 0.1, "margin": 0.1, "decoupled": True, "hard_negative_beta": 1.5},
]


@pytest.fixture(params=OURS)
def name(request):
    return request.param


def rows_and_temperature(features, dtype=torch.float32, temperature=0.2):
    rows = [features(N, 7, dtype=dtype, requires_grad=True) for _ in range(2)]
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    return [*rows, torch.tensor(temperature, dtype=kind, requires_grad=True)]


@pytest.mark.parametrize("option", NUMBERS, ids=str)
def test_temperature_of_a_hundredth(backend, features, name, option):
    """Logits of 100 and -100 and their exponentials, which fp32 doesn't hold."""
    inputs = rows_and_temperature(features, temperature=0.01)
    inputs[0].data[1], inputs[0].data[2] = inputs[1].data[1], -inputs[1].data[2]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for options in ({**option, "query_ids": IDS}, {**option, "ignore": IGNORE}):
        out = value_and_gradients(
            lambda *x, o=options: OURS[name](*x, **o, backend=backend), inputs
        )
        exact = value_and_gradients(lambda *x, o=options: PLAIN[name](*x, **o), wide)
        for x, e in zip(out, exact, strict=True):
            # A logit of 100 has an ulp of 8e-6, with hard negatives one of 250.
            assert torch.isfinite(x).all()
            assert (x - e).norm() <= 1e-4 * e.norm() + 1e-5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_losses_keep_their_digits(backend, name, reduction):
    """Every positive found by far: losses of 1e-13 with weights, ids or ignored rows."""
    rows = torch.eye(N)
    others = N - 1
    per_row = [
        ({"row_weight": torch.ones(N)}, others),
        ({"query_ids": torch.arange(N)}, others),
        ({"ignore": torch.arange(N) >= N - 2}, others - 2),
    ]
    for options, negatives in per_row:
        loss = OURS[name](rows, rows, 1 / 32, **options, reduction=reduction, backend=backend)
        # nt_xent: the other images have two views each.
        number = negatives * (2 if name == "nt_xent" else 1)
        exact = torch.log1p(number * torch.tensor(-32.0).double().exp())
        if reduction == "sum":
            exact = exact * (negatives + 1) * (2 if name == "nt_xent" else 1)
        found = loss[loss != 0.0].double()
        assert len(found.flatten()) == (number + number // negatives if loss.dim() else 1)
        torch.testing.assert_close(found, exact.expand(found.shape), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("option", [{}, *NUMBERS], ids=str)
def test_layouts(backend, features, name, option):
    """Every second row and component, rows of stride 0, per-row options with strides."""
    big, row = features(2 * N, 14), features(1, 7)
    weight, ids, ignore = torch.rand(2 * N)[::2], IDS.repeat_interleave(2)[1::2], IGNORE
    ignore = torch.stack([ignore, ~ignore], dim=1)[:, 0]
    options = {**option, "row_weight": weight, "query_ids": ids, "ignore": ignore}
    same = {**option, "row_weight": weight.clone(), "query_ids": IDS, "ignore": IGNORE}
    for query, key in (
        (big[::2, ::2], big[1::2, 1::2]),
        (big[:N, :7].T.contiguous().T, big[N:, 7:]),
        (row.expand(N, 7), big[:N, :1].expand(N, 7)),
    ):
        results = []
        for make, given in ((lambda x: x, options), (torch.clone, same)):
            leaves = [make(x.detach()).requires_grad_() for x in (query, key)]
            loss = OURS[name](*leaves, 0.2, **given, backend=backend)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert_near(a, b.double(), torch.float32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_hold_anything(backend, features, name, reduction, dtype):
    """NaN in their features and weights; the result is that of the batch without them."""
    inputs = rows_and_temperature(features, dtype)
    weight = torch.rand(N)
    kept = [x.detach()[~IGNORE].requires_grad_() for x in inputs[:2]]
    kept.append(inputs[2].detach().requires_grad_())
    for x in (*inputs[:2], weight):
        x.data[IGNORE] = torch.nan
    weight.requires_grad_()
    for number in ({}, {"label_smoothing": 0.1, "hard_negative_beta": 0.3}):
        options = {**number, "reduction": reduction, "backend": backend}
        loss = OURS[name](*inputs, row_weight=weight, ignore=IGNORE, **options)
        grads = torch.autograd.grad(loss.sum(), [*inputs, weight])
        expected = OURS[name](*kept, row_weight=weight.detach()[~IGNORE], **options)
        others = torch.autograd.grad(expected.sum(), kept)
        if reduction == "none":
            ignored = IGNORE.repeat(2) if name == "nt_xent" else IGNORE
            assert torch.all(loss[ignored] == 0.0)
            loss = loss[~ignored]
        assert_near(loss, expected, torch.float32)
        for grad, other in zip(grads[:2], others[:2], strict=True):
            assert torch.all(grad[IGNORE] == 0.0)
            assert_near(grad[~IGNORE], other, dtype)
        assert_near(grads[2], others[2], torch.float32)
        assert torch.all(grads[3][IGNORE] == 0.0)
        assert torch.isfinite(grads[3]).all()


def test_weights_of_ignored_rows_in_other_losses(features):
    query, key, _ = rows_and_temperature(features)
    weight = torch.rand(N)
    unknown = weight.masked_fill(IGNORE, torch.nan)
    bank = query.detach().roll(1, 1)
    for reduction in REDUCTIONS:
        options = {"ignore": IGNORE, "reduction": reduction}
        for loss in (
            lambda **o: ssl_fast.sup_con(query, CLASSES, **o),
            lambda **o: ssl_fast.info_nce(query, key, bank, **o),
            lambda **o: ssl_fast.info_nce(
                query, key, key[:, None].roll(1, 0), negative_mode="paired", **o
            ),
        ):
            found = loss(row_weight=unknown, **options)
            assert torch.equal(found, loss(row_weight=weight, **options))


@pytest.mark.parametrize("loss", [*OURS, "sup_con"])
def test_autocast_lowers_no_sum(backend, features, loss):
    """Inputs are cast once and nothing else: bit for bit what bfloat16 inputs give."""

    def value(query, key):
        options = {"ignore": IGNORE, "label_smoothing": 0.3, "return_stats": True}
        options |= {"row_weight": weight, "backend": backend}
        if loss == "sup_con":
            return ssl_fast.sup_con(query, CLASSES, 0.2, **options, query_ids=IDS)
        return OURS[loss](query, key, 0.2, **options, query_ids=IDS)

    weight = torch.rand(N)
    query, key, _ = rows_and_temperature(features)
    expected, stats = value(query.bfloat16(), key.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found, others = value(query, key)
    assert torch.equal(found, expected)
    for x, e in zip(others, stats, strict=True):
        assert x.dtype is torch.float32
        torch.testing.assert_close(x, e, rtol=0.0, atol=0.0, equal_nan=True)


def test_second_derivatives_in_float64(features, name):
    rows = [features(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    ids, ignore = torch.tensor([0, 1, 0, 2]), torch.tensor([False, False, False, True])
    for number in NUMBERS:

        def value(query, key, temperature, weight, number=number):
            options = {"row_weight": weight, "query_ids": ids, "ignore": ignore, **number}
            return OURS[name](query, key, temperature, **options)

        assert torch.autograd.gradgradcheck(value, (*rows, temperature, weight))


def test_options_that_change_nothing(backend, features, name):
    inputs = rows_and_temperature(features)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "backend": backend}
        expected = value_and_gradients(lambda *x, o=options: OURS[name](*x, **o), inputs)
        for neutral in (
            {"row_weight": torch.ones(N)},
            {"row_weight": torch.ones(N, dtype=torch.bfloat16)},
            {"ignore": torch.zeros(N, dtype=torch.bool)},
            {"query_ids": torch.arange(N) - 5},
            {"query_ids": 2**63 - 1 - torch.arange(N)},
            {"query_ids": -(2**63) + 1 + torch.arange(N)},
            {"hard_negative_beta": 1e-6},
            {"label_smoothing": 1e-9, "margin": 1e-9},
        ):
            found = value_and_gradients(
                lambda *x, o=options, n=neutral: OURS[name](*x, **o, **n), inputs
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("option", [{}, *NUMBERS], ids=str)
def test_clip_is_both_directions_of_info_nce(backend, features, option):
    query, key, temperature = rows_and_temperature(features)
    options = {**option, "reduction": "none", "ignore": IGNORE, "backend": backend}
    ids = {"query_ids": IDS, "key_ids": IDS.roll(3)}
    swapped = {"query_ids": ids["key_ids"], "key_ids": ids["query_ids"]}
    found = OURS["clip"](query, key, temperature, **options, **ids)
    one = ssl_fast.info_nce(query, key, None, temperature, **options, **ids)
    other = ssl_fast.info_nce(key, query, None, temperature, **options, **swapped)
    torch.testing.assert_close(found, (one + other) / 2)


@pytest.mark.parametrize("option", [{}, *NUMBERS], ids=str)
def test_paired_negatives_with_options(features, option):
    inputs = [*rows_and_temperature(features), features(N, 5, 7, requires_grad=True)]
    inputs.append(torch.rand(N, requires_grad=True))
    for reduction, ignore in itertools.product(REDUCTIONS, (None, IGNORE)):
        options = {**option, "negative_mode": "paired", "reduction": reduction, "ignore": ignore}
        assert_equals_float64(
            lambda q, k, t, n, w, o=options: ssl_fast.info_nce(q, k, n, t, row_weight=w, **o),
            lambda q, k, t, n, w, o=options: plainly.info_nce(q, k, n, t, row_weight=w, **o),
            inputs,
            torch.float32,
        )


def test_modules_take_options(features):
    query, key, _ = rows_and_temperature(features)
    numbers = {"label_smoothing": 0.1, "margin": 0.2, "decoupled": True, "hard_negative_beta": 0.5}
    per_row = {"query_ids": IDS, "row_weight": torch.rand(N), "ignore": IGNORE}
    for module, expected in (
        (
            ssl_fast.InfoNCE(0.3, **numbers),
            ssl_fast.info_nce(query, key, None, 0.3, **numbers, **per_row),
        ),
        (
            ssl_fast.NTXentLoss(0.3, **numbers),
            ssl_fast.nt_xent(query, key, 0.3, **numbers, **per_row),
        ),
    ):
        for each in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(each(query, key, **per_row), expected)
        assert "hard_negative_beta=0.5" in repr(module)


def test_clip_at_the_edge(backend, features):
    """One pair has no negatives; a scale alone may ask for a gradient; layouts without options."""
    row, scale = torch.randn(1, 5, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    loss = ssl_fast.clip_loss(row, torch.randn(1, 5), scale, backend=backend)
    assert loss.item() == 0.0
    assert all(torch.all(x == 0.0) for x in torch.autograd.grad(loss, (row, scale)))
    rows = [features(N, 7) for _ in range(2)]
    for reduction in REDUCTIONS:
        assert_equals_float64(
            lambda s, r=reduction: ssl_fast.clip_loss(*rows, s, reduction=r, backend=backend),
            lambda s, r=reduction: plainly.clip(*(x.to(s.dtype) for x in rows), s, r),
            [scale],
            torch.float32,
        )
    for form in (7, torch.tensor([7.0]), torch.tensor(7.0).double()):
        torch.testing.assert_close(
            ssl_fast.clip_loss(*rows, form, backend=backend), plainly.clip(*rows, 7.0)
        )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_clip_memory_without_a_mean(features, reduction):
    images, texts = (features(4096, 8, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(profile_memory=True) as profile:
        ssl_fast.clip_loss(images, texts, 5.0, reduction=reduction).sum().backward()
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) < 4096 * 4096 * 4 / 2


def test_clip_meta_tensors_have_shapes():
    images = torch.empty(N, 5, device="meta")
    for reduction, option in itertools.product(REDUCTIONS, [{}, *NUMBERS]):
        loss = ssl_fast.clip_loss(images, images, 2.0, reduction=reduction, **option)
        assert loss.device.type == "meta"
        assert loss.shape == ((N,) if reduction == "none" else ())


def test_a_bank_keeps_what_ignored_rows_would_replace(features):
    bank = ssl_fast.MemoryBank(8, 3)
    first = bank.keys.clone()
    rows = torch.randn(5, 3)
    ignore = torch.tensor([False, True, False, False, True])
    rows[ignore] = torch.nan
    bank.enqueue(rows, ignore)
    expected = torch.cat([torch.where(ignore[:, None], first[:5], rows), first[5:]])
    assert torch.equal(bank.keys, expected)
    assert bank.position.item() == 5
    with pytest.raises(TypeError, match=r"ignore must be bool; got torch\.float32"):
        bank.enqueue(rows, torch.ones(5))
    with pytest.raises(ValueError, match=r"ignore must have shape \(5,\); got \(4,\)"):
        bank.enqueue(rows, ignore[:4])
    # Of more rows than there are places, the last ones with their marks.
    many, marks = torch.randn(11, 3), torch.arange(11) % 2 == 0
    before = bank.keys.clone()
    bank.enqueue(many, marks)
    places = (5 + torch.arange(3, 11)) % 8
    expected = torch.where(marks[3:, None], before[places], many[3:])
    assert torch.equal(bank.keys[places], expected)
    module = ssl_fast.NTXentLoss(0.2, (32, 7))
    out0, out1, _ = rows_and_temperature(features)
    out1.data[IGNORE] = torch.nan
    module(out0, out1, ignore=IGNORE)
    assert torch.isfinite(module.memory_bank.keys).all()
    assert torch.isfinite(module(out0, out1, ignore=IGNORE))


def test_a_bank_takes_rows_of_any_layout():
    for rows in (torch.randn(10, 6)[::2, ::2], torch.randn(1, 3).expand(5, 3), torch.randn(3, 5).T):
        bank = ssl_fast.MemoryBank(8, 3).half()
        bank.enqueue(rows)
        assert torch.equal(bank.keys[:5], rows.half())
        assert bank.position.dtype is torch.int64
        twin = copy.deepcopy(bank)
        twin.enqueue(rows)
        assert not torch.equal(twin.keys, bank.keys)


@pytest.mark.parametrize("option", [{}, *NUMBERS], ids=str)
def test_a_bank_with_options_may_be_filled_before_the_backward(backend, features, dtype, option):
    """Every option reads the keys in the forward, whatever the reduction; so does sup_con."""
    query, key, temperature = rows_and_temperature(features, dtype)
    leaves = [query, temperature]
    common = {"normalize": "margin" not in option, "backend": backend, "ignore": IGNORE}
    ids = {"query_ids": IDS, "key_ids": torch.arange(20)}
    classes = {"ref_labels": torch.arange(20) // 2, **ids}
    for reduction in ("mean", "none"):
        options = {**common, "reduction": reduction}
        for loss in (
            lambda keys, o=options: ssl_fast.info_nce(
                query, key, keys, temperature, **o, **ids, **option
            ),
            lambda keys, o=options: ssl_fast.sup_con(
                query, CLASSES, temperature, ref_emb=keys, **o, **classes, **option
            ),
        ):
            bank = ssl_fast.MemoryBank(20, 7, dtype)
            expected = torch.autograd.grad(loss(bank.keys.clone()).sum(), leaves)
            value = loss(bank.keys)
            bank.enqueue(torch.full((20, 7), torch.nan))
            found = torch.autograd.grad(value.sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
