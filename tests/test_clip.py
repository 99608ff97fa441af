"""clip_loss and ClipLoss: equal to open_clip's formula, in values and in every gradient."""

from __future__ import annotations

import pickle

import plain_losses as plainly
import pytest
import torch
from tolerances import assert_near

import ssl_fast

REDUCTIONS = ["mean", "sum", "none"]


def pairs(features, n=13, d=31, dtype=torch.float32):
    return [features(n, d, dtype=dtype, requires_grad=True) for _ in range(2)]


def open_clip_loss(images, texts, logit_scale, logit_bias=None):
    """open_clip's ClipLoss in one process."""
    logits = logit_scale * images @ texts.T
    logits = logits if logit_bias is None else logits + logit_bias
    labels = torch.arange(len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def plain_clip(images, texts, scale, bias, **options):
    return plainly.clip(images, texts, scale, **options) + 0.0 * bias


def evaluated(function, tensors, scale, weight, **options):
    bias = torch.tensor(-2.0, dtype=scale.dtype, requires_grad=True)
    leaves = [*(x.detach().requires_grad_() for x in tensors), scale.requires_grad_(), bias]
    loss = function(*leaves, **options)
    return loss, *torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 13, 70])
def test_equals_the_plain_formula(backend, features, n, normalize, reduction, dtype):
    tensors = pairs(features, n, dtype=dtype)
    weight = torch.randn(n) if reduction == "none" else torch.tensor(1.7)
    options = {"normalize": normalize, "reduction": reduction}
    out = evaluated(
        ssl_fast.clip_loss, tensors, torch.tensor(5.0), weight, **options, backend=backend
    )
    wide = [x.double() for x in tensors]
    exact = evaluated(plain_clip, wide, torch.tensor(5.0).double(), weight, **options)
    for i, (x, e) in enumerate(zip(out, exact, strict=True)):
        assert x.dtype is (dtype if i in (1, 2) else torch.float32)
        assert_near(x, e, dtype, what=f"result {i}")
    assert out[-1].item() == 0.0


@pytest.mark.parametrize("bias", [None, -3.0, torch.tensor(-3.0)])
def test_equals_open_clip(backend, features, bias):
    """Its ClipLoss, called as its training loop does."""
    images, texts = (torch.nn.functional.normalize(x, dim=1) for x in pairs(features))
    scale = torch.tensor(3.0, requires_grad=True)
    expected = open_clip_loss(images, texts, scale.exp(), bias)
    module = ssl_fast.ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1,
        backend=backend,
    )  # fmt: skip
    found = module(images, texts, scale.exp(), bias, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(found, expected)
    inputs = (images, texts, scale)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_scale_100(backend, features, dtype):
    """No NaN where a log-sum-exp without its maximum would overflow; alike and opposed rows."""
    images, texts = pairs(features, 33)
    texts.data[:11] = images.data[:11]
    texts.data[11:22] = -images.data[11:22]
    out = evaluated(
        ssl_fast.clip_loss, [x.to(dtype) for x in (images, texts)], torch.tensor(100.0),
        torch.tensor(1.0), normalize=True, backend=backend,
    )  # fmt: skip
    exact = evaluated(
        plain_clip, [x.to(dtype).double() for x in (images, texts)],
        torch.tensor(100.0).double(), torch.tensor(1.0), normalize=True,
    )  # fmt: skip
    for x, e in zip(out, exact, strict=True):
        assert_near(x, e, dtype)


def test_zero_rows(backend, features, dtype):
    tensors = [x.detach() for x in pairs(features, dtype=dtype)]
    for x in tensors:
        x[::3] = 0.0
    out = evaluated(
        ssl_fast.clip_loss, tensors, torch.tensor(100.0), torch.ones(()),
        normalize=True, backend=backend,
    )  # fmt: skip
    assert all(torch.isfinite(x).all() for x in out)
    assert all(torch.all(x[::3] == 0.0) for x in out[1:3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_in_float64(features, reduction):
    images, texts = pairs(features, 4, 3, dtype=torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(images, texts, scale):
        return ssl_fast.clip_loss(images, texts, scale, normalize=True, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (images, texts, scale))
    assert torch.autograd.gradgradcheck(loss, (images, texts, scale))


def test_gradients_reach_only_what_asks(backend, features):
    images, texts = pairs(features)
    expected = torch.autograd.grad(open_clip_loss(images, texts, 5.0), (images, texts))
    for frozen in (0, 1):
        given = [x.detach() if i == frozen else x for i, x in enumerate((images, texts))]
        loss = ssl_fast.clip_loss(*given, 5.0, backend=backend)
        (grad,) = torch.autograd.grad(loss, given[1 - frozen])
        torch.testing.assert_close(grad, expected[1 - frozen], rtol=1e-4, atol=1e-6)
    assert not ssl_fast.clip_loss(images.detach(), texts.detach(), 5.0).requires_grad


def test_stats(backend, features):
    images, texts = pairs(features)
    loss, stats = ssl_fast.clip_loss(images, texts, 5.0, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, ssl_fast.clip_loss(images, texts, 5.0, backend=backend))
    logits = (5.0 * images @ texts.T).detach()
    torch.testing.assert_close(stats.lse, logits.logsumexp(dim=1))
    wins = logits.argmax(dim=1) == torch.arange(13)
    torch.testing.assert_close(stats.top1, wins.float().mean())
    torch.testing.assert_close(stats.positive_similarity, logits.diagonal().mean() / 5.0)
    named, again = ssl_fast.clip_loss(images, texts, 5.0, output_dict=True, return_stats=True)
    assert named.keys() == {"contrastive_loss"}
    torch.testing.assert_close(again.lse, stats.lse)


def test_memory_grows_with_the_batch(features):
    """Near the operands: no copy of the features either, which D = 256 would show."""
    images, texts = pairs(features, 4096, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        ssl_fast.clip_loss(images, texts, 5.0).backward()
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) < 4096 * 4096 * 4 / 2


def test_module(features):
    images, texts = pairs(features)
    module = ssl_fast.ClipLoss(normalize=True, label_smoothing=0.1, backend="reference")
    weight = torch.rand(13)
    expected = ssl_fast.clip_loss(
        images, texts, 5.0, normalize=True, label_smoothing=0.1, row_weight=weight,
        backend="reference",
    )  # fmt: skip
    assert torch.equal(module(images, texts, 5.0, row_weight=weight), expected)
    copy = pickle.loads(pickle.dumps(module))
    assert torch.equal(copy(images, texts, 5.0, row_weight=weight), expected)
    assert not module.state_dict()
    assert "label_smoothing=0.1" in repr(module)


def test_empty(backend):
    empty = torch.empty(0, 5, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = ssl_fast.clip_loss(empty, empty * 1.0, 5.0, reduction=reduction, backend=backend)
        expected = open_clip_loss(empty, empty, 5.0)
        if reduction == "mean":
            torch.testing.assert_close(loss, expected, equal_nan=True)
        assert torch.autograd.grad(loss.sum(), empty)[0].shape == (0, 5)


X = torch.zeros(4, 3)
BAD = [
    ({"image_features": None}, TypeError, "image_features must be a tensor"),
    ({"image_features": X.int()}, TypeError, "image_features must be float32.*int32"),
    ({"text_features": X[0]}, ValueError, r"text_features must have shape \[N, D\]; got \(3,\)"),
    ({"text_features": X[:3]}, ValueError, "text_features must have as many rows as image_fea"),
    ({"text_features": X[:, :2]}, ValueError, "text_features must have as many components"),
    ({"text_features": X.half()}, TypeError, "text_features must have the dtype of image_feat"),
    ({"text_features": X.to("meta")}, ValueError, "text_features must be on the device of"),
    ({"logit_scale": "5"}, TypeError, "logit_scale must be a number or a tensor; got '5'"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a number or a tensor"),
    ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must be one number"),
    ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale must be floating"),
    ({"logit_scale": torch.ones((), device="meta")}, ValueError, "logit_scale must be a number or"),
    ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias must be one number"),
    ({"logit_bias": "0"}, TypeError, "logit_bias must be a number or a tensor"),
    ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.clip_loss(**{"image_features": X, "text_features": X, "logit_scale": 5.0, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
        ({"hard_negative_beta": -1.0}, "hard_negative_beta must be 0 or more"),
    ],
)
def test_module_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        ssl_fast.ClipLoss(**wrong)
