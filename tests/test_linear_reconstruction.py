"""linear_reconstruction_loss: every backend against torch's own losses in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_reconstruction import BY_WEIGHT, KINDS
from tolerances import assert_near

import ssl_fast
from ssl_fast.backends.reference import linear_reconstruction as reference
from ssl_fast.backends.reference import pairs

# (N, H, D)
SHAPES = [
    (1, 1, 1), (5, 3, 7), (2, 1, 70), (97, 65, 66), (33, 200, 130), (200, 30, 64), (96, 64, 128),
    (1, 300, 1000), (260, 17, 5),
]  # fmt: skip
EMPTY = [(0, 4, 5), (5, 4, 0), (0, 1, 0)]


def inputs_of(shape, dtype=torch.float32):
    """Input, weight, bias and a target in [0, 1]; outputs a little beyond it."""
    n, h, d = shape
    generator = torch.Generator().manual_seed(n + 1000 * h + d)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x, w, b = normal(n, h), normal(d, h) / h**0.5, 0.3 * normal(d)
    return x.to(dtype), w.to(dtype), b.to(dtype), torch.rand((n, d), generator=generator).to(dtype)


def plain_losses(x, w, b, t, kind="mse", pos_weight=None, delta=1.0, beta=1.0):
    """Each loss, by torch."""
    outputs = F.linear(x, w, b)
    if kind.startswith("bce"):
        return F.binary_cross_entropy_with_logits(
            outputs, t, reduction="none", pos_weight=pos_weight
        )
    options = {"smooth_l1": {"beta": beta}, "huber": {"delta": delta}}.get(kind, {})
    return getattr(F, f"{kind}_loss")(outputs, t, reduction="none", **options)


def expanded(value, like):
    """A weight or a mask of rows beside those of elements."""
    return value if value.dim() == like.dim() else value[..., None].expand(like.shape)


def plain_loss(x, w, b, t, kind="mse", reduction="mean", weight=None, mask=None, **options):
    losses = plain_losses(x, w, b, t, kind, **options)
    scale = torch.ones_like(losses) if weight is None else expanded(weight, t).to(losses)
    kept = torch.ones_like(losses) if mask is None else expanded(mask, t).to(losses)
    losses = torch.where(kept != 0, losses * scale, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (scale * kept if kind in BY_WEIGHT else kept).sum()


def exact_of(x, w, b, t, factor=1.0, **options):
    """Loss and gradients in float64."""
    leaves = [None if v is None else v.detach().double().requires_grad_() for v in (x, w, b)]
    for name in ("weight", "pos_weight"):
        if options.get(name) is not None:
            options[name] = options[name].double()
    loss = plain_loss(*leaves, t.double(), **options)
    given = [v for v in leaves if v is not None]
    return loss.detach(), *torch.autograd.grad((loss * factor).sum(), given)


def value_and_grads(x, w, b, t, factor=1.0, **options):
    leaves = [None if v is None else v.detach().requires_grad_() for v in (x, w, b)]
    loss = ssl_fast.linear_reconstruction_loss(
        leaves[0], leaves[1], t, linear_bias=leaves[2], **options
    )
    (loss * factor).sum().backward()
    return loss.detach(), *(v.grad for v in leaves if v is not None)


def assert_agrees(found, exact, dtype, loss_dtype=torch.float32):
    assert found[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert_near(found[0], exact[0], loss_dtype, what="loss")
    for name, x, e in zip(("input", "weight", "bias"), found[1:], exact[1:], strict=False):
        assert x.dtype is dtype
        assert_near(x, e, dtype, what=f"gradient of the {name}")


def off_the_kinks(x, w, b, t, kind, **options):
    """The target, away from where the slope of l1 jumps: rounding decides its sign there."""
    if kind not in ("l1", "smooth_l1", "huber"):
        return t
    outputs = F.linear(x.double(), w.double(), None if b is None else b.double())
    d = t.double() - outputs
    return torch.where(d.abs() < 0.01, outputs + 0.05, t.double()).to(t.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, kind, dtype):
    x, w, b, t = inputs_of(shape, dtype)
    t = off_the_kinks(x, w, b, t, kind)
    options = {"kind": kind, "beta": 0.4, "delta": 0.3}
    for bias in (b, None):
        for reduction in ("mean", "sum"):
            found = value_and_grads(x, w, bias, t, backend=backend, reduction=reduction, **options)
            assert_agrees(found, exact_of(x, w, bias, t, reduction=reduction, **options), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_reduction_none_with_any_gradient(backend, dtype, kind):
    x, w, b, t = inputs_of((97, 33, 70), dtype)
    t = off_the_kinks(x, w, b, t, kind)
    factor = torch.randn(97, 70)
    weight, mask = torch.rand(97), torch.rand(97, 70) < 0.6
    for options in ({}, {"weight": weight, "mask": mask}):
        options |= {"kind": kind, "reduction": "none"}
        found = value_and_grads(x, w, b, t, factor, backend=backend, **options)
        assert_agrees(found, exact_of(x, w, b, t, factor.double(), **options), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["mse", "huber", "bce_with_logits"])
@pytest.mark.parametrize("mask_of", [None, "rows", "elements"])
@pytest.mark.parametrize("weight_of", [None, "rows", "elements"])
def test_weights_and_masks(backend, weight_of, mask_of, kind, reduction):
    """What the mask leaves out holds NaN; a row that is left out, in its input too."""
    x, w, b, t = inputs_of((130, 20, 75))
    sizes = {"rows": (130,), "elements": (130, 75)}
    weight = torch.rand(sizes[weight_of]) if weight_of else None
    mask = torch.rand(sizes[mask_of]) < 0.6 if mask_of else None
    options = {"kind": kind, "reduction": reduction, "weight": weight, "mask": mask}
    exact = exact_of(x, w, b, t, **options)
    if mask is not None:
        mask[7] = False
        exact = exact_of(x, w, b, t, **options)
        t[~expanded(mask, t)] = torch.nan
        x[~mask if mask_of == "rows" else 7] = torch.nan
    found = value_and_grads(x, w, b, t, backend=backend, **options)
    assert_agrees(found, exact, torch.float32)
    if mask is not None:
        again = value_and_grads(x, w, b, t, backend=backend, **options | {"mask": mask.float()})
        assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_a_mask_that_leaves_nothing(backend, kind):
    x, w, b, t = inputs_of((70, 5, 9))
    for mask in (torch.zeros(70, dtype=torch.bool), torch.zeros(70, 9)):
        found = value_and_grads(x, w, b, t * torch.nan, backend=backend, kind=kind, mask=mask)
        assert all(torch.equal(v, torch.zeros_like(v)) for v in found)


def test_pos_weight(backend, dtype):
    x, w, b, t = inputs_of((100, 20, 75), dtype)
    pos_weight = torch.rand(75) * 3
    for kind in ("bce", "bce_with_logits"):
        for mask in (None, torch.rand(100, 75) < 0.5):
            options = {"kind": kind, "pos_weight": pos_weight, "mask": mask}
            found = value_and_grads(x, w, b, t, backend=backend, **options)
            assert_agrees(found, exact_of(x, w, b, t, **options), dtype)


def test_targets_of_other_dtypes(backend, dtype):
    """Bytes with a scale and a shift, and every floating dtype beside every other."""
    x, w, b, t = inputs_of((97, 20, 130), dtype)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        found = value_and_grads(x, w, b, t.to(other), backend=backend)
        assert_agrees(found, exact_of(x, w, b, t.to(other)), dtype)
    pixels = (t * 255).to(torch.uint8)
    options = {"target_scale": 1 / 127.5, "target_shift": -1.0}
    found = value_and_grads(x, w, b, pixels, backend=backend, **options)
    assert_agrees(found, exact_of(x, w, b, pixels.double() / 127.5 - 1.0), dtype)
    found = value_and_grads(x, w, b, t, backend=backend, target_scale=2.0)
    assert_agrees(found, exact_of(x, w, b, t.double() * 2.0), dtype)
    mask = torch.rand(97, 130) < 0.5
    found = value_and_grads(x, w, b, pixels, backend=backend, mask=mask, **options)
    assert_agrees(found, exact_of(x, w, b, pixels.double() / 127.5 - 1.0, mask=mask), dtype)
    found = value_and_grads(x, w, b, pixels, backend=backend, kind="bce", target_scale=1 / 255)
    assert_agrees(found, exact_of(x, w, b, pixels.double() / 255, kind="bce"), dtype)


def test_layouts(backend, dtype):
    """Columns apart, rows of a wider tensor, one row for all; neighbours are NaN."""
    x, w, b, t = inputs_of((40, 20, 70), dtype)
    exact = exact_of(x, w, b, t)
    for place in (0, 1, 3):
        tensor = (x, w, b, t)[place]
        wide = tensor.new_full((tensor.shape[0] + 2, 2 * tensor.shape[1] + 3), torch.nan)
        for view in (
            wide[1:-1, 3:][:, : tensor.shape[1]],
            wide[1:-1, 1 : 1 + 2 * tensor.shape[1] : 2],
            tensor.new_full(tensor.shape[::-1], torch.nan).T,
        ):
            given = [x, w, b, t]
            given[place] = view.copy_(tensor)
            assert_agrees(value_and_grads(*given, backend=backend), exact, dtype)
    one = x[:1].expand(40, -1), w[:1].expand(70, -1), b[:1].expand(70), t[:1, :1].expand(40, 70)
    assert_agrees(value_and_grads(*one, backend=backend), exact_of(*one), dtype)
    turned = torch.rand(70, 40).T, (torch.rand(70, 40) < 0.5).T
    options = {"weight": turned[0], "mask": turned[1]}
    assert_agrees(
        value_and_grads(x, w, b, t, backend=backend, **options),
        exact_of(x, w, b, t, **options),
        dtype,
    )


def test_leading_dimensions(backend):
    x, w, b, t = inputs_of((24, 5, 9))
    weight, mask = torch.rand(24, 9), torch.rand(24) < 0.7
    flat = value_and_grads(x, w, b, t, backend=backend, weight=weight, mask=mask)
    options = {"weight": weight.reshape(2, 3, 4, 9), "mask": mask.reshape(2, 3, 4)}
    high = x.reshape(2, 3, 4, 5), w, b, t.reshape(2, 3, 4, 9)
    found = value_and_grads(*high, backend=backend, **options)
    assert found[1].shape == (2, 3, 4, 5)
    for v, f in zip(found, flat, strict=True):
        assert torch.equal(v.reshape(f.shape), f)
    losses = ssl_fast.linear_reconstruction_loss(high[0], w, high[3], reduction="none")
    assert losses.shape == (2, 3, 4, 9)
    alone = ssl_fast.linear_reconstruction_loss(x[0], w, t[0], linear_bias=b, backend=backend)
    assert_near(alone, plain_loss(x[:1].double(), w.double(), b.double(), t[:1]), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_every_output_is_written(backend, shape, dtype):
    x, w, b, t = inputs_of(shape, dtype)
    for options in ({"reduction": "sum"}, {"reduction": "none"}, {"mask": torch.ones(t.shape)}):
        for result in value_and_grads(x, w, b, t, backend=backend, **options):
            assert not result.isnan().any()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(backend, shape):
    x, w, b, t = inputs_of(shape)
    found = value_and_grads(x, w, b, t, backend=backend, reduction="sum")
    assert_agrees(found, exact_of(x, w, b, t, reduction="sum"), torch.float32)
    loss, *grads = value_and_grads(x, w, b, t, backend=backend)
    assert loss.isnan()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["mse", "l1", "huber", "bce_with_logits"])
def test_not_finite_values_propagate(backend, kind, place, value):
    tensors = list(inputs_of((100, 9, 70)))
    tensors[place].view(-1)[13] = value
    found = value_and_grads(*tensors, backend=backend, kind=kind)
    leaves = [v.requires_grad_() for v in tensors[:3]]
    expected = plain_loss(*leaves, tensors[3], kind)
    torch.testing.assert_close(found[0], expected.detach(), equal_nan=True)
    for v, e in zip(found[1:], torch.autograd.grad(expected, leaves), strict=True):
        assert torch.equal(v.isfinite(), e.isfinite())


def test_bits_do_not_depend_on_threads_or_repetition(backend, dtype):
    """Few rows and many outputs, few outputs and many rows, a wide layer: every order of work."""
    for shape in ((1500, 24, 200), (130, 40, 1500), (300, 600, 1900), (20, 8, 700)):
        x, w, b, t = inputs_of(shape, dtype)
        mask = torch.rand(t.shape) < 0.8
        for options in ({}, {"mask": mask}):
            results = []
            for threads in thread_counts(backend):
                torch.set_num_threads(threads)
                results.append(value_and_grads(x, w, b, t, backend=backend, **options))
            for other in results[1:]:
                assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("shape", [(9000, 64, 80), (200, 700, 2100), (5000, 513, 1900)], ids=str)
def test_large(backend, shape, dtype):
    """Packed copies that aren't kept, and gradients too large to share."""
    x, w, b, t = inputs_of(shape, dtype)
    found = value_and_grads(x, w, b, t, backend=backend, kind="bce")
    exact = exact_of(x, w, b, t, kind="bce")
    plain = [v.detach().requires_grad_() for v in (x, w, b)]
    torch.autograd.backward(plain_loss(*plain, t, "bce"))
    assert_near(found[0], exact[0], torch.float32)
    for v, e, p in zip(found[1:], exact[1:], plain, strict=True):
        assert_near(v, e, dtype, plain=p.grad)


def test_losses_near_zero_keep_their_digits(backend):
    x, w, b, _ = inputs_of((100, 8, 70))
    outputs = F.linear(x.double(), w.double(), b.double())
    t = (outputs + 1e-4 * torch.randn(100, 70)).float()
    loss = value_and_grads(x, w, b, t, backend=backend)[0]
    torch.testing.assert_close(loss.double(), exact_of(x, w, b, t)[0], rtol=1e-4, atol=0.0)
    if backend == "reference":
        return  # torch's formula of bce has none left
    sure = torch.full((70,), 20.0)
    loss = value_and_grads(x, w, sure, torch.ones(100, 70), backend=backend, kind="bce")[0]
    exact = exact_of(x, w, sure, torch.ones(100, 70), kind="bce")[0]
    assert exact < 1e-6
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)


def test_targets_of_bce_are_probabilities(backend, dtype):
    x, w, b, t = inputs_of((130, 8, 70), dtype)
    for place in ((0, 0), (129, 69), (50, 3)):
        for value in (1.5, -0.01):
            wrong = t.clone()
            wrong[place] = value
            with pytest.raises(ValueError, match="target must be between 0 and 1 for bce"):
                value_and_grads(x, w, b, wrong, backend=backend, kind="bce")
            value_and_grads(x, w, b, wrong, backend=backend, kind="bce_with_logits")
            mask = torch.ones(130, 70)
            mask[place] = 0.0
            value_and_grads(x, w, b, wrong, backend=backend, kind="bce", mask=mask)
    assert value_and_grads(x, w, b, t * torch.nan, backend=backend, kind="bce")[0].isnan()


@pytest.mark.parametrize("shape", [(50, 7, 20), (20, 7, 300), (1, 1, 1)], ids=str)
def test_gram(shape, dtype):
    x, w, b, t = inputs_of(shape, dtype)
    for bias in (b, None):
        for reduction in ("mean", "sum"):
            found = value_and_grads(x, w, bias, t, 3.0, gram=True, reduction=reduction)
            exact = exact_of(x, w, bias, t, 3.0, reduction=reduction)
            assert_agrees(found, exact, dtype)
    pixels = (t * 255).to(torch.uint8)
    found = value_and_grads(x, w, b, pixels, gram=True, target_scale=1 / 255)
    assert_agrees(found, exact_of(x, w, b, pixels.double() / 255), dtype)


def test_reference_does_not_depend_on_its_chunks(monkeypatch):
    x, w, b, t = (v.double() for v in inputs_of((23, 7, 12)))
    arguments = (x, w, b, t, torch.rand(23).double(), torch.rand(23, 12) < 0.5, None)
    rules = ("huber", 0.5, 1.0, 0.0)
    whole = reference.linear_reconstruction(*arguments, *rules, False, True, True, True)
    losses = reference.linear_reconstruction(*arguments, *rules, True, False, False, False)[0]
    monkeypatch.setattr(pairs, "CHUNK_BYTES", 2 * 12 * 8)
    again = reference.linear_reconstruction(*arguments, *rules, False, True, True, True)
    torch.testing.assert_close(again, whole)
    cut = reference.linear_reconstruction(*arguments, *rules, True, False, False, False)[0]
    torch.testing.assert_close(cut, losses)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(0, 220), st.integers(1, 140), st.integers(0, 150)),
    kind=st.sampled_from(["mse", "bce", "bce_with_logits"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weighted=st.sampled_from([None, "rows", "elements"]),
    masked=st.sampled_from([None, "rows", "elements"]),
)
def test_any(backend, shape, kind, dtype, weighted, masked):
    n, _, d = shape
    x, w, b, t = inputs_of(shape, dtype)
    sizes = {"rows": (n,), "elements": (n, d)}
    options = {
        "weight": torch.rand(sizes[weighted]) if weighted else None,
        "mask": torch.rand(sizes[masked]) < 0.7 if masked else None,
        "kind": kind,
        "reduction": "sum",
    }
    found = value_and_grads(x, w, b, t, backend=backend, **options)
    assert_agrees(found, exact_of(x, w, b, t, **options), dtype)
