"""vae_loss: every backend against the formula in float64, second derivatives, bad arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_reconstruction import KINDS, inputs_of, plain_loss
from tolerances import assert_near

import ssl_fast
from ssl_fast import vae_loss

DIVISORS = {"batchmean": len, "sum": lambda _: 1, "mean": lambda x: x.numel()}


def vae_inputs(shape, latent, kind="bce_with_logits", dtype=torch.float32):
    """recon, target, mu and logvar."""
    x, t = inputs_of(kind, shape, dtype)
    generator = torch.Generator().manual_seed(latent)
    latents = (torch.randn(shape[0], latent, generator=generator).to(dtype) for _ in range(2))
    return [x, t, *latents]


def plain_vae(recon, target, mu, logvar, beta=1.0, kind="bce_with_logits", reduction="batchmean"):
    divisor = max(1, DIVISORS[reduction](recon))
    reconstruction = plain_loss(kind, recon, target, "sum") / divisor
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / divisor
    return reconstruction + beta * kl, reconstruction, kl


def terms_and_grads(function, inputs, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    terms = function(*leaves, **options)
    asked = [leaves[0], *leaves[2:]]
    return [x.detach() for x in terms], torch.autograd.grad(terms[0], asked)


@pytest.mark.parametrize("reduction", list(DIVISORS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 784), (3, 1, 28, 28)], ids=str)
def test_terms_and_gradients(backend, dtype, shape, kind, reduction):
    inputs = vae_inputs(shape, 5, kind, dtype)
    options = {"beta": 2.5, "kind": kind, "reduction": reduction}
    found, grads = terms_and_grads(vae_loss, inputs, backend=backend, **options)
    exact, wanted = terms_and_grads(plain_vae, [x.double() for x in inputs], **options)
    for x, e in zip(found, exact, strict=True):
        assert x.dtype is torch.float32
        assert_near(x, e, torch.float32)
    for x, e in zip(grads, wanted, strict=True):
        assert x.dtype is dtype
        assert_near(x, e, dtype)


def test_gradgradcheck():
    inputs = [x.double().requires_grad_() for x in vae_inputs((2, 3), 2)]

    def loss(*inputs):
        return vae_loss(*inputs, beta=0.5).loss

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_large_log_variances_stay_finite(backend):
    recon, target, mu, logvar = vae_inputs((4, 9), 3)
    logvar[1] = 200.0
    (loss, _, kl), grads = terms_and_grads(
        vae_loss, [recon, target, mu, logvar], beta=1e-3, backend=backend
    )
    assert kl.isfinite()
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_bytes_and_other_dtypes(backend):
    recon, _, mu, logvar = vae_inputs((4, 9), 3, "mse")
    target = torch.randint(0, 256, (4, 9), dtype=torch.uint8)
    found = vae_loss(recon, target, mu, logvar.bfloat16(), kind="mse", backend=backend)
    wide = (x.double() for x in (recon, target, mu, logvar.bfloat16()))
    for x, e in zip(found, plain_vae(*wide, kind="mse"), strict=True):
        assert_near(x, e, torch.float32)
    mixed = vae_loss(recon, target, mu.double(), logvar, kind="mse")
    assert all(x.dtype is torch.float64 for x in mixed)


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(batch=st.integers(0, 9), width=st.integers(0, 40), latent=st.integers(0, 9),
       reduction=st.sampled_from(list(DIVISORS)))  # fmt: skip
def test_any_size(backend, batch, width, latent, reduction):
    inputs = vae_inputs((batch, width), latent)
    found = vae_loss(*inputs, reduction=reduction, backend=backend)
    exact = plain_vae(*(x.double() for x in inputs), reduction=reduction)
    for x, e in zip(found, exact, strict=True):
        assert_near(x, e, torch.float32)


def test_names_and_module():
    inputs = vae_inputs((8, 20), 4)
    terms = vae_loss(*inputs, beta=3.0, kind="mse")
    assert terms == (terms.loss, terms.reconstruction, terms.kl)
    assert isinstance(terms, ssl_fast.VAETerms)
    module = ssl_fast.VAELoss(beta=3.0, kind="mse")
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(*inputs).loss, terms.loss)
    assert "beta=3.0" in repr(module)
    for bad in ({"beta": -1.0}, {"kind": "kl"}, {"reduction": "none"}, {"backend": "fast"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ssl_fast.VAELoss(**bad)


def test_compiled():
    inputs = vae_inputs((16, 50), 4)
    compiled = torch.compile(lambda *inputs: tuple(vae_loss(*inputs)), fullgraph=True)
    found, wanted = (terms_and_grads(f, inputs) for f in (compiled, vae_loss))
    for x, e in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        torch.testing.assert_close(x, e)


def test_bad_arguments():
    recon, target, mu, logvar = vae_inputs((4, 9), 3)

    def raises(error, message, *changed, **options):
        inputs = [recon, target, mu, logvar]
        for place, value in changed:
            inputs[place] = value
        with pytest.raises(error, match=message):
            vae_loss(*inputs, **options)

    raises(TypeError, "recon must be a tensor", (0, 3.0))
    raises(TypeError, "recon must be float32", (0, recon.long()))
    raises(ValueError, "recon must have a dimension", (0, recon[0, 0]), (1, target[0, 0]))
    raises(ValueError, r"target must have shape \(4, 9\)", (1, target[:2]))
    raises(TypeError, "mu must be a tensor", (2, None))
    raises(ValueError, "mu must have a row for each of the 4", (2, mu[:3]))
    raises(ValueError, r"logvar must have the shape of mu, \(4, 3\)", (3, logvar[:, :2]))
    raises(ValueError, "logvar must be on cpu; got meta", (3, logvar.to("meta")))
    raises(TypeError, "beta must be a number", beta="1")
    raises(ValueError, "beta must be finite", beta=float("inf"))
    raises(ValueError, "kind must be one of", kind="kl")
    raises(ValueError, "reduction must be one of", reduction="none")
    raises(ValueError, "backend must be one of", backend="fast")
