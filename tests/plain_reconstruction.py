"""The reconstruction losses written with torch.nn.functional, in the dtype of their inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

KINDS = ("mse", "l1", "smooth_l1", "huber", "bce", "bce_with_logits")
# torch divides a weighted mean of the others by the number of elements.
BY_WEIGHT = ("mse", "l1", "smooth_l1")


def elementwise(kind, x, t, *, delta=1.0, beta=1.0, pos_weight=None):
    options = {"reduction": "none"}
    if kind == "smooth_l1":
        return F.smooth_l1_loss(x, t, beta=beta, **options)
    if kind == "huber":
        return F.huber_loss(x, t, delta=delta, **options)
    if kind == "bce_with_logits":
        return F.binary_cross_entropy_with_logits(x, t, pos_weight=pos_weight, **options)
    plain = {"mse": F.mse_loss, "l1": F.l1_loss, "bce": F.binary_cross_entropy}
    return plain[kind](x, t, **options)


def plain_loss(kind, x, t, reduction="mean", *, weight=None, mask=None, **options):
    """The elements that a mask leaves out are taken out before anything is computed."""
    full = None
    if mask is not None:
        full = mask.bool().view(*mask.shape, *[1] * (x.dim() - mask.dim())).expand(x.shape)
        x, t = torch.where(full, x, 0.5), torch.where(full, t, 0.5)
    found = elementwise(kind, x, t, **options)
    if weight is not None:
        found = found * weight
    if full is not None:
        found = torch.where(full, found, 0.0)
    if reduction == "none":
        return found
    if reduction == "sum":
        return found.sum()
    counted = torch.ones_like(found)
    if weight is not None and kind in BY_WEIGHT:
        counted = weight.expand(found.shape)
    if full is not None:
        counted = torch.where(full, counted, 0.0)
    total = counted.sum()
    return found.sum() / total if mask is None or total != 0 else found.sum() * 0.0


def inputs_of(kind, shape, dtype=torch.float32, size=2.0):
    """An input and a target that are legal for the kind."""
    generator = torch.Generator().manual_seed(sum(shape) + len(kind))
    x = torch.randn(shape, generator=generator) * size
    t = torch.rand(shape, generator=generator)
    if kind == "bce":
        x = 0.02 + 0.96 * x.sigmoid()  # a derivative up to 50, which fp16 holds
    return x.to(dtype), t.to(dtype)
