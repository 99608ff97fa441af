"""nt_xent and NTXentLoss: equal to the plain formula and to what other packages compute."""

from __future__ import annotations

import pickle

import plain as plainly
import pytest
import torch
from tolerances import assert_near

import ssl_fast

REDUCTIONS = ["mean", "sum", "none"]


def views(features, n=33, d=31, dtype=torch.float32, requires_grad=True):
    return [features(n, d, dtype=dtype, requires_grad=requires_grad) for _ in range(2)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 13, 130])
def test_equals_the_plain_formula(backend, features, n, normalize, reduction, dtype):
    z = views(features, n, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in z]
    weight = torch.randn(2 * n) if reduction == "none" else torch.tensor(1.7)
    results = []
    for function, inputs, temperature in (
        (lambda *a, **o: ssl_fast.nt_xent(*a, **o, backend=backend), z, torch.tensor(0.2)),
        (plainly.nt_xent, wide, torch.tensor(0.2).double()),
        (plainly.nt_xent, z, torch.tensor(0.2)),
    ):
        leaves = [*inputs, temperature.requires_grad_()]
        loss = function(*leaves, reduction=reduction, normalize=normalize)
        total = (loss * weight.to(loss.dtype)).sum()
        results.append([loss, *torch.autograd.grad(total, leaves)])
    for i, (x, e, p) in enumerate(zip(*results, strict=True)):
        assert x.dtype is (dtype if i in (1, 2) else torch.float32)
        assert_near(x, e, dtype, plain=p, what=f"result {i}")


def test_equals_lightly(features):
    """Its NTXentLoss in its four blocks; the package itself asks for torchvision."""
    z = views(features)
    other = ~torch.eye(33, dtype=torch.bool)
    for temperature in (0.1, 0.5):
        out0, out1 = (torch.nn.functional.normalize(x, dim=1) for x in z)
        blocks = [(a @ b.T / temperature) for a in (out0, out1) for b in (out0, out1)]
        own = [blocks[i][other].view(33, -1) for i in (0, 3)]
        logits = torch.cat([torch.cat([blocks[1], own[0]], 1), torch.cat([blocks[2], own[1]], 1)])
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(33).repeat(2))
        found = ssl_fast.NTXentLoss(temperature)(*z)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-6
        )


def test_equals_pytorch_metric_learning(features):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z = views(features)
    labels = torch.arange(33).repeat(2)
    expected = losses.NTXentLoss(0.2)(torch.cat(z), labels)
    found = ssl_fast.nt_xent(*z, 0.2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-6
    )


def test_equals_info_nce_without_the_own_view(features):
    """The rows of z0 against z1 and z0, which is InfoNCE with ids in other words."""
    z0, z1 = views(features, requires_grad=False)
    rows = ssl_fast.nt_xent(z0, z1, 0.3, "none")
    z = torch.nn.functional.normalize(torch.cat([z0, z1]))
    logits = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
    positive = logits.diagonal(33)
    torch.testing.assert_close(rows[:33], logits[:33].logsumexp(dim=1) - positive)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_in_float64(features, reduction):
    z = views(features, 4, 3, dtype=torch.float64)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(z0, z1, temperature):
        return ssl_fast.nt_xent(z0, z1, temperature, reduction)

    assert torch.autograd.gradcheck(loss, (*z, temperature))
    assert torch.autograd.gradgradcheck(loss, (*z, temperature))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_view_frozen(backend, features, reduction):
    z0, z1 = views(features)
    expected = torch.autograd.grad(plainly.nt_xent(z0, z1, reduction=reduction).sum(), z1)
    loss = ssl_fast.nt_xent(z0.detach(), z1, reduction=reduction, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), z1), expected, rtol=1e-4, atol=1e-5)
    temperature = torch.tensor(0.3, requires_grad=True)
    frozen = [x.detach() for x in (z0, z1)]
    losses = [
        ssl_fast.nt_xent(*frozen, temperature, reduction, backend=backend),
        plainly.nt_xent(*frozen, temperature, reduction),
    ]
    grads = [torch.autograd.grad(loss.sum(), temperature) for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_stats(backend, features, reduction):
    z = views(features)
    loss, stats = ssl_fast.nt_xent(*z, 0.2, reduction, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, ssl_fast.nt_xent(*z, 0.2, reduction, backend=backend))
    unit = torch.nn.functional.normalize(torch.cat(z)).detach()
    logits = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
    positive = torch.arange(66).roll(33)
    torch.testing.assert_close(stats.lse, logits.logsumexp(dim=1))
    torch.testing.assert_close(stats.top1, (logits.argmax(dim=1) == positive).float().mean())
    similarity = logits.gather(1, positive[:, None]).mean() * 0.2
    torch.testing.assert_close(stats.positive_similarity, similarity)


def test_sizes_at_the_edge(backend):
    empty = torch.empty(0, 5, requires_grad=True)
    for reduction in REDUCTIONS:
        out = ssl_fast.nt_xent(empty, empty, 0.5, reduction, backend=backend)
        expected = plainly.nt_xent(empty, empty, 0.5, reduction)
        torch.testing.assert_close(out, expected, equal_nan=True)
        assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 5)
    row = torch.randn(1, 5, requires_grad=True)
    loss = ssl_fast.nt_xent(row, torch.randn(1, 5), backend=backend)
    assert loss.item() == 0.0
    assert torch.all(torch.autograd.grad(loss, row)[0] == 0.0)


def test_zero_rows(backend, features, dtype):
    z = views(features, dtype=dtype)
    for x in z:
        x.data[::4] = 0.0
    for reduction in REDUCTIONS:
        loss = ssl_fast.nt_xent(*z, reduction=reduction, backend=backend)
        assert torch.isfinite(loss).all()
        for grad in torch.autograd.grad(loss.sum(), z):
            assert torch.isfinite(grad).all()
            assert torch.all(grad[::4] == 0.0)


def test_module(features):
    z = views(features)
    module = ssl_fast.NTXentLoss(0.3, 0, False, reduction="sum", backend="reference")
    expected = ssl_fast.nt_xent(*z, 0.3, "sum", backend="reference")
    assert torch.equal(module(*z), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(out0=z[0], out1=z[1]), expected)
    assert torch.equal(ssl_fast.NTXentLoss()(*z), ssl_fast.nt_xent(*z))
    learned = ssl_fast.NTXentLoss(torch.nn.Parameter(torch.tensor(0.3)))
    learned(*z).backward()
    assert next(learned.parameters()).grad is not None


X = torch.zeros(4, 3)
BAD = [
    ({"z0": None}, TypeError, "z0 must be a tensor"),
    ({"z0": X.int()}, TypeError, "z0 must be float32.*int32"),
    ({"z1": X[0]}, ValueError, r"z1 must have shape \[N, D\]; got \(3,\)"),
    ({"z1": X[:2]}, ValueError, "z1 must have as many rows as z0, 4"),
    ({"z1": X[:, :2]}, ValueError, "z1 must have as many components as z0, 3"),
    ({"z1": X.bfloat16()}, TypeError, "z1 must have the dtype of z0"),
    ({"z1": X.to("meta")}, ValueError, "z1 must be on the device of z0, cpu; got meta"),
    ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    ({"backend": ""}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.nt_xent(**{"z0": X, "z1": X, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_bank_size": -1}, "memory_bank_size must be a number of rows, 0 for none.*got -1"),
        ({"memory_bank_size": (64, 8, 2)}, "memory_bank_size must be a number of rows"),
        ({"memory_bank_size": None}, "memory_bank_size must be a number of rows.*got None"),
        ({"memory_bank_size": 64.0}, "memory_bank_size must be a number of rows.*got 64.0"),
        ({"memory_bank_size": 8, "gather_distributed": True}, "gather_distributed must be False"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"temperature": -1.0}, "temperature must be greater than 0"),
        ({"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_module_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        ssl_fast.NTXentLoss(**wrong)
