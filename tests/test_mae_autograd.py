"""mae_loss in torch: gradients of gradients, transforms, modules, and what bad arguments get."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from plain import gradients
from test_mae import exact_of, inputs_of, patchify, plain_mae, value_and_grad
from tolerances import assert_near

import ssl_fast


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_gradcheck(norm_pix_loss):
    pred, images = torch.randn(2, 4, 12).double(), torch.rand(2, 3, 4, 4).double()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    inputs = [x.requires_grad_() for x in (pred, images)]

    def loss(pred, target):
        return ssl_fast.mae_loss(pred, target, mask, norm_pix_loss=norm_pix_loss, patch_size=2)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("patch_size", [None, 2])
def test_gradients_of_both_and_of_gradients(backend, dtype, patch_size):
    pred = torch.randn(2, 4, 12).to(dtype).requires_grad_()
    target = torch.rand((2, 4, 12) if patch_size is None else (2, 3, 4, 4)).to(dtype)
    target.requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).float()

    def plain(pred, target):
        patches = target if patch_size is None else patchify(target, 2, 2)
        return (plain_mae(pred, patches, mask.double()),)

    loss = ssl_fast.mae_loss(pred, target, mask, patch_size=patch_size, backend=backend)
    found = torch.autograd.grad(3.0 * loss, (pred, target), create_graph=True)
    wide = [x.detach().double() for x in (pred, target)]
    for x, e in zip(found, gradients(plain, wide, [3.0]), strict=True):
        assert_near(x, e, dtype)
    second = torch.autograd.grad(sum(x.float().square().sum() for x in found), (pred, target))
    leaves = [x.requires_grad_() for x in wide]
    first = torch.autograd.grad(3.0 * plain(*leaves)[0], leaves, create_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    for x, e in zip(second, expected, strict=True):
        assert_near(x, e, dtype)


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=2)), ids=str)
def test_gradients_reach_only_what_asks(backend, asked):
    pred, target, mask = inputs_of((2, 5, 7), masked=1.0)
    inputs = [x.requires_grad_(ask) for x, ask in zip((pred, target), asked, strict=True)]
    loss = ssl_fast.mae_loss(*inputs, mask, backend=backend)
    assert loss.requires_grad is any(asked)
    if any(asked):
        loss.backward()
    assert [x.grad is not None for x in inputs] == list(asked)


def test_second_backward_and_no_grad(backend):
    pred, target, mask = inputs_of((2, 5, 7))
    pred.requires_grad_()
    loss = ssl_fast.mae_loss(pred, target, mask, backend=backend)
    (first,) = torch.autograd.grad(loss, pred, torch.tensor(2.5), retain_graph=True)
    (second,) = torch.autograd.grad(loss, pred, torch.tensor(2.5))
    assert torch.equal(first, second)
    with torch.no_grad():
        alone = ssl_fast.mae_loss(pred, target, mask, backend=backend)
    assert not alone.requires_grad
    assert torch.equal(alone, loss)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_gradient_made_in_the_forward_pass(backend, dtype, norm_pix_loss, factor):
    """It is its receiver's to write to, and the same from every backward."""
    pred, target, mask = inputs_of((3, 20, 37), dtype)
    leaf = pred.clone().requires_grad_()
    loss = factor * ssl_fast.mae_loss(
        leaf, target, mask, norm_pix_loss=norm_pix_loss, backend=backend
    )
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    expected = second.clone()
    first.mul_(7.0)
    assert torch.equal(second, expected)
    batched = torch.tensor([1.0, 2.0])
    (both,) = torch.autograd.grad(loss, leaf, batched, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([expected, 2.0 * expected]))
    (last,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(last, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)
    exact = exact_of(pred, target, mask, norm_pix_loss=norm_pix_loss)[1]
    assert_near(last, factor * exact, dtype)


def test_written_before_the_backward(backend):
    pred, target, mask = inputs_of((2, 5, 7))
    pred.requires_grad_()
    loss = ssl_fast.mae_loss(pred, target, mask, backend=backend)
    target.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_transforms_compile_autocast_and_opcheck(backend):
    pred, target, mask = inputs_of((2, 5, 7), masked=1.0)

    def loss(pred):
        return ssl_fast.mae_loss(pred, target, mask, backend=backend) * 2.0

    expected = torch.autograd.grad(loss(leaf := pred.clone().requires_grad_()), leaf)
    torch.testing.assert_close((torch.func.grad(loss)(pred),), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(pred), loss(leaf).detach())
    operators = torch.ops.ssl_fast
    arguments = (pred, target, mask, [], True)
    torch.library.opcheck(operators.mae.default, arguments, {"backend": backend})
    torch.library.opcheck(operators.mae_with_gradient.default, arguments, {"backend": backend})
    scalars = torch.tensor(0.1), torch.tensor(1.0)
    images = torch.rand(2, 1, 5, 7), mask, *scalars, [1, 7], True
    for needs in itertools.product([False, True], repeat=2):
        arguments = (pred, target, mask, *scalars, [], True, *needs)
        torch.library.opcheck(operators.mae_backward.default, arguments, {"backend": backend})
        arguments = (pred, *images, *needs)
        torch.library.opcheck(operators.mae_backward.default, arguments, {"backend": backend})


def test_a_scaled_loss_keeps_gradients_of_halves(backend):
    """1 / (patches x elements) alone would be below the smallest fp16 number."""
    pred, target = torch.ones(64, 196, 48).half(), torch.zeros(64, 196, 48).half()
    mask = torch.ones(64, 196)
    options = {"factor": 65536.0, "norm_pix_loss": False, "backend": backend}
    _, grad = value_and_grad(pred, target, mask, **options)
    expected = torch.full((), 65536.0 * 2 / pred.numel()).half()
    assert torch.all(grad == expected)


def test_float64_runs_on_the_reference():
    pred, target, mask = inputs_of((2, 5, 7))
    loss, grad = value_and_grad(pred.double(), target, mask)
    assert loss.dtype is grad.dtype is torch.float64
    exact = exact_of(pred, target, mask)
    assert_near(loss, exact[0], torch.float64)
    assert_near(grad, exact[1], torch.float64)
    assert value_and_grad(pred, target.double(), mask)[1].dtype is torch.float32


def test_module(backend):
    images, mask = torch.rand(2, 3, 4, 4), torch.ones(2, 4)
    pred = torch.randn(2, 4, 12)
    module = ssl_fast.MAELoss(False, 2, backend=backend)
    expected = ssl_fast.mae_loss(
        pred, images, mask, norm_pix_loss=False, patch_size=2, backend=backend
    )
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(pred, images, mask), expected)
    assert "norm_pix_loss=False, patch_size=2" in repr(module)


X, M = torch.zeros(2, 4, 12), torch.ones(2, 4)
PICTURES = torch.zeros(2, 3, 4, 4)
BAD = [
    ({"pred": [1.0]}, TypeError, "pred must be a tensor"),
    ({"pred": X.int()}, TypeError, "pred must be float32"),
    ({"pred": X[0]}, ValueError, r"pred must have shape \[B, L, P\]"),
    ({"pred": X[..., :0], "target": X[..., :0]}, ValueError, "an element at least"),
    ({"pred": X.to_sparse()}, TypeError, "pred must be a dense tensor"),
    ({"target": None}, TypeError, "target must be a tensor"),
    ({"target": X[:1]}, ValueError, "target must have the shape of pred"),
    ({"target": PICTURES}, ValueError, "target must have shape"),
    ({"target": X.to("meta")}, ValueError, "target must be on the device of pred"),
    ({"patch_size": 2}, ValueError, r"target must have shape \[B, C, H, W\]"),
    ({"target": PICTURES, "patch_size": 3}, ValueError, "patch_size .* must divide"),
    ({"target": PICTURES, "patch_size": 4}, ValueError, r"pred must have shape \(2, 1, 48\)"),
    ({"target": PICTURES, "patch_size": 0}, ValueError, "patch_size must be positive"),
    ({"target": PICTURES, "patch_size": (2, 2, 2)}, ValueError, "patch_size must be positive"),
    ({"target": PICTURES, "patch_size": 2.0}, TypeError, "patch_size must be an int"),
    ({"target": PICTURES, "patch_size": (2, True)}, TypeError, "patch_size must be an int"),
    ({"mask": None}, TypeError, "mask must be a tensor"),
    ({"mask": M.int()}, TypeError, "mask must be boolean or floating"),
    ({"mask": M[:, :1]}, ValueError, "mask must have shape"),
    ({"mask": M.to("meta")}, ValueError, "mask must be on the device"),
    ({"mask": M.clone().requires_grad_()}, ValueError, "mask must not require a gradient"),
    ({"norm_pix_loss": 1}, TypeError, "norm_pix_loss must be True or False"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        ssl_fast.mae_loss(**{"pred": X, "target": X, "mask": M} | wrong)
    if set(wrong) <= {"norm_pix_loss", "backend"}:
        with pytest.raises(error, match=message):
            ssl_fast.MAELoss(**wrong)


def test_bad_arguments_of_the_operator(backend):
    wrong = [
        ((X[0], X[0], M, [], True), "pred must be a floating tensor"),
        ((X, X[:1], M, [], True), "target must be"),
        ((X, X.double(), M, [], True), "float64 beside float64"),
        ((X, X, M.bool(), [], True), "mask must be a torch.float32"),
        ((X, PICTURES, M, [2], True), "patch_size must be two"),
        ((X, PICTURES, M, [3, 3], True), "target must be images"),
        ((X, PICTURES, M, [2, 4], True), "pred must have the 2 patches"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            torch.ops.ssl_fast.mae(*arguments, backend=backend)
