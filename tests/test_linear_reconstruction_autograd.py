"""linear_reconstruction_loss in torch: second derivatives, transforms, modules, bad arguments."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_linear_reconstruction import (
    exact_of,
    inputs_of,
    plain_loss,
    value_and_grads,
)
from tolerances import assert_near

import ssl_fast
from ssl_fast.ops import linear_reconstruction as op

LOSS = ssl_fast.linear_reconstruction_loss


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "huber", "bce"])
def test_gradcheck(kind, reduction):
    x, w, b, t = (v.double() for v in inputs_of((5, 4, 6)))
    mask, weight = torch.rand(5, 6) < 0.7, torch.rand(5)
    leaves = [v.requires_grad_() for v in (x, w, b)]

    def loss(x, w, b):
        return LOSS(x, w, t, linear_bias=b, kind=kind, reduction=reduction, weight=weight,
                    mask=mask, delta=0.5)  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_gradcheck_of_gram():
    x, w, b, t = (v.double() for v in inputs_of((5, 4, 6)))
    leaves = [v.requires_grad_() for v in (x, w, b)]

    def loss(x, w, b):
        return LOSS(x, w, t, linear_bias=b, gram=True)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_gradients_of_gradients(backend, dtype, kind, reduction):
    x, w, b, t = inputs_of((7, 5, 9), dtype)
    leaves = [v.requires_grad_() for v in (x, w, b)]
    weight = torch.rand(7, 9)
    options = {"kind": kind, "reduction": reduction, "weight": weight}
    wide = [v.detach().double().requires_grad_() for v in leaves]
    seconds = []
    for given, loss in (
        (leaves, LOSS(*leaves[:2], t, linear_bias=leaves[2], backend=backend, **options)),
        (wide, plain_loss(*wide, t.double(), **options)),
    ):
        # A sixteenth keeps the second ones in fp16's range.
        first = torch.autograd.grad(loss.square().sum() / 16, given, create_graph=True)
        total = sum(v.double().square().sum() for v in first)
        seconds.append((first, torch.autograd.grad(total, given)))
    for found, exact in zip(*seconds, strict=True):
        for v, e in zip(found, exact, strict=True):
            assert_near(v, e, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_reach_only_what_asks(backend, asked, reduction, monkeypatch):
    """And nothing is computed for the others: the operator is told."""
    told = []
    operator = op._linear_reconstruction

    def spy(*arguments, **options):
        told.append(arguments[-3:])
        return operator(*arguments, **options)

    monkeypatch.setattr(op, "_linear_reconstruction", spy)
    x, w, b, t = inputs_of((97, 5, 70))
    exact = exact_of(x, w, b, t)
    leaves = [v.requires_grad_(ask) for v, ask in zip((x, w, b), asked, strict=True)]
    loss = LOSS(*leaves[:2], t, linear_bias=leaves[2], backend=backend, reduction=reduction)
    assert loss.requires_grad is any(asked)
    if any(asked):
        (loss.mean() if reduction == "none" else loss).backward()
    for v, e, ask in zip(leaves, exact[1:], asked, strict=True):
        assert (v.grad is not None) is ask
        if ask:
            assert_near(v.grad, e, torch.float32)
    assert tuple(told[-1]) == asked


def test_second_backward_and_no_grad(backend):
    x, w, b, t = inputs_of((97, 5, 70))
    leaves = [v.requires_grad_() for v in (x, w, b)]
    for reduction in ("mean", "none"):
        options = {"linear_bias": b, "backend": backend, "reduction": reduction}
        loss = LOSS(x, w, t, **options)
        weight = torch.full_like(loss, 2.5)
        first = torch.autograd.grad(loss, leaves, weight, retain_graph=True)
        kept = [v.clone() for v in first]
        for v in first:
            v.mul_(3.0)  # what a caller does with a gradient is not seen by the next
        second = torch.autograd.grad(loss, leaves, weight)
        assert all(map(torch.equal, kept, second))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves, weight)
        with torch.no_grad():
            alone = LOSS(x, w, t, **options)
        assert not alone.requires_grad
        assert torch.equal(alone, loss)


def test_gradients_accumulate(backend):
    x, w, b, t = inputs_of((97, 5, 70))
    leaves = [v.requires_grad_() for v in (x, w, b)]
    for _ in range(2):
        loss = LOSS(x, w, t, linear_bias=b, backend=backend)
        (loss + loss.detach() * loss).backward()
    exact = exact_of(x, w, b, t)
    for v, e in zip(leaves, exact[1:], strict=True):
        assert_near(v.grad, 2 * e * (1 + exact[0]), torch.float32)


def test_shared_and_overwritten_tensors(backend):
    """One tensor in two places; the target may be written to before the backward."""
    x, _, _, t = inputs_of((9, 9, 9))
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain_loss(wide, wide, wide[0], t.double()), wide)
    loss = LOSS(x, x, t, linear_bias=x[0], backend=backend)
    t.zero_()
    (found,) = torch.autograd.grad(loss, x)
    assert_near(found, exact, torch.float32)


def test_transforms_compile_autocast_and_opcheck(backend):
    x, w, b, t = inputs_of((97, 5, 70))
    leaves = [v.clone().requires_grad_() for v in (x, w, b)]
    mask, weight, pos_weight = torch.rand(97, 70) < 0.5, torch.rand(97), torch.rand(70)
    torch._dynamo.reset()
    for options in (
        {},
        {"kind": "bce", "mask": mask, "weight": weight, "pos_weight": pos_weight},
        {"reduction": "none", "kind": "huber", "mask": mask},
    ):

        def loss(x, w, b, options=options):
            return LOSS(x, w, t, linear_bias=b, backend=backend, **options).mean() * 2.0

        expected = torch.autograd.grad(loss(*leaves), leaves)
        transformed = torch.func.grad(loss, argnums=(0, 1, 2))(x, w, b)
        torch.testing.assert_close(transformed, expected)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSS(leaves[0], leaves[1], t, linear_bias=leaves[2], backend=backend)
        grads = torch.autograd.grad(loss, leaves)
    narrow = [v.bfloat16() for v in (x, w, b)]
    exact = exact_of(*narrow, t)
    assert loss.dtype is torch.float32
    assert_near(loss, exact[0], torch.float32)
    for v, e in zip(grads, exact[1:], strict=True):
        assert v.dtype is torch.float32
        assert_near(v, e, torch.bfloat16)
    operator = torch.ops.ssl_fast.linear_reconstruction.default
    rules = ("mse", 1.0, 1.0, 0.0)
    for elements, *needs in itertools.product([False, True], repeat=4):
        arguments = (x, w, b, t, weight, mask, None, *rules, elements, *needs)
        torch.library.opcheck(operator, arguments, {"backend": backend})
    arguments = (x, w, None, (t * 255).byte(), None, None, pos_weight, "bce", 1.0, 1 / 255, 0.0)
    torch.library.opcheck(operator, (*arguments, *[False] * 4), {"backend": backend})


def test_a_scaled_loss_keeps_gradients_of_halves(backend):
    """1 / (rows x outputs) alone would be below the smallest fp16 number, their sum above 65504."""
    x, w = torch.ones(4096, 1).half(), torch.ones(1024, 1).half()
    found = value_and_grads(x, w, None, torch.zeros(4096, 1024), 65536.0, backend=backend)
    assert torch.all(found[1] == torch.tensor(65536.0 * 2 / 4096).half())
    assert torch.all(found[2] == torch.tensor(65536.0 * 2 / 1024).half())


def test_float64_runs_on_the_reference():
    x, w, b, t = inputs_of((9, 5, 7))
    found = value_and_grads(x.double(), w.double(), b.double(), t)
    for v, e in zip(found, exact_of(x, w, b, t), strict=True):
        assert v.dtype is torch.float64
        assert_near(v, e, torch.float64)


def test_module(backend):
    torch.manual_seed(3)
    linear = torch.nn.Linear(5, 9)
    torch.manual_seed(3)
    module = ssl_fast.LinearReconstructionLoss(5, 9, kind="huber", delta=0.5, backend=backend)
    assert list(module.state_dict()) == list(linear.state_dict())
    assert all(map(torch.equal, module.parameters(), linear.parameters()))
    x, t = torch.randn(3, 4, 5), torch.randn(3, 4, 9)
    mask = torch.rand(3, 4) < 0.5
    expected = LOSS(
        x, linear.weight, t, linear_bias=linear.bias, kind="huber", delta=0.5, mask=mask,
        backend=backend,
    )  # fmt: skip
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, t, mask=mask), expected)
    assert torch.equal(module.reconstruct(x), linear(x))
    assert "in_features=5, out_features=9, bias=True, kind='huber'" in repr(module)
    module(x, t).backward()
    assert all(p.grad is not None for p in module.parameters())
    bare = ssl_fast.LinearReconstructionLoss(5, 9, bias=False, dtype=torch.bfloat16)
    assert list(bare.state_dict()) == ["weight"]
    assert bare.weight.dtype is torch.bfloat16
    assert bare(x.bfloat16(), t).dtype is torch.float32


X, W, B, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(4, 5)
BAD = [
    ({"input": [1.0]}, TypeError, "input must be a tensor"),
    ({"input": X.int()}, TypeError, "input must be float32"),
    ({"input": X.to_sparse()}, TypeError, "input must be a dense tensor"),
    ({"input": X[:, :0]}, ValueError, "H at least 1"),
    ({"input": X[0, 0]}, ValueError, "H at least 1"),
    ({"linear_weight": W[0]}, ValueError, r"linear_weight must have shape \[D, 3\]"),
    ({"linear_weight": W.T}, ValueError, r"linear_weight must have shape \[D, 3\]"),
    ({"linear_weight": W.double()}, TypeError, "linear_weight must have the dtype of input"),
    ({"linear_weight": W.to("meta")}, ValueError, "linear_weight must be on the device of input"),
    ({"linear_bias": B[:1]}, ValueError, r"linear_bias must have shape \(5,\)"),
    ({"linear_bias": 0.0}, TypeError, "linear_bias must be a tensor"),
    ({"target": None}, TypeError, "target must be a tensor"),
    ({"target": T.long()}, TypeError, "target must be float32, bfloat16, float16 or uint8"),
    ({"target": T.double()}, TypeError, "float64 beside a float64 input"),
    ({"target": T[:, :1]}, ValueError, r"target must have shape \(4, 5\)"),
    ({"target": T[:1]}, ValueError, r"target must have shape \(4, 5\)"),
    ({"target": T.to("meta")}, ValueError, "target must be on the device of input"),
    ({"target": T.clone().requires_grad_()}, ValueError, "target must not require a gradient"),
    ({"kind": "l2"}, ValueError, "kind must be one of"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    ({"weight": T.int()}, TypeError, "weight must be floating"),
    ({"weight": T[:1]}, ValueError, r"weight must have shape \(4, 5\) or \(4,\)"),
    ({"weight": 1.0}, TypeError, "weight must be a tensor"),
    ({"weight": T.clone().requires_grad_()}, ValueError, "weight must not require a gradient"),
    ({"mask": T.int()}, TypeError, "mask must be boolean or floating"),
    ({"mask": T + 0.5}, ValueError, "mask must hold 0 and 1 only"),
    ({"mask": T[0]}, ValueError, r"mask must have shape \(4, 5\) or \(4,\)"),
    ({"mask": T.to("meta")}, ValueError, "mask must be on the device of input"),
    ({"pos_weight": B}, ValueError, "pos_weight belongs to the bce kinds"),
    ({"pos_weight": B[:1], "kind": "bce"}, ValueError, r"pos_weight must have shape \(5,\)"),
    ({"pos_weight": 2.0, "kind": "bce"}, TypeError, "pos_weight must be a floating tensor"),
    ({"delta": 0.0}, ValueError, "delta must be above 0"),
    ({"delta": "1"}, TypeError, "delta must be a number"),
    ({"beta": -1.0}, ValueError, "beta must be at least 0"),
    ({"beta": float("nan")}, ValueError, "beta must be finite"),
    ({"target_scale": None}, TypeError, "target_scale must be a number"),
    ({"target_shift": float("inf")}, ValueError, "target_shift must be finite"),
    ({"gram": 1}, TypeError, "gram must be True or False"),
    ({"gram": True, "kind": "l1"}, ValueError, "gram=True needs kind 'mse'"),
    ({"gram": True, "reduction": "none"}, ValueError, "gram=True needs kind 'mse'"),
    ({"gram": True, "mask": T}, ValueError, "gram=True takes no weight and no mask"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        LOSS(**{"input": X, "linear_weight": W, "linear_bias": B, "target": T} | wrong)
    tensors = {"input", "linear_weight", "linear_bias", "target", "weight", "mask", "pos_weight"}
    if not set(wrong) & tensors:
        with pytest.raises(error, match=message):
            ssl_fast.LinearReconstructionLoss(3, 5, **wrong)


def test_bad_arguments_of_the_operator(backend):
    rest = ("mse", 1.0, 1.0, 0.0, False, True, True, True)
    wrong = [
        ((X[0], W, B, T, None, None, None, *rest), "input must be a floating tensor"),
        ((X, W[0], B, T, None, None, None, *rest), "linear_weight must have shape"),
        ((X, W.bfloat16(), B, T, None, None, None, *rest), "linear_weight must be a torch.float32"),
        ((X, W, B[:2], T, None, None, None, *rest), "linear_bias must be"),
        ((X, W, B, T[:2], None, None, None, *rest), "target must be"),
        ((X, W, B, T.double(), None, None, None, *rest), "float64 beside a float64 input"),
        ((X, W, B, T, T[:2], None, None, *rest), "weight must be"),
        ((X, W, B, T, None, T, None, *rest), "mask must be a torch.bool"),
        ((X, W, B, T, None, None, B, *rest), "pos_weight belongs to"),
        ((X, W, B, T, None, None, None, "l2", *rest[1:]), "kind must be one of"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            torch.ops.ssl_fast.linear_reconstruction(*arguments, backend=backend)


def test_a_training_step_equals_torch(backend):
    """An autoencoder whose last layer is the loss's, against the same one with torch's layer."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(20, 6)
    module = ssl_fast.LinearReconstructionLoss(6, 20, backend=backend)
    x = torch.rand(50, 20)
    plain = copy.deepcopy((encoder, module))
    for enc, dec, loss_of in (
        (encoder, module, lambda d, h: d(h, x)),
        (*plain, lambda d, h: F.mse_loss(d.reconstruct(h), x)),
    ):
        optimizer = torch.optim.SGD([*enc.parameters(), *dec.parameters()], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(dec, torch.tanh(enc(x))).backward()
            optimizer.step()
    found = [*encoder.parameters(), *module.parameters()]
    expected = [*plain[0].parameters(), *plain[1].parameters()]
    for v, e in zip(found, expected, strict=True):
        torch.testing.assert_close(v, e, rtol=1e-4, atol=1e-6)
