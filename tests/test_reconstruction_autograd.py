"""reconstruction_loss in torch: gradients of gradients, in place, transforms, and bad arguments."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain_reconstruction import KINDS, inputs_of, plain_loss
from tolerances import assert_near

import ssl_fast
from ssl_fast import reconstruction_loss

SMOOTH = [kind for kind in KINDS if kind != "l1"]


@pytest.mark.parametrize("backend_name", [None, "reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_inputs_and_of_gradients(kind, backend_name):
    x, t = inputs_of(kind, (4, 6))
    weight = torch.rand(4, 6) + 0.5
    mask = torch.tensor([True, False, True, True])
    leaves = [y.clone().requires_grad_() for y in (x, t, weight)]
    wide = [y.double().requires_grad_() for y in (x, t, weight)]
    loss = reconstruction_loss(*leaves[:2], kind, weight=leaves[2], mask=mask, backend=backend_name)
    exact = plain_loss(kind, *wide[:2], weight=wide[2], mask=mask)
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    wanted = torch.autograd.grad(exact, wide, create_graph=True)
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, torch.float32)
    second = torch.autograd.grad(sum(a.square().sum() for a in found), leaves)
    expected = torch.autograd.grad(sum(a.square().sum() for a in wanted), wide)
    for a, b in zip(second, expected, strict=True):
        assert_near(a, b, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", SMOOTH)
def test_gradgradcheck(kind, reduction):
    x, t = inputs_of(kind, (2, 3), torch.float64)
    weight = torch.rand(2, 3).double()

    def loss(x):
        return reconstruction_loss(x, t, kind, reduction, weight=weight)

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_of_native_losses(backend, dtype, reduction):
    x, t = inputs_of("bce_with_logits", (40, 10), dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = reconstruction_loss(leaf, t, "bce_with_logits", reduction, backend=backend)
    exact = plain_loss("bce_with_logits", wide, t.double(), reduction)
    (first,) = torch.autograd.grad(loss.square().sum(), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad(exact.square().sum(), wide, create_graph=True)
    assert_near(first, wanted, dtype)
    (second,) = torch.autograd.grad(first.float().square().sum(), leaf)
    (expected,) = torch.autograd.grad(wanted.square().sum(), wide)
    assert_near(second, expected, dtype)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_second_backward_gives_the_same(backend, dtype, factor):
    x, t = inputs_of("mse", (8, 500), dtype)
    leaf = x.clone().requires_grad_()
    loss = factor * reconstruction_loss(leaf, t, backend=backend)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.zero_()  # what autograd keeps must not be this memory
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, first)
    leaf.grad = None
    loss.backward()
    assert torch.equal(leaf.grad, first)
    (y,) = torch.autograd.grad(factor * F.mse_loss(wide := x.double().requires_grad_(), t), wide)
    assert_near(first, y, dtype)


def test_gradients_are_their_receivers_to_write_to(backend):
    x, t = inputs_of("mse", (8, 500))
    leaf = x.clone().requires_grad_()
    loss = reconstruction_loss(leaf, t, backend=backend)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    wanted = first.clone()
    first.mul_(3.0)
    assert torch.equal(second, wanted)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], wanted)


def test_batched_weights_of_the_loss(backend):
    x, t = inputs_of("mse", (8, 50))
    leaf = x.clone().requires_grad_()
    loss = reconstruction_loss(leaf, t, backend=backend)
    weights = torch.tensor([1.0, 2.0])
    (found,) = torch.autograd.grad(loss, leaf, weights, retain_graph=True, is_grads_batched=True)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(found, torch.stack([grad, 2.0 * grad]))


def test_gradients_add_up(backend):
    x, t = inputs_of("mse", (8, 50))
    leaf = x.clone().requires_grad_()
    total = sum(reconstruction_loss(leaf * 1.0, t, kind, backend=backend) for kind in SMOOTH[:3])
    total.backward()
    wide = x.double().requires_grad_()
    sum(plain_loss(kind, wide, t.double()) for kind in SMOOTH[:3]).backward()
    assert_near(leaf.grad, wide.grad, torch.float32)


def test_small_gradients_survive_fp16(backend):
    """1 / N of 2^22 elements is below fp16's smallest number, unless a scaler multiplies first."""
    x, t = (y.expand(64, 1 << 16) for y in inputs_of("mse", (1, 1 << 16), torch.float16))
    leaf = x.clone().requires_grad_()
    loss = reconstruction_loss(leaf, t, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**22))
    assert_near(grad, 2.0 * (x.double() - t.double()), torch.float16)


def test_grad_scaler(backend):
    """A mean over 2^18 fp16 elements, scaled by 2^16, up and down again."""
    x, t = inputs_of("mse", (64, 4096), torch.float16)
    weights = torch.nn.Parameter(x.float())
    optimizer = torch.optim.SGD([weights], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(reconstruction_loss(weights.half(), t, backend=backend)).backward()
    scaler.unscale_(optimizer)
    assert_near(weights.grad * x.numel(), 2.0 * (x.double() - t.double()), torch.float16)


def test_nothing_is_computed_for_what_asks_nothing(backend, monkeypatch):
    x, t = inputs_of("mse", (8, 50))
    assert not reconstruction_loss(x, t, backend=backend).requires_grad
    with torch.no_grad():
        loss = reconstruction_loss(x.clone().requires_grad_(), t, backend=backend)
    assert loss.grad_fn is None
    if backend == "native":
        from ssl_fast.backends.native import reconstruction as module

        def refused(*_):
            raise AssertionError

        monkeypatch.setattr(module, "gradient", lambda _, need: refused() if need else t[:0])
        reconstruction_loss(x, t, backend=backend)


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_reach_only_what_asks(backend, asked):
    x, t = inputs_of("mse", (4, 6))
    inputs = [y.requires_grad_(ask) for y, ask in zip((x, t, torch.rand(4, 6)), asked, strict=True)]
    loss = reconstruction_loss(*inputs[:2], weight=inputs[2], backend=backend)
    assert loss.requires_grad is any(asked)
    if any(asked):
        loss.backward()
    assert [y.grad is not None for y in inputs] == list(asked)


@pytest.mark.parametrize("factor", [1.0, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place(backend, kind, reduction, factor, dtype):
    x, t = inputs_of(kind, (8, 50), dtype)
    leaf = x.clone().requires_grad_()
    output = leaf * 1.0
    loss = reconstruction_loss(output, t, kind, reduction, inplace=True, backend=backend)
    (factor * loss).backward()
    other = x.clone().requires_grad_()
    wanted = reconstruction_loss(other, t, kind, reduction, backend=backend)
    (factor * wanted).backward()
    assert torch.equal(loss, wanted)
    assert_near(leaf.grad, other.grad.double(), dtype)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_in_place_is_honest(backend):
    x, t = inputs_of("mse", (8, 50))
    leaf = x.clone().requires_grad_()
    output = leaf.clone()
    storage = output.data_ptr()
    loss = reconstruction_loss(output, t, inplace=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert grad.data_ptr() == storage
    with pytest.raises(RuntimeError, match="can go backward once"):
        torch.autograd.grad(loss, leaf, retain_graph=True)
    output = leaf * 1.0
    loss = reconstruction_loss(output, t, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="can't be used after the loss"):
        (loss + output.sum()).backward()
    output = leaf.exp()  # whose backward reads the output
    loss = reconstruction_loss(output, t, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    output = leaf * 1.0
    loss = reconstruction_loss(output, t, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    for bad, message in (
        (leaf, "a leaf that requires a gradient"),
        ((leaf * 1.0).view(4, 100), "a view of another tensor"),
        (leaf.T * 1.0, "a contiguous input"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruction_loss(bad, t.reshape(bad.shape), inplace=True)
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum'"):
        reconstruction_loss(leaf * 1.0, t, reduction="none", inplace=True)
    with pytest.raises(ValueError, match="another tensor wants one"):
        reconstruction_loss(leaf * 1.0, t.clone().requires_grad_(), inplace=True)
    kept = x.clone()
    reconstruction_loss(kept, t, inplace=True, backend=backend)
    assert torch.equal(kept, x)


def test_in_place_after_an_error(backend):
    """The input is overwritten before the error, so what saved it must not be used."""
    x, t = inputs_of("bce", (8, 50))
    output = x.requires_grad_().sigmoid()
    with pytest.raises(ValueError, match="between 0 and 1"):
        reconstruction_loss(output, t + 1.0, "bce", inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_operators(backend):
    x, t = inputs_of("mse", (4, 6))
    weight, mask, pos_weight = torch.rand(4, 6), torch.rand(4) < 0.5, torch.rand(6)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for extra in ((None, None, None), (weight, mask, pos_weight)):
        numbers = (5, 1.0, 1.0, 0.0, 0.5, 0.5)
        for reduce in (True, False):
            torch.library.opcheck(
                torch.ops.ssl_fast.reconstruction.default,
                (x, t, *extra, *numbers, reduce, True), {"backend": backend}, test_utils=checks,
            )  # fmt: skip
        torch.library.opcheck(
            torch.ops.ssl_fast.reconstruction_.default, (x.clone(), t, *extra, *numbers),
            {"backend": backend}, test_utils=checks[:2],
        )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"mask": True}, {"inplace": True}],
                         ids=str)  # fmt: skip
def test_compiled(options):
    x, t = inputs_of("bce_with_logits", (64, 50))
    options = dict(options)
    if "mask" in options:
        options["mask"] = torch.arange(64) % 3 == 0

    @torch.compile(fullgraph=True)
    def compiled(x, t):
        return reconstruction_loss(x * 1.0, t, "bce_with_logits", **options, backend="native")

    results = []
    for function in (compiled, compiled.__wrapped__):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, t)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_func(backend):
    x, t = inputs_of("huber", (5, 7))

    def loss(x):
        return reconstruction_loss(x, t, "huber", backend=backend)

    exact = torch.func.grad(lambda x: F.huber_loss(x, t))(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), exact)
    hessian = torch.func.jacrev(torch.func.grad(loss))(x[:1, :3].expand(5, 3).repeat(1, 3)[:, :7])
    assert hessian.shape == (5, 7, 5, 7)


def test_under_autocast(backend):
    x, t = inputs_of("mse", (40, 50), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reconstruction_loss(x, t, backend=backend)
    assert loss.dtype is torch.float32
    assert_near(loss, F.mse_loss(x.double(), t.double()), torch.float32)


def test_module():
    x, t = inputs_of("huber", (40, 50))
    module = ssl_fast.ReconstructionLoss("huber", "sum", delta=0.3)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(same(x, t), F.huber_loss(x, t, reduction="sum", delta=0.3))
    assert "huber" in repr(module)
    mask = torch.rand(40) < 0.5
    found = ssl_fast.ReconstructionLoss()(x, t, mask=mask)
    torch.testing.assert_close(found, F.mse_loss(x[mask], t[mask]))
    for bad in ({"kind": "mae"}, {"reduction": "all"}, {"delta": 0.0}, {"backend": "fast"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ssl_fast.ReconstructionLoss(**bad)
    with pytest.raises(TypeError, match="inplace"):
        ssl_fast.ReconstructionLoss(inplace=1)


def test_bad_arguments():
    x, t = inputs_of("mse", (4, 6))

    def raises(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            reconstruction_loss(*(arguments or (x, t)), **options)

    raises(ValueError, r"target must have shape \(4, 6\); got \(6,\)", x, t[0])
    raises(ValueError, r"target must have shape \(4, 6\); got \(4, 1\)", x, t[:, :1])
    raises(TypeError, "input must be a tensor; got 3", 3, t)
    raises(TypeError, "input must be float32", x.long(), t)
    raises(TypeError, "target must be float32", x, t.long())
    raises(TypeError, "input must be a dense tensor", x.to_sparse(), t)
    raises(ValueError, "kind must be one of", kind="mae")
    raises(ValueError, "kind must be one of", kind=["mse"])
    raises(ValueError, "reduction must be one of", reduction="batchmean")
    raises(ValueError, "reduction must be one of", reduction=["mean"])
    raises(ValueError, "delta must be above 0; got -1.0", kind="huber", delta=-1.0)
    raises(ValueError, "beta must be at least 0; got -0.5", kind="smooth_l1", beta=-0.5)
    for bad in ("1", True, torch.ones(()), torch.ones(2)):
        raises(TypeError, "delta must be a number", delta=bad)
    raises(ValueError, "target_scale must be finite", target_scale=float("nan"))
    raises(ValueError, "weight must have shape", weight=torch.ones(6))
    raises(ValueError, "weight must broadcast", kind="bce_with_logits", weight=torch.ones(5))
    raises(TypeError, "weight must be a tensor", weight=2.0)
    raises(ValueError, "mask must have shape", mask=torch.ones(6, dtype=torch.bool))
    raises(ValueError, "mask must have shape", mask=torch.ones(1))
    raises(ValueError, "mask must have shape", mask=torch.ones(1, 1))
    raises(TypeError, "mask must be boolean", mask=torch.ones(4, dtype=torch.int64))
    raises(ValueError, "0 and 1 only", mask=torch.tensor([0.0, 1.0, 0.5, 1.0]))
    raises(ValueError, "mask must not require", mask=torch.ones(4).requires_grad_())
    raises(ValueError, "pos_weight is an option of", pos_weight=torch.ones(6))
    raises(ValueError, "pos_weight must broadcast", kind="bce_with_logits",
           pos_weight=torch.ones(5))  # fmt: skip
    raises(TypeError, "inplace must be True or False", inplace="yes")
    raises(ValueError, "backend must be one of", backend="fast")
    for device in ("target", "weight", "mask"):
        moved = {"weight": torch.ones(4, 6), "mask": torch.ones(4), "target": t}[device].to("meta")
        arguments = (x, moved) if device == "target" else (x, t)
        options = {} if device == "target" else {device: moved}
        raises(ValueError, f"{device} must be on cpu; got meta", *arguments, **options)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf")])
def test_bce_wants_probabilities(backend, bad):
    x, t = inputs_of("bce", (3, 400))
    for place in range(2):
        given = [x.clone(), t.clone()]
        given[place][1, 7:9] = bad
        for asks in (False, True):
            given[1].requires_grad_(asks)
            with pytest.raises(ValueError, match=r"between 0 and 1.*2 of 1200 elements"):
                reconstruction_loss(*given, "bce", backend=backend)
        given[1].requires_grad_(False)
        mask = torch.ones(3, 400, dtype=torch.bool)
        mask[1, 7:9] = False
        assert reconstruction_loss(*given, "bce", mask=mask, backend=backend).isfinite()


def test_nothing_counts(backend):
    x, t = inputs_of("mse", (4, 6))
    for options in ({"mask": torch.zeros(4)}, {"weight": torch.zeros(4, 6)}):
        leaf = x.clone().requires_grad_()
        loss = reconstruction_loss(leaf, t, backend=backend, **options)
        loss.backward()
        assert loss == 0.0
        assert not leaf.grad.any()
