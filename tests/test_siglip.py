"""siglip_loss and SigLipLoss: equal to open_clip's formula, every pair a decision of its own."""

from __future__ import annotations

import itertools
import pickle

import plain_losses as plainly
import pytest
import torch
from plain_losses import assert_equals_float64, value_and_gradients
from tolerances import assert_near

import ssl_fast

REDUCTIONS = ["mean", "sum", "none"]


def arguments_for(features, n=13, d=31, dtype=torch.float32, scale=10.0, bias=-10.0):
    """Images, texts, scale and bias (SigLIP's at the start) that all ask for a gradient."""
    images, texts = (features(n, d, dtype=dtype, requires_grad=True) for _ in range(2))
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    return [
        images,
        texts,
        *(torch.tensor(x, dtype=kind, requires_grad=True) for x in (scale, bias)),
    ]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 13, 130])
def test_equals_the_plain_formula(backend, features, n, normalize, reduction, dtype):
    options = {"reduction": reduction, "normalize": normalize}
    assert_equals_float64(
        lambda *x: ssl_fast.siglip_loss(*x, **options, backend=backend),
        lambda *x: plainly.siglip(*x, **options),
        arguments_for(features, n, dtype=dtype),
        dtype,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_in_float64(features, reduction):
    inputs = arguments_for(features, 4, 3, torch.float64, scale=2.5, bias=-0.5)

    def loss(*x):
        return ssl_fast.siglip_loss(*x, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_reach_only_what_asks(backend, features, reduction):
    given = [x.detach() for x in arguments_for(features)]
    for asked in itertools.product([False, True], repeat=4):
        inputs = [x.clone().requires_grad_(ask) for x, ask in zip(given, asked, strict=True)]
        loss = ssl_fast.siglip_loss(*inputs, reduction=reduction, backend=backend)
        assert loss.requires_grad is any(asked)
        if not any(asked):
            continue
        loss.sum().backward()
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        plainly.siglip(*wide, reduction).sum().backward()
        for x, e in zip(inputs, wide, strict=True):
            assert (x.grad is None) is (e.grad is None)
            if x.grad is not None:
                assert_near(x.grad, e.grad, torch.float32)


def test_nothing_is_made_without_grad(backend, features):
    inputs = arguments_for(features)
    with torch.no_grad():
        loss = ssl_fast.siglip_loss(*inputs, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, ssl_fast.siglip_loss(*inputs, backend=backend).detach())


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (100.0, 50.0), (0.0, 0.0), (1e4, 0.0)])
def test_large_scales(backend, features, scale, bias, dtype):
    inputs = arguments_for(features, dtype=dtype, scale=scale, bias=bias)
    inputs[0].data[1], inputs[0].data[2] = inputs[1].data[1], -inputs[1].data[2]
    for reduction in ("mean", "none"):
        assert_equals_float64(
            lambda *x, r=reduction: ssl_fast.siglip_loss(*x, reduction=r, backend=backend),
            lambda *x, r=reduction: plainly.siglip(*x, reduction=r),
            inputs,
            dtype,
        )


def test_small_losses_keep_their_digits(backend):
    """Every pair decided: terms of exp(-30) and exp(-34), and gradients as small."""
    rows = torch.eye(9).requires_grad_()
    for reduction in REDUCTIONS:
        inputs = [rows, rows.detach(), torch.tensor(64.0), torch.tensor(-30.0)]
        out = value_and_gradients(
            lambda *x, r=reduction: ssl_fast.siglip_loss(*x, reduction=r, backend=backend), inputs
        )
        terms = (
            torch.log1p(torch.tensor([-34.0, -30.0]).double().exp())
            @ torch.tensor([1.0, 8]).double()
        )
        exact = terms * (9 if reduction == "sum" else 1)
        torch.testing.assert_close(out[0].double(), exact.expand(out[0].shape), rtol=1e-5, atol=0.0)
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        expected = value_and_gradients(lambda *x, r=reduction: plainly.siglip(*x, r), wide)
        torch.testing.assert_close(out[1].double(), expected[1], rtol=1e-5, atol=0.0)


def test_zero_rows(backend, features, dtype):
    inputs = arguments_for(features, dtype=dtype)
    for x in inputs[:2]:
        x.data[::3] = 0.0
    for reduction, normalize in itertools.product(REDUCTIONS, [True, False]):
        out = value_and_gradients(
            lambda *x, r=reduction, n=normalize: ssl_fast.siglip_loss(
                *x, reduction=r, normalize=n, backend=backend
            ),
            inputs,
        )
        assert all(torch.isfinite(x).all() for x in out)
        if normalize:
            assert all(torch.all(x[::3] == 0.0) for x in out[1:3])


def test_sizes_at_the_edge(backend):
    empty = torch.empty(0, 5, requires_grad=True)
    scale, bias = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = ssl_fast.siglip_loss(
            empty, empty.detach(), scale, bias, reduction=reduction, backend=backend
        )
        expected = plainly.siglip(empty, empty, scale, bias, reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        grads = torch.autograd.grad(loss.sum(), (empty, scale, bias))
        assert grads[0].shape == (0, 5)
        assert reduction == "mean" or all(x == 0.0 for x in grads[1:])
    # No kernel multiplies rows without a component.
    no_width = [torch.empty(3, 0)] * 2
    no_width = ssl_fast.siglip_loss(*no_width, 5.0, -2.0, backend="reference")
    exact = plainly.siglip(torch.zeros(3, 1), torch.zeros(3, 1), 5.0, -2.0)
    torch.testing.assert_close(no_width, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory_grows_with_the_batch_and_not_its_square(features, reduction):
    inputs = arguments_for(features, n=8192, d=8)
    with torch.profiler.profile(profile_memory=True) as profile:
        ssl_fast.siglip_loss(*inputs, reduction=reduction).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 8192 * 8192 * 4 / 2


def test_meta_tensors_have_shapes():
    images, texts = torch.empty(13, 5, device="meta"), torch.empty(13, 5, device="meta")
    for reduction in REDUCTIONS:
        loss = ssl_fast.siglip_loss(images, texts, 2.0, -1.0, reduction=reduction)
        assert loss.device.type == "meta"
        assert loss.shape == ((13,) if reduction == "none" else ())


def test_forms_of_scale_and_bias(features):
    images, texts, *_ = arguments_for(features)
    expected = ssl_fast.siglip_loss(images, texts, 7.0, -3.0)
    for form in (
        torch.tensor,
        lambda x: torch.tensor([x]),
        lambda x: torch.tensor(x).double(),
        int,
    ):
        found = ssl_fast.siglip_loss(images, texts, form(7.0), form(-3.0))
        torch.testing.assert_close(found, expected)


def test_float64_goes_to_the_reference(features, recwarn):
    inputs = arguments_for(features, dtype=torch.float64)
    loss = ssl_fast.siglip_loss(*inputs)
    torch.testing.assert_close(loss, plainly.siglip(*inputs))
    assert loss.dtype is torch.float64
    assert not recwarn.list


def test_module(features):
    inputs = arguments_for(features)
    expected = ssl_fast.siglip_loss(*inputs)
    for way in (None, "bidir", "shift", "reduce", "gather"):
        module = ssl_fast.SigLipLoss(True, 0, 1, way)
        assert torch.equal(module(*inputs), expected)
    named = module(*inputs, output_dict=True)
    assert list(named) == ["contrastive_loss"]
    assert torch.equal(named["contrastive_loss"], expected)
    options = {"normalize": True, "reduction": "none", "backend": "reference"}
    module = pickle.loads(pickle.dumps(ssl_fast.SigLipLoss(**options)))
    assert torch.equal(module(*inputs), ssl_fast.siglip_loss(*inputs, **options))
    assert "reduction='none'" in repr(module)
    assert not module.state_dict()


X = torch.zeros(4, 3)
BAD = [
    ({"image_features": None}, TypeError, r"image_features must be a tensor \[N, D\]; got None"),
    ({"image_features": X.long()}, TypeError, "image_features must be float32.*int64"),
    ({"image_features": X[0]}, ValueError, r"image_features must have shape \[N, D\]; got \(3,\)"),
    ({"text_features": X.to_sparse()}, TypeError, "text_features must be a dense tensor"),
    ({"text_features": X[:3]}, ValueError, "text_features must have as many rows as image_feature"),
    ({"text_features": X[:, :2]}, ValueError, "text_features must have as many components as imag"),
    ({"text_features": X.half()}, TypeError, "text_features must have the dtype of image_features"),
    ({"text_features": X.to("meta")}, ValueError, "text_features must be on the device of image_f"),
    ({"logit_scale": "2"}, TypeError, "logit_scale must be a number or a tensor; got '2'"),
    ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must be one number; got a torch.flo"),
    ({"logit_bias": None}, TypeError, "logit_bias must be a number or a tensor; got None"),
    ({"logit_bias": torch.tensor(2)}, TypeError, "logit_bias must be floating; got a torch.int64"),
    ({"logit_bias": torch.ones(4)}, ValueError, "logit_bias must be one number; got"),
    (
        {"logit_bias": torch.ones((), device="meta")},
        ValueError,
        "logit_bias must be a number or on",
    ),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'; got 'max'"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    given = {"image_features": X, "text_features": X, "logit_scale": 1.0, "logit_bias": 0.0}
    with pytest.raises(error, match=message):
        ssl_fast.siglip_loss(**{**given, **wrong})
    if next(iter(wrong)) not in given:
        with pytest.raises(error, match=message):
            ssl_fast.SigLipLoss(**wrong)
    with pytest.raises(ValueError, match="dist_impl must be one of 'bidir', 'shift', 'reduce'"):
        ssl_fast.SigLipLoss(dist_impl="broadcast")
