"""The reconstruction losses, MAE, VAE and L2-SP beside torch.nn.functional in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_fast
from benchmarks.gpu.compare import Inputs, Shape, Subject, generator

KINDS = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
LATENTS = 24
# Of MAE: patches of one image.
LENGTH = 7
HIDDEN = 48


def _elements(shape: Shape) -> float:
    return float(shape.rows * shape.dim)


def _one(_: Shape) -> float:
    """Of a sum, whose gradients are as large as the tensors."""
    return 1.0


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(*shape, seed))


def _values(kind: str, shape: Shape) -> tuple[Tensor, Tensor]:
    """An input and a target that are legal for the kind, in fp32."""
    x, t = 2 * _random(shape, 0), torch.rand(shape, generator=generator(*shape, 1))
    # A slope of up to 50, which fp16 holds beside the lift of a mean.
    return (0.02 + 0.96 * x.sigmoid() if kind == "bce" else x), t


def _pair(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    x, t = (v.to(device, dtype) for v in _values(kind, shape))
    return Inputs((x,), (t,))


def _weighted(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    inputs = _pair(kind, shape, dtype, device)
    weight = torch.rand(shape, generator=generator(*shape, 2)).to(device, dtype)
    mask = torch.arange(shape.rows, device=device) % 3 != 1
    return Inputs(inputs.learned, (*inputs.fixed, weight, mask))


def _elementwise(kind: str) -> Subject:
    def ours(backend: str, x: Tensor, t: Tensor) -> Any:
        return ssl_fast.reconstruction_loss(x, t, kind, backend=backend)

    def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        return _pair(kind, shape, dtype, device)

    return Subject(f"reconstruction_loss {kind}", ours, KINDS[kind], inputs, lift=_elements)


def _elementwise_weighted(kind: str) -> Subject:
    """A weight, rows that a mask leaves out, and the loss of each element."""

    def ours(backend: str, x: Tensor, t: Tensor, weight: Tensor, mask: Tensor) -> Any:
        return ssl_fast.reconstruction_loss(
            x, t, kind, "none", weight=weight, mask=mask, backend=backend
        )

    def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        return _weighted(kind, shape, dtype, device)

    return Subject(f"reconstruction_loss {kind} weighted", ours, None, inputs)


def _bytes_target(backend: str, x: Tensor, t: Tensor) -> Any:
    return ssl_fast.reconstruction_loss(
        x, t, "bce_with_logits", target_scale=1 / 255, backend=backend
    )


def _image_bytes(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    x, t = _values("bce_with_logits", shape)
    return Inputs((x.to(device, dtype),), ((255 * t).to(device, torch.uint8),))


def _layer(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Rows of HIDDEN features, a layer to the shape's columns, and the target."""
    x, w = _random((shape.rows, HIDDEN), 0), _random((shape.dim, HIDDEN), 1) / HIDDEN**0.5
    bias, t = _random((shape.dim,), 2), torch.rand(shape, generator=generator(*shape, 3))
    return Inputs(tuple(v.to(device, dtype) for v in (x, w, bias)), (t.to(device, dtype),))


def _linear(kind: str) -> Subject:
    def ours(backend: str, x: Tensor, w: Tensor, bias: Tensor, t: Tensor) -> Any:
        return ssl_fast.linear_reconstruction_loss(
            x, w, t, linear_bias=bias, kind=kind, backend=backend
        )

    def plain(x: Tensor, w: Tensor, bias: Tensor, t: Tensor) -> Tensor:
        # The layer's output is a logit of "bce" too.
        loss = KINDS["bce_with_logits" if kind == "bce" else kind]
        return loss(F.linear(x, w, bias), t)

    return Subject(f"linear_reconstruction_loss {kind}", ours, plain, _layer, lift=_elements)


def _patches(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    full = (shape.rows, LENGTH, shape.dim)
    pred, target = _random(full, 0), 3 + _random(full, 1)
    mask = (torch.rand(full[:2], generator=generator(*full, 2)) < 0.75).float()
    mask[0, 0] = 1.0  # a mean over no patch would be 0 / 0
    fixed = target.to(device, dtype), mask.to(device)
    return Inputs((pred.to(device, dtype),), fixed)


def _mae(backend: str, pred: Tensor, target: Tensor, mask: Tensor) -> Any:
    return ssl_fast.mae_loss(pred, target, mask, backend=backend)


def _plain_mae(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def _latents(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    x, t = _values("bce_with_logits", shape)
    mu, logvar = _random((shape.rows, LATENTS), 2), _random((shape.rows, LATENTS), 3)
    return Inputs(tuple(v.to(device, dtype) for v in (x, mu, logvar)), (t.to(device, dtype),))


def _vae(backend: str, recon: Tensor, mu: Tensor, logvar: Tensor, target: Tensor) -> Any:
    return ssl_fast.vae_loss(recon, target, mu, logvar, beta=0.5, backend=backend)


def _plain_vae(recon: Tensor, mu: Tensor, logvar: Tensor, target: Tensor) -> Any:
    count = len(recon)
    found = F.binary_cross_entropy_with_logits(recon, target, reduction="sum") / count
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum() / count
    return found + 0.5 * kl, found, kl


def _parameters(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Tensors of several sizes, one of them of no element, and their anchors."""
    sizes = (shape, (shape.dim,), (0,), (3, shape.dim, 2), (1,))
    anchors = [_random(size, i) for i, size in enumerate(sizes)]
    moved = [a + 0.1 * _random(a.shape, 9) for a in anchors]
    learned, fixed = (tuple(x.to(device, dtype) for x in group) for group in (moved, anchors))
    return Inputs(learned, fixed)


def _l2_sp(backend: str, *tensors: Tensor) -> Any:
    half = len(tensors) // 2
    return ssl_fast.l2_sp(tensors[:half], tensors[half:], 0.5, backend=backend)


def _plain_l2_sp(*tensors: Tensor) -> Tensor:
    half = len(tensors) // 2
    squares = [(p - a).square().sum() for p, a in zip(tensors[:half], tensors[half:], strict=True)]
    return 0.25 * torch.stack(squares).sum()


# One row is a variance of nothing in MAE, and a patch of one pixel has none.
_MAE_SHAPES = (Shape(5, 27), Shape(16, 256), Shape(33, 768))

SUBJECTS = (
    *map(_elementwise, KINDS),
    _elementwise_weighted("mse"),
    _elementwise_weighted("bce_with_logits"),
    Subject(
        "reconstruction_loss of bytes", _bytes_target, None, _image_bytes, lift=_elements
    ),
    *map(_linear, KINDS),
    Subject("mae_loss", _mae, _plain_mae, _patches, _MAE_SHAPES),
    Subject("vae_loss", _vae, _plain_vae, _latents),
    Subject("l2_sp", _l2_sp, _plain_l2_sp, _parameters, lift=_one),
)  # fmt: skip
